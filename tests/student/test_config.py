"""The packaged configurations hold the released setting; mistakes are named."""

import pytest
import yaml

from ngd_fast.config import build_config, dump_config
from ngd_fast.errors import UserError
from ngd_fast.student import stem
from ngd_fast.student.config import RESUMABLE, StudentConfig, differing_keys, load_student_config, packaged_configs
from ngd_fast.student.schedule import train_image_size


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_config_loads(name):
    assert load_student_config(name).name == name.rpartition("/")[2]


@pytest.mark.parametrize("folder", ["", "demo/"])
def test_variants_add_one_term_each(folder):
    switched = [load_student_config(f"{folder}B{i}").switches() for i in range(4)]
    assert [[name for name, on in s.items() if on] for s in switched] == [
        ["ce"],
        ["ce", "kd"],
        ["ce", "kd", "proto"],
        ["ce", "kd", "proto", "d_geo"],
    ]


def test_variants_differ_in_nothing_else():
    configs = [load_student_config(f"B{i}").model_dump(mode="json") for i in range(4)]
    for config in configs[1:]:
        keys = differing_keys(configs[0], config)
        assert {key.split(".")[0] for key in keys} == {"name", "objective"}


def test_b3_is_the_released_setting():
    config = load_student_config("B3")
    objective, train, optimizer = config.objective, config.train, config.optimizer
    assert (objective.kd.weight, objective.kd.mode, objective.kd.temperature) == (0.30, "mse", 5.0)
    assert objective.kd.scale_by_t2 is False
    assert (objective.proto.weight, objective.proto.temperature) == (0.12, 0.90)
    assert objective.geo.weight == 0.012 and objective.geo.positive_classes == ("happiness", "surprise")
    assert (objective.geo.schedule.start, objective.geo.schedule.end) == (20, 60)
    assert (objective.ce.label_smoothing, objective.ce.class_weight_power) == (0.055, 0.25)
    assert (train.epochs, train.batch_size, train.clip_grad, train.precision) == (100, 128, 1.0, "bf16")
    assert train.channels_last and train.ema is None
    assert (optimizer.lr, optimizer.weight_decay, config.model.arch) == (2e-4, 0.05, "resnet18")


def test_unknown_key_names_the_nearest():
    with pytest.raises(
        UserError, match=r"unknown key objective\.kd\.temprature; did you mean objective\.kd\.temperature"
    ):
        load_student_config("B1", ["objective.kd.temprature=4"])


def test_kd_modes_reach_the_objective():
    settings = load_student_config("B1", ["objective.kd.mode=dkd", "objective.kd.beta=0.5"]).objective.settings()
    assert (settings.kd_mode, settings.kd_alpha, settings.kd_beta) == ("dkd", 1.0, 0.5)
    plain = load_student_config("B1").model_dump(mode="json")
    del plain["objective"]["kd"]["alpha"], plain["objective"]["kd"]["beta"]  # a checkpoint from before there was dkd
    assert differing_keys(plain, load_student_config("B1").model_dump(mode="json")) == []
    with pytest.raises(UserError, match=r"objective\.kd\.beta: .* greater than or equal to 0"):
        load_student_config("B1", ["objective.kd.beta=-1"])
    with pytest.raises(UserError, match=r"objective\.kd\.mode: .*'dkd'"):
        load_student_config("B1", ["objective.kd.mode=dkt"])


def test_wrong_values_are_named():
    with pytest.raises(UserError, match=r"train\.epochs"):
        load_student_config("B0", ["train.epochs=many"])
    with pytest.raises(UserError, match="end must not be before start"):
        load_student_config("B3", ["objective.geo.schedule.end=3"])
    with pytest.raises(UserError, match="'joy' is none of neutral"):
        load_student_config("B3", ["objective.geo.positive_classes=[joy]"])
    with pytest.raises(UserError, match="a class stands twice in fear, fear"):
        load_student_config("B3", ["objective.geo.positive_classes=[fear,fear]"])
    with pytest.raises(UserError, match=r"data\.std: must be above 0"):
        load_student_config("B0", ["data.std=[0.2,0.2,0]"])
    with pytest.raises(UserError, match=r"optimizer\.betas\.1: .* less than 1"):
        load_student_config("B0", ["optimizer.betas=[0.9,1]"])
    with pytest.raises(UserError, match=r"seed: .* less than 18446744073709551616"):
        load_student_config("B0", [f"seed={2**64}"])


STAGES = "train.resolution=[{from_epoch: 0, image_size: 64}, {from_epoch: 10, image_size: 112}]"


def test_resolution_grows_by_stages():
    config = load_student_config("B0", [STAGES])
    sizes = [train_image_size(config, epoch) for epoch in (0, 9, 10, 99)]
    assert sizes == [64, 64, 112, 112] and config.data.image_size == 224
    assert train_image_size(load_student_config("B0"), 50) == 224
    assert build_config(StudentConfig, yaml.safe_load(dump_config(config)), source="dump") == config
    plain = load_student_config("B0").model_dump(mode="json")
    assert differing_keys(plain, config.model_dump(mode="json")) == ["train.resolution"]
    del plain["train"]["resolution"]  # a checkpoint from before there were stages
    assert differing_keys(plain, load_student_config("B0").model_dump(mode="json")) == []
    del plain["data"]["label_noise"], plain["optimizer"]["kind"]  # as young, and of their defaults
    assert differing_keys(plain, load_student_config("B0").model_dump(mode="json")) == []
    noisy = load_student_config("B0", ["data.label_noise=0.1"]).model_dump(mode="json")
    assert differing_keys(plain, noisy) == ["data.label_noise"]
    muon = load_student_config("B0", ["optimizer.kind=muon"]).model_dump(mode="json")
    assert differing_keys(plain, muon) == differing_keys(muon, plain) == ["optimizer.kind"]


def test_every_size_of_the_fast_recipe_fits_the_fused_stem():
    config = load_student_config("fast")
    sizes = {train_image_size(config, epoch) for epoch in range(config.train.epochs)} | {config.data.image_size}
    assert sizes == {64, 96, 112}
    assert [size for size in sizes if stem.why_not_size(size, size)] == []


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[]", "first stage must have from_epoch 0"),
        ("[{from_epoch: 1, image_size: 64}]", "first stage must have from_epoch 0"),
        ("[{from_epoch: 0, image_size: 64}, {from_epoch: 0, image_size: 96}]", "96 px from epoch 0 after 64 px"),
        ("[{from_epoch: 0, image_size: 64}, {from_epoch: 5, image_size: 64}]", "64 px from epoch 5 after 64 px"),
        ("[{from_epoch: 0, image_size: 64}, {from_epoch: 100, image_size: 96}]", "from epoch 100 never starts in 100"),
        ("[{from_epoch: 0, image_size: 225}]", "ends at 225 px, above data.image_size 224"),
        ("[{from_epoch: 0, image_size: 4}]", r"train\.resolution\.0\.image_size: .*8"),
        ("[{from_epoch: 0, size: 64}]", r"train\.resolution\.0\.image_size is missing"),
        ("64", r"train\.resolution: "),
    ],
)
def test_unfit_resolutions_are_named(stages, message):
    with pytest.raises(UserError, match=message):
        load_student_config("B0", [f"train.resolution={stages}"])


def test_more_epochs_than_a_schedule_can_hold_are_named():
    with pytest.raises(UserError, match=r"^train\.epochs: .*100000"):
        load_student_config("B0", ["train.epochs=1e9"])


def test_switches_take_yamls_on_and_off():
    values = [load_student_config("B0", [f"train.compile={text}"]).train.compile for text in ("on", "off", "auto")]
    assert values == [True, False, "auto"]


def test_unknown_config_lists_the_packaged_ones():
    with pytest.raises(UserError, match="B0, B1, B2, B3"):
        load_student_config("B7")


def test_resumable_keys_exist():
    dumped = StudentConfig().model_dump()
    for key in RESUMABLE:
        value = dumped
        for part in key.split("."):
            assert part in value, key
            value = value[part]


def test_differing_keys_leave_out_what_changes_no_weights():
    a = load_student_config("B0", ["data.train=a.npz", "train.log_every=5", "seed=1"]).model_dump()
    b = load_student_config("B0", ["data.train=b.npz", "train.log_every=6", "seed=2"]).model_dump()
    assert differing_keys(a, b) == ["seed"]


def test_a_folder_does_not_hide_the_packaged_config_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "demo" / "B0").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert load_student_config("demo/B0").train.epochs == 12
