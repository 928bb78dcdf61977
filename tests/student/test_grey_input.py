"""When training feeds one channel to the fused stem, and that one channel stands for three equal ones."""

import numpy as np
import pytest
import torch

from ngd_fast.errors import UserError
from ngd_fast.faces.dataset import Faces
from ngd_fast.student import run, stem
from ngd_fast.student.kd_teacher import LogitsOnly, load_kd_teacher
from ngd_fast.student.resnet import ResNet
from ngd_fast.student.run import train_student

CPU = torch.device("cpu")


def reason(config, faces, *, runs_here=True, monkeypatch=None):
    if runs_here:
        monkeypatch.setattr(stem, "why_not_here", lambda device: "")
    return run._why_no_fused_stem(config, faces, CPU)


@pytest.fixture
def grey_faces(files):
    return Faces.load(files["train"])


BF16 = ("model.arch=resnet18-w32", "data.image_size=48", "train.precision=bf16")


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (BF16, ""),
        ((*BF16, "data.mean=[0.5,0.5,0.5]"), ""),
        ((*BF16, "model.stem=layers"), "model.stem=layers"),
        ((*BF16, "train.precision=fp32"), "fp32"),
        ((*BF16, "train.sync_bn=true"), "sync_bn"),
        ((*BF16, "model.arch=resnet18-w16"), "multiple of 32"),
        ((*BF16, "model.arch=timm:vit_tiny_patch16_224"), "none of resnet18"),
        ((*BF16, "data.image_size=40"), "40 x 40 pixels"),
        ((*BF16, "data.mean=[0.4,0.5,0.6]"), "differs between the channels"),
    ],
)
def test_when_the_stem_is_fused(small_config, grey_faces, monkeypatch, overrides, why):
    got = reason(small_config("B0", *overrides), grey_faces, monkeypatch=monkeypatch)
    assert why in got and bool(why) == bool(got)


def test_colour_faces_keep_three_channels(small_config, grey_faces, monkeypatch):
    images = np.repeat(grey_faces.images[..., None], 3, axis=3)
    colour = Faces(
        images=images,
        paths=None,
        label_dist=grey_faces.label_dist,
        names=grey_faces.names,
        source="colour",
    )
    assert "color" in reason(small_config("B0", *BF16), colour, monkeypatch=monkeypatch)
    assert reason(small_config("B0", *BF16, "data.grey=true"), colour, monkeypatch=monkeypatch) == ""


def test_a_stem_that_cannot_be_fused_is_refused_by_name(small_config, tmp_path):
    with pytest.raises(UserError, match="stem=fused: it needs a GPU, not cpu"):
        train_student(small_config("B0", *BF16, "model.stem=fused"), tmp_path / "run")


def test_training_on_one_channel_is_training_on_three(small_config, teacher, tmp_path, monkeypatch):
    config = small_config("B1", f"objective.kd.teacher={teacher}")
    runs = []
    for name, why in (("three", "not here"), ("one", "")):
        monkeypatch.setattr(run, "_why_no_fused_stem", lambda *_, why=why: why)
        train_student(config, tmp_path / name)
        runs.append(torch.load(tmp_path / name / "student_last.ckpt", weights_only=True)["state"]["step"]["student"])
    for key, value in runs[0].items():
        torch.testing.assert_close(runs[1][key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_teacher_of_other_normalisation_on_one_channel(teacher):
    module, _ = load_kd_teacher(teacher, weights=None, class_names=Faces.class_names, mean=0.3, std=0.5, image_size=48)
    images = torch.randn(2, 1, 48, 48)
    torch.testing.assert_close(module(images), module(images.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_foreign_teacher_gets_three_channels():
    seen = []

    class Foreign(torch.nn.Module):
        def forward(self, images):
            seen.append(images.shape)
            return images.mean(dim=(2, 3))

    LogitsOnly(Foreign())(torch.zeros(2, 1, 8, 8))
    assert seen == [(2, 3, 8, 8)]


def test_resnet_takes_one_channel_for_three():
    torch.manual_seed(0)
    network, images = ResNet(18, width=8).eval(), torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(network(images), network(images.expand(-1, 3, -1, -1)))
