"""The typed configuration: what is read is what was written, and every mistake names its key."""

from typing import Literal

import pytest

from ngd_fast.config import Config, as_override, dump_config, load_config
from ngd_fast.errors import UserError


class Inner(Config):
    rate: float = 0.5
    steps: int = 3


class Outer(Config):
    name: str = "a"
    mean: float | tuple[float, float, float] = 0.5
    compile: Literal["auto"] | bool = "auto"
    inner: Inner = Inner()
    optional: Inner | None = None
    bands: dict[str, tuple[float, float]] = {}


def test_yaml_then_overrides_then_dump_round_trip(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: b\ninner:\n  rate: 0.25\n")
    config = load_config(Outer, path, ["inner.steps=7", "optional.rate=1e-3"])
    assert config == Outer(name="b", inner=Inner(rate=0.25, steps=7), optional=Inner(rate=1e-3))
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(Outer, again) == config


@pytest.mark.parametrize("name", ["a: b #1.npz", "007", "null", "é 😀", '"{', "new\nline", "1e3"])
def test_an_override_made_from_a_value_is_that_value(name):
    assert load_config(Outer, None, [as_override("name", name)]).name == name


@pytest.mark.parametrize(
    ("overrides", "needles"),
    [
        (["inner.rat=1"], ["inner.rat", "did you mean inner.rate"]),
        (["nmae=1"], ["nmae", "did you mean name"]),
        (["optional.stesp=1"], ["did you mean optional.steps"]),
        (["rate=1"], ["unknown key rate; did you mean inner.rate?"]),
        (["inner.steps=2001-99-99"], ["--set inner.steps=2001-99-99", "not valid YAML"]),
        (["inner.steps=many"], ["inner.steps", "many"]),
        (["inner.steps=1.5"], ["inner.steps", "1.5"]),
        (["inner.rate=.nan"], ["inner.rate"]),
        (["inner"], ["key=value"]),
        (["name.x=1", "name=2"], ["name"]),
    ],
)
def test_mistakes_name_the_key(overrides, needles):
    with pytest.raises(UserError) as caught:
        load_config(Outer, None, overrides)
    for needle in needles:
        assert needle in str(caught.value)


def test_the_file_is_named_only_for_what_stands_in_it(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("inner:\n  rate: 0.25\n")
    with pytest.raises(UserError, match=r"^inner\.steps: "):
        load_config(Outer, path, ["inner.steps=many"])
    with pytest.raises(UserError, match=r"^unknown key iner; did you mean inner"):
        load_config(Outer, path, ["iner.steps=7"])
    path.write_text("inner:\n  rate: fast\n")
    with pytest.raises(UserError, match=r"c\.yaml: inner\.rate: "):
        load_config(Outer, path, ["inner.steps=7"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mean=grey", "mean: input should be a valid number or a valid tuple (got 'grey')"),
        ("mean=[1, 2]", "mean.2 is missing"),
        ("mean=[1, 2, x]", "mean.2: input should be a valid number, unable to parse string as a number (got 'x')"),
        ("compile=maybe", "compile: input should be 'auto' or a valid boolean (got 'maybe')"),
        ("bands.alpha=[8]", "bands.alpha.1 is missing"),
        ("bands.alpha=8", "bands.alpha: input should be a valid tuple (got 8)"),
    ],
)
def test_a_key_of_several_types_is_named_as_typed(override, message):
    with pytest.raises(UserError) as caught:
        load_config(Outer, None, [override])
    assert str(caught.value) == message


@pytest.mark.parametrize("text", ["a: [1", "a: 2001-99-99", "- 1\n- 2\n", "just words"])
def test_files_that_are_no_configuration(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml"):
        load_config(Outer, path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such configuration file"):
        load_config(Outer, tmp_path / "absent.yaml")
