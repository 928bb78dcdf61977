"""The settings as one value: checked once, remembered, and the same list in Python as in the extension."""

import dataclasses
import inspect

import cases
import pytest
import torch

from ngd_fast import NGDObjective, functional
from ngd_fast.objective import backends, ops, settings
from ngd_fast.objective.settings import Settings, make

#: Each differs from its default, and all from each other.
OTHERS = {
    "label_smoothing": 0.1, "kd_weight": 0.7, "kd_temperature": 2.0, "kd_mode": "kl", "kd_scale_by_t2": True,
    "proto_weight": 0.4, "proto_temperature": 0.5, "var_cap": 0.05, "margin": 1.4, "var_weight": 0.9,
    "margin_weight": 0.3, "high_valence": (0, 3),
}  # fmt: skip
INPUTS = ("features", "logits", "target", "prototypes", "prior", "labels", "teacher_logits", "class_weight")


def test_the_same_values_are_one_object():
    assert make(0.1) is make(0.1) is not make(0.2)
    assert make(high_valence=(0,)) is make(high_valence=(0,))
    assert make(high_valence=[0]) == Settings(high_valence=[0])  # a list cannot be remembered
    with pytest.raises(TypeError, match="kd_weight: wanted a number, got bool"):
        make(kd_weight=1), make(kd_weight=True)  # equal, and equal as keys
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().margin = 1.0


def test_packed_holds_every_number_under_its_name():
    packed = Settings(**OTHERS).packed
    assert packed._fields == settings.NAMES and all(type(value) is float for value in packed)
    assert packed._asdict() == {
        name: float(settings.KD_MODES.index(value) if name == "kd_mode" else value)
        for name, value in OTHERS.items()
        if name != "high_valence"
    }


def test_an_extension_with_other_settings_is_named(monkeypatch):
    extension = pytest.importorskip("ngd_fast._C")
    assert backends._load("ngd_fast._C") == ""
    for change in (extension.SETTINGS.replace("margin margin_weight", "margin_weight margin"), ""):
        monkeypatch.setattr(extension, "SETTINGS", "another " + change)
        reason = backends._load("ngd_fast._C")
        assert reason == "ngd_fast._C is older than this source; build again: pip install --no-build-isolation ."


def test_signatures_have_the_settings_defaults():
    """The public functions spell them out for their readers."""
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    for function in (functional.ngd_objective, NGDObjective, functional.d_geo):
        parameters = inspect.signature(function).parameters
        spelled = {name: parameters[name].default for name in defaults if name in parameters}
        assert spelled.items() <= defaults.items()
    assert set(defaults) <= set(inspect.signature(functional.ngd_objective).parameters)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_each_setting_reaches_each_backend(backend, name):
    """As a keyword, as an attribute of the module, and as a value; and it makes a difference."""
    if reason := backends.why_not(backend):
        pytest.skip(reason)
    case = cases.make(40, 16, 8, 25, geo_weight=0.5)
    given = {key: value for key, value in case.items() if key not in OTHERS}
    # var_cap and margin at which every part of D-Geo acts
    base = {**{key: case[key] for key in OTHERS if key in case}, "var_cap": 0.1, "margin": 1.3}
    total = functional.ngd_objective(**given, **{**base, name: OTHERS[name]}, backend=backend).total
    module = NGDObjective(
        prototypes=given.pop("prototypes"), prior=given.pop("prior"), class_weight=given.pop("class_weight"),
        geo_weight=given.pop("geo_weight"), backend=backend, **base,
    )  # fmt: skip
    before = module(**given).total
    setattr(module, name, OTHERS[name])
    assert getattr(module, name) == OTHERS[name] == getattr(module.settings, name)
    assert torch.equal(module(**given).total, total) and not torch.equal(before, total)
    exact = NGDObjective(
        prototypes=module.prototypes, prior=module.prior, class_weight=module.class_weight, geo_weight=0.5,
        backend="reference", **{**base, name: OTHERS[name]},
    )  # fmt: skip
    assert float(total) == pytest.approx(float(exact(**given).total), rel=1e-5)


def test_a_module_refuses_a_setting_out_of_range():
    module = NGDObjective()
    with pytest.raises(ValueError, match="kd_temperature: wanted a number above 0, got 0"):
        module.kd_temperature = 0
    assert module.kd_temperature == 5.0


def test_the_short_way_of_an_eager_call_is_the_checked_one(monkeypatch):
    """Same bits; and what the extension would take but the public function refuses goes the way that refuses it."""
    if reason := backends.why_not("cpu"):
        pytest.skip(reason)
    case = {"labels": None, **cases.make(7, 16, 4, 5)}
    short = cases.run(case, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(ops, "eager", lambda *args: None)
        checked = cases.run(case, "cpu")
    assert all(map(torch.equal, short, checked))
    taken = ops.eager("cpu", make(), *(case[name] for name in INPUTS), 0.5)
    assert len(taken) == 6
    for name, value in (
        ("teacher_logits", torch.zeros(4)),
        ("class_weight", torch.ones(1, 4)),
        ("target", torch.zeros(7, 4)),
        ("prior", None),
        ("prototypes", case["prototypes"].clone().requires_grad_()),
    ):
        other = {**case, "labels": None, name: value}
        assert ops.eager("cpu", make(), *(other[key] for key in INPUTS), 0.5) is None, name
    assert ops.eager("cpu", make(), *(case[name] for name in INPUTS), torch.zeros(1)) is None
    assert ops.eager("triton", make(), *(case[name] for name in INPUTS), 0.5) is None
