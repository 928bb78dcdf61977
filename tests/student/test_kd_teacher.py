"""The vision teacher: frozen, folded, normalised as it learned; its logits computed once and looked up."""

import copy

import numpy as np
import pytest
import torch
from norms import as_trained

from ngd_fast.errors import UserError
from ngd_fast.faces.augment import AugmentConfig
from ngd_fast.faces.classes import CLASS_NAMES
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.feeds import make_feed
from ngd_fast.student import kd_teacher
from ngd_fast.student.kd_teacher import CachedTeacher, LiveTeacher, cached_logits, fold_batch_norms, load_kd_teacher
from ngd_fast.student.networks import build_student
from ngd_fast.student.resnet import ResNet
from ngd_fast.student.run import train_student

VIEW = {"image_size": 24, "mean": 0.5, "std": 0.25, "grey": False}


def load(teacher, **changes):
    options = {"weights": None, "class_names": CLASS_NAMES, "mean": 0.5, "std": 0.25, "image_size": 24}
    return load_kd_teacher(teacher, **{**options, **changes})


@pytest.mark.parametrize("depth", [18, 50])
def test_folded_batch_norms_compute_the_same(depth):
    torch.manual_seed(0)
    network = as_trained(ResNet(depth, 8))
    network.eval().double()
    folded = copy.deepcopy(network)
    fold_batch_norms(folded)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), network(images), rtol=1e-10, atol=1e-10)


def test_teacher_is_frozen_and_sees_its_own_normalisation(teacher):
    same, checksum = load(teacher)
    other, again = load(teacher, mean=0.3, std=(0.2, 0.4, 0.5))
    assert checksum == again and len(checksum) == 64
    assert not any(p.requires_grad for p in same.parameters()) and not same.training
    grey = torch.rand(4, 3, 24, 24)
    mean, std = 0.3, torch.tensor([0.2, 0.4, 0.5]).view(1, 3, 1, 1)
    torch.testing.assert_close(other((grey - mean) / std), same((grey - 0.5) / 0.25), rtol=1e-4, atol=1e-4)


def test_teacher_of_other_classes_is_refused(teacher):
    with pytest.raises(UserError, match="knows neutral"):
        load(teacher, class_names=("a", "b"))


def test_teacher_of_a_package_needs_its_weights():
    with pytest.raises(UserError, match="teacher_weights"):
        load("timm:vit_tiny_patch16_224")


def test_torchvision_teacher(tmp_path):
    models = pytest.importorskip("torchvision.models")
    network = models.resnet18(num_classes=8).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    loaded, _ = load("torchvision:resnet18", weights=str(tmp_path / "w.pth"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), network(images), rtol=1e-4, atol=1e-4)


def test_cached_logits_are_those_of_the_view(teacher, files, tmp_path):
    """Without other augmentation than the flip, looking up must equal asking the teacher."""
    faces = Faces.load(files["train"])
    network, checksum = load(teacher)
    table = cached_logits(tmp_path, network, checksum, faces, device=torch.device("cpu"), autocast=None, **VIEW)
    augment = AugmentConfig.off().model_copy(update={"flip": 0.5})
    cached = CachedTeacher(torch.from_numpy(table.copy()), augment, seed=3)
    live = LiveTeacher(network, autocast=None)
    feed = make_feed(faces, kind="torch", batch_size=16, train=True, seed=3, augment=augment, **VIEW)
    for epoch in (0, 1):
        cached.set_epoch(epoch)
        for batch in feed.epoch(epoch):
            torch.testing.assert_close(cached(batch), live(batch), rtol=2e-3, atol=2e-3)
    assert 20 < int(cached.mirrored.sum()) < 76


def test_cached_logits_are_computed_once_for_each_teacher_and_view(teacher, files, tmp_path):
    faces = Faces.load(files["valid"])
    network, checksum = load(teacher)
    options = {"device": torch.device("cpu"), "autocast": None}
    first = cached_logits(tmp_path, network, checksum, faces, **options, **VIEW)
    broken = build_student("resnet18-w4")  # would give other logits if it were asked
    again = cached_logits(tmp_path, broken, checksum, faces, **options, **VIEW)
    assert np.array_equal(first, again) and isinstance(again, np.memmap)
    cached_logits(tmp_path, network, "other", faces, **options, **VIEW)
    cached_logits(tmp_path, network, checksum, faces, **options, **{**VIEW, "image_size": 32})
    assert len(list(tmp_path.iterdir())) == 3


def test_cached_logits_are_computed_with_the_feeds_workers(small_config, teacher, tmp_path, monkeypatch):
    asked = []

    def asking(faces, **options):
        asked.append(options["num_workers"])
        return make_feed(faces, **options)

    monkeypatch.setattr(kd_teacher, "make_feed", asking)
    kd = (f"objective.kd.teacher={teacher}", "objective.kd.cached=true")
    train_student(small_config("B1", *kd, "feed.workers=2", "train.epochs=1"), tmp_path / "run")
    assert asked == [2]


def test_damaged_cache_is_named(teacher, files, tmp_path):
    faces = Faces.load(files["valid"])
    network, checksum = load(teacher)
    options = {"device": torch.device("cpu"), "autocast": None, **VIEW}
    cached_logits(tmp_path, network, checksum, faces, **options)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="delete it"):
        cached_logits(tmp_path, network, checksum, faces, **options)
