"""The teacher's networks and their file."""

import pytest
import torch

from ngd_fast.errors import UserError
from ngd_fast.teacher.config import NetworkConfig
from ngd_fast.teacher.network import EMBEDDING_DIM, Teacher, load_teacher, save_teacher

META = {"band_names": ["a", "b", "c"], "input": {}, "maps_sha256": "0", "train_subjects": [], "validation_subjects": []}


def make(arch="cnn", bands=3, resolution=16, **settings):
    torch.manual_seed(0)
    return Teacher(bands, resolution, NetworkConfig(arch=arch, width=8, **settings))


@pytest.mark.parametrize("arch", ["cnn", "vit"])
@pytest.mark.parametrize("resolution", [8, 32, 64])
@pytest.mark.parametrize("head", ["tanh", "linear"])
def test_maps_become_ratings_and_256_features(arch, resolution, head):
    teacher = make(arch, resolution=resolution, head=head).eval()
    va, features = teacher(torch.rand(5, 3, resolution, resolution))
    assert va.shape == (5, 2) and features.shape == (5, EMBEDDING_DIM)
    # The features are the layer that the ratings are read from.
    read = teacher.head(features)
    torch.testing.assert_close(va, torch.tanh(read) if head == "tanh" else read)
    assert teacher(torch.rand(0, 3, resolution, resolution))[1].shape == (0, EMBEDDING_DIM)


@pytest.mark.parametrize("arch", ["cnn", "vit"])
def test_rows_do_not_depend_on_their_batch_in_eval_mode(arch):
    teacher, maps = make(arch).eval(), torch.rand(6, 3, 16, 16)
    torch.testing.assert_close(teacher(maps)[1][2:3], teacher(maps[2:3])[1], atol=1e-5, rtol=1e-4)


def test_position_in_the_map_matters():
    teacher = make().eval()
    maps = torch.zeros(2, 3, 16, 16)
    maps[0, :, :4, :4] = maps[1, :, 12:, 12:] = 1
    assert not torch.allclose(*teacher(maps)[1], atol=1e-3)


def test_inputs_are_standardised_by_their_pixels_and_constant_ones_count_as_zero():
    teacher = make()
    maps = torch.rand(50, 3, 16, 16) * 3 + 1
    maps[:, :, 0, 0] = 0.7
    teacher.set_input_statistics(maps)
    x = teacher.standardize(maps)
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(3, 16, 16), atol=1e-5, rtol=0)
    assert (x[:, :, 0, 0] == 0).all()
    assert x[:, :, 1, 1].std(correction=0) == pytest.approx(1, abs=1e-3)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"maps: must be \[N, 3, 16, 16\]"):
        make()(torch.rand(2, 4, 16, 16))
    for bad in (12, 4):
        with pytest.raises(ValueError, match="multiple of 8"):
            make(resolution=bad)
    with pytest.raises(ValueError, match="bands"):
        make(bands=0)


@pytest.mark.parametrize("arch", ["cnn", "vit"])
def test_the_file_brings_back_the_same_teacher(arch, tmp_path):
    teacher = make(arch)
    teacher.set_input_statistics(torch.rand(20, 3, 16, 16))
    for name in ("a", "b"):
        save_teacher(tmp_path / name / "teacher_best.safetensors", teacher, {**META, "note": "x"})
    loaded, meta = load_teacher(tmp_path / "a")
    maps = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        for one, other in zip(teacher.eval()(maps), loaded(maps)):
            assert torch.equal(one, other)
    assert meta["arch"] == arch and meta["embedding_dim"] == 256 and meta["note"] == "x"
    assert load_teacher(tmp_path / "b" / "teacher_best.safetensors")[1]["sha256"] == meta["sha256"]
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_damaged_and_foreign_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "teacher_best.safetensors"
    with pytest.raises(UserError, match="no such file"):
        load_teacher(tmp_path)
    teacher = make()
    with pytest.raises(ValueError, match="meta: lacks band_names"):
        save_teacher(path, teacher, {})
    save_teacher(path, teacher, META)
    (tmp_path / "half.safetensors").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated"):
        load_teacher(tmp_path / "half.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="not a teacher"):
        load_teacher(tmp_path / "foreign.safetensors")
    with torch.no_grad():
        teacher.head.bias.fill_(float("nan"))
    save_teacher(path, teacher, META)
    with pytest.raises(UserError, match="NaN"):
        load_teacher(path)
    teacher.head = torch.nn.Linear(4, 2)
    save_teacher(path, teacher, META)
    with pytest.raises(UserError, match="do not fit"):
        load_teacher(path)
