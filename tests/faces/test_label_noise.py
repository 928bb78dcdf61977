"""Wrong labels on purpose: whose, which instead, the same for every feed, and nothing else of the data changes."""

import numpy as np
import pytest
import torch

from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.feeds import make_feed
from ngd_fast.faces.label_noise import with_label_noise
from ngd_fast.synthetic.faces import make_faces


@pytest.fixture(scope="module")
def many():
    """4000 faces of 2 x 2 pixels; raters' distributions; every tenth has no label."""
    rng = np.random.default_rng(0)
    dist = rng.dirichlet(np.ones(8), 4000).astype(np.float32)
    dist[::10] = 0
    return Faces(images=np.zeros((4000, 2, 2), np.uint8), label_dist=dist, names=[f"f{i}" for i in range(4000)])


def test_off_is_the_same_object(many):
    assert with_label_noise(many, 0.0, 1) is many


def test_the_fraction_is_close_and_repeats(many):
    labelled = many.labels >= 0
    for fraction in (0.05, 0.2, 0.6, 0.95):
        noisy = with_label_noise(many, fraction, 1)
        wrong = noisy.labels != many.labels
        deviation = np.sqrt(fraction * (1 - fraction) / labelled.sum())
        assert abs(wrong.sum() / labelled.sum() - fraction) < 4 * deviation
        assert not wrong[~labelled].any() and not noisy.label_dist[~labelled].any()
        again = with_label_noise(many, fraction, 1)
        assert np.array_equal(again.labels, noisy.labels) and np.array_equal(again.label_dist, noisy.label_dist)
    wrong = np.flatnonzero(with_label_noise(many, 0.2, 1).labels != many.labels)
    assert len(wrong) == 721 and wrong[:5].tolist() == [4, 8, 9, 11, 15]


def test_each_other_class_is_as_likely_and_the_own_never(many):
    noisy = with_label_noise(many, 0.9, 1)
    wrong = np.flatnonzero(noisy.labels != many.labels)
    assert np.array_equal(noisy.label_dist[wrong], np.eye(8, dtype=np.float32)[noisy.labels[wrong]])
    steps = np.bincount((noisy.labels - many.labels)[wrong] % 8, minlength=8)
    assert steps[0] == 0 and abs(steps[1:] / len(wrong) - 1 / 7).max() < 4 * np.sqrt(6 / 49 / len(wrong))
    kept = np.flatnonzero(noisy.labels == many.labels)
    assert np.array_equal(noisy.label_dist[kept], many.label_dist[kept])


def test_another_seed_takes_other_faces_and_a_larger_fraction_more_of_the_same(many):
    wrong = {s: with_label_noise(many, 0.3, s).labels != many.labels for s in (1, 2, 2**33)}
    for a, b in ((1, 2), (1, 2**33)):
        both = (wrong[a] & wrong[b]).sum() / (many.labels >= 0).sum()
        assert abs(both - 0.09) < 0.02
    assert not (wrong[1] & ~(with_label_noise(many, 0.4, 1).labels != many.labels)).any()


def test_the_data_stay_what_they_were(many):
    before = many.labels.copy(), many.label_dist.copy()
    noisy = with_label_noise(many, 0.3, 1)
    assert np.array_equal(before[0], many.labels) and np.array_equal(before[1], many.label_dist)
    assert noisy.images is many.images and noisy.names == many.names and noisy.checksum == many.checksum
    rows = np.arange(3, 50)
    part = noisy.subset(rows)
    assert part.checksum == many.subset(rows).checksum != many.checksum
    assert np.array_equal(part.labels, noisy.labels[rows])
    # The data's own change still shows.
    other = Faces(images=many.images, label_dist=noisy.label_dist, labels=noisy.labels)
    assert other.checksum != many.checksum
    with pytest.raises(ValueError, match=r"fraction: must be from 0 to below 1, is 1\.0"):
        with_label_noise(many, 1.0, 1)


@pytest.mark.parametrize("draw_labels", [False, True])
def test_every_feed_hands_over_the_same_labels(draw_labels):
    pytest.importorskip("nvidia.dali")
    noisy = with_label_noise(make_faces(52, 3), 0.4, 7)
    options = {"batch_size": 16, "image_size": 40, "train": True, "seed": 7, "draw_labels": draw_labels}
    feeds = [make_feed(noisy, kind=kind, device="cpu", **options) for kind in ("torch", "resident", "dali")]
    for batches in zip(*(feed.epoch(1) for feed in feeds), strict=True):
        rows = batches[0].index.numpy()
        assert np.array_equal(batches[0].labels, noisy.labels[rows])
        wrong = noisy.labels[rows] != noisy.true[1][rows]
        assert wrong.any() and np.array_equal(batches[0].target_dist[wrong], noisy.label_dist[rows[wrong]])
        for other in batches[1:]:
            for name in ("labels", "target_dist", "index"):
                assert torch.equal(getattr(batches[0], name), getattr(other, name)), name
    feeds[-1].close()
