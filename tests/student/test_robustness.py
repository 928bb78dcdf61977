import numpy as np
import pytest
import torch

from ngd_fast.errors import UserError
from ngd_fast.faces.classes import CLASS_NAMES
from ngd_fast.faces.dataset import Faces
from ngd_fast.student.inference import predict
from ngd_fast.student.networks import build_student
from ngd_fast.student.robustness import corrupted_logits, corruption_scores, mean_corruption_error

META = {"class_names": CLASS_NAMES, "image_size": 24, "mean": 0.5, "std": 0.25}


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return build_student("resnet18-w8").eval()


@pytest.fixture(scope="module")
def faces():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 24, 24), dtype=np.uint8)
    labels = np.append(np.arange(19) % 8, -1)
    return Faces(images=images, labels=labels, names=[str(i) for i in range(20)], source="toy")


def test_clean_faces_are_predict_s_and_batches_do_not_matter(student, faces):
    names = ("gaussian_noise", "rotation")
    logits, labels = corrupted_logits(student, META, faces, names, batch_size=20)
    np.testing.assert_allclose(logits["clean"][0], predict(student, META, faces).logits, atol=1e-5)
    np.testing.assert_array_equal(labels, faces.labels)
    assert logits["rotation"].shape == (5, 20, 8)
    again, _ = corrupted_logits(student, META, faces, names, batch_size=7)
    for name in names:
        np.testing.assert_allclose(again[name], logits[name], atol=1e-4)
    other, _ = corrupted_logits(student, META, faces, names, batch_size=20, seed=1)
    assert np.abs(other["gaussian_noise"] - logits["gaussian_noise"]).max() > 1e-3


def with_accuracy(clean, *levels):
    metrics = {"accuracy": list(levels), "macro_f1": list(levels), "balanced_accuracy": list(levels)}
    return {"n": 10, "clean": {"accuracy": clean}, "corruptions": {"jpeg": metrics}}


def test_mean_corruption_error_by_hand():
    own = with_accuracy(0.9, 0.8, 0.8, 0.7, 0.7, 0.5)  # errors sum to 1.5, 0.5 of it there already
    base = with_accuracy(0.8, 0.7, 0.6, 0.4, 0.2, 0.1)  # 3.0, 1.0
    made = mean_corruption_error(own, base)
    assert made["mce"] == pytest.approx(50)
    assert made["relative_mce"] == pytest.approx(100 * (1.5 - 0.5) / (3.0 - 1.0))
    assert mean_corruption_error(base, base)["mce"] == pytest.approx(100)
    assert "relative_mce" not in mean_corruption_error(own, with_accuracy(0.5, 0.6, 0.6, 0.6, 0.6, 0.6))


def test_what_cannot_be_compared():
    own = with_accuracy(0.9, 0.8, 0.8, 0.7, 0.7, 0.5)
    with pytest.raises(UserError, match="no error at all"):
        mean_corruption_error(own, with_accuracy(1.0, 1, 1, 1, 1, 1))
    with pytest.raises(UserError, match="others, or of other faces"):
        mean_corruption_error(own, {**own, "n": 11})


def test_unlabelled_faces_have_no_part(student, faces):
    logits, labels = corrupted_logits(student, META, faces, ("contrast",))
    assert corruption_scores(logits, labels)["n"] == 19
