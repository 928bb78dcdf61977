"""The benches of the step and of training compare the same work and give whole rows; small, on the CPU."""

import pytest
import torch
from ngd_fast.bench import plain, step, train

CPU = torch.device("cpu")
SMALL = {"arch": "resnet18-w4", "teacher_arch": "resnet18-w2"}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("variant", step.VARIANTS)
def test_plain_pytorch_does_the_same_work(variant):
    """Same weights, same batch: the losses of three steps are those of ours."""
    names = ("PyTorch eager", "ngd_fast eager")
    calls = [step.make_step(name, step.Inputs(variant, 8, 24, CPU, **SMALL)) for name in names]
    with step.kept_settings():
        losses = [float(calls[0]()) for _ in range(3)]
        for _ in range(3):
            history = calls[1]()
    assert losses == pytest.approx(history[:3, 0].tolist(), rel=1e-3)
    assert losses[2] < losses[0]


def test_plain_pytorch_in_bfloat16(monkeypatch):
    """As on a GPU: autocast, and a teacher of bfloat16 weights."""
    losses = []
    for dtype in (None, torch.bfloat16):
        monkeypatch.setattr(plain, "amp_dtype", lambda device, dtype=dtype: dtype)
        losses.append(float(step.make_step("PyTorch eager", step.Inputs("B3", 8, 32, CPU, **SMALL))()))
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("variant", step.VARIANTS)
def test_step_rows(variant):
    rows = step.measure(variant, 4, 24, CPU, **SMALL, seconds=0.01)
    assert [row["implementation"] for row in rows] == ["PyTorch eager", "ngd_fast eager"] == list(step.names(CPU))
    assert all(len(cells) == len(step.COLUMNS) for cells in step.table(rows))


def test_students_of_one_graph_count_together(monkeypatch):
    monkeypatch.setitem(step.WAYS, "eager, 2 students", step.Way(False, False, 2))
    names = ["ngd_fast eager", "ngd_fast eager, 2 students"]
    one, two = step.measure("B0", 4, 24, CPU, **SMALL, seconds=0.01, implementations=names)
    assert one["images/s"] == pytest.approx(4 / one["ms"] * 1e3)
    assert two["images/s"] == pytest.approx(8 / two["ms"] * 1e3)


def test_settings_of_a_way_reach_the_step(monkeypatch):
    monkeypatch.setitem(step.WAYS, "eager, no clipping", step.Way(False, False, 1, {"train": {"clip_grad": None}}))
    inputs = step.Inputs("B0", 4, 24, CPU, **SMALL)
    assert inputs.config(step.WAYS["eager"]).train.clip_grad == 1.0
    config = inputs.config(step.WAYS["eager, no clipping"])
    assert config.train.clip_grad is None and config.train.batch_size == 4


def test_plain_views_show_the_faces():
    """Every view is closer to its own face, or to its mirror image, than to any other face."""
    coarse = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    faces = torch.nn.functional.interpolate(coarse, (48, 48), mode="bilinear")
    rows, labels = torch.tensor([3, 17, 3, 8]), torch.arange(20)
    torch.manual_seed(0)
    images, shown = plain.make_views((faces * 255).byte(), labels, rows, 40, compiled=False)()
    assert images.shape == (4, 3, 40, 40) and images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(shown, rows) and not torch.equal(images[0], images[2])
    faces = torch.nn.functional.interpolate(faces, (40, 40), mode="bilinear") - 0.5
    likeness = [images[:, 0].flatten(1) @ face.flatten(1).t() / face.norm() for face in (faces, faces.flip(3))]
    assert torch.equal(torch.maximum(*likeness).argmax(dim=1), rows)


@pytest.mark.parametrize("variant", train.VARIANTS)
def test_train_rows(variant):
    rows = train.measure(variant, 8, 24, CPU, kinds=["torch"], **SMALL, images=32, epochs=1)
    assert [(row["implementation"], row["feed"]) for row in rows] == [
        ("ngd_fast", "torch"),
        ("PyTorch eager", "on the device"),
    ]
    assert all(row["images/s"] > 0 for row in rows) and 0 < rows[0]["waiting %"] < 100
    assert all(len(cells) == len(train.COLUMNS) for cells in train.table(rows))
