"""Steps whose batches the resident feed makes inside them: the same as iterating the feed, also through a capture."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from ngd_fast.faces.augment import AugmentConfig
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.feeds import make_feed
from ngd_fast.student import step_runner
from ngd_fast.student.kd_teacher import CachedTeacher
from ngd_fast.student.step_runner import StepRunner

CPU = torch.device("cpu")
CASES = {
    "one student": ("B0",),
    "two students with a teacher": ("B1", "B3"),
    "accumulation": ("B1", 2),
}


@pytest.fixture
def make_runner(make_step, files):
    """(a case of CASES) -> a runner of new students, a resident feed of 6 batches, and how many a step takes."""
    faces = Faces.load(files["train"])

    def make(case, *, use_graph=False, device=CPU):
        *names, count = (*case, 1) if isinstance(case[-1], str) else case
        ramp = ("objective.geo.schedule.start=0", "objective.geo.schedule.end=1")
        steps = [make_step(name, f"train.accumulation={count}", *ramp, device=device)[0] for name in names]
        table = torch.randn(2, len(faces), 8, generator=torch.Generator().manual_seed(0)).half().to(device)
        teacher = CachedTeacher(table, AugmentConfig.strong(), seed=1)
        feed = make_feed(
            faces,
            kind="resident",
            batch_size=16,
            image_size=24,
            train=True,
            seed=1,
            device=device,
            augment=AugmentConfig.strong(),
        )
        return StepRunner(steps, teacher, use_graph=use_graph), feed, count

    return make


SIZES = (20, 24)


def run_epochs(runner, feed, count, first=0):
    """An epoch (of six batches) at 20 px, from batch ``first`` on, and one at 24, made inside the steps.

    Returns the rows of each batch. Asks the device nothing before the end: the second epoch begins while steps of the
    first may still be on their way.
    """
    rows = []
    for epoch, size in enumerate(SIZES):
        feed.set_image_size(size)
        runner.teacher.set_epoch(epoch)
        start = first if epoch == 0 else 0
        feed.begin_epoch(epoch, start)
        for _ in range((6 - start) // count):
            runner.run_from(feed, count)
            rows += [batch.index.clone() for batch in runner._input]
    return [index.tolist() for index in rows]


def iterate_epochs(runner, feed, count, first=0):
    rows = []
    for epoch, size in enumerate(SIZES):
        feed.set_image_size(size)
        runner.teacher.set_epoch(epoch)
        batches = list(feed.epoch(epoch, first if epoch == 0 else 0))
        rows += [batch.index.tolist() for batch in batches]
        for i in range(0, len(batches), count):
            runner(batches[i : i + count])
    return rows


def assert_equal_students(one, other):
    for a, b in zip(one.steps, other.steps, strict=True):
        assert int(a.step) == int(b.step) > 0
        assert torch.equal(a.history, b.history)
        for name, value in a.student.state_dict().items():
            assert torch.equal(value, b.student.state_dict()[name]), name
        for ours, theirs in zip(a.optimizer_tensors(), b.optimizer_tensors(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("first", [0, 4])
def test_batches_made_in_the_step_train_the_same_weights(make_runner, case, first):
    one, other = make_runner(case), make_runner(case)
    assert run_epochs(*one, first) == iterate_epochs(*other, first)
    assert_equal_students(one[0], other[0])


@pytest.fixture
def graphs_without_a_gpu(monkeypatch):
    """A "graph" that runs its step line by line when replayed: what surrounds a capture is what is tested."""
    monkeypatch.setattr(step_runner, "_aside", nullcontext)
    monkeypatch.setattr(step_runner, "_record", lambda step: SimpleNamespace(replay=step))


@pytest.mark.parametrize("case", [CASES["one student"], CASES["accumulation"]], ids=["one student", "accumulation"])
@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.usefixtures("graphs_without_a_gpu")
def test_warm_up_leaves_no_trace(make_runner, case, first):
    """From batch 4 of 6 on the warm-up would run over the epoch's end if it went on from batch to batch."""
    captured, eager = make_runner(case, use_graph=True), make_runner(case)
    assert run_epochs(*captured, first) == run_epochs(*eager, first)
    assert_equal_students(captured[0], eager[0])


@pytest.mark.usefixtures("graphs_without_a_gpu")
def test_given_batches_are_copied_into_the_graphs_input(make_runner):
    captured, eager = make_runner(CASES["accumulation"], use_graph=True), make_runner(CASES["accumulation"])
    assert iterate_epochs(*captured) == iterate_epochs(*eager)
    assert_equal_students(captured[0], eager[0])


def test_streams_are_joined_where_a_step_fails(monkeypatch):
    class Stream:
        def __init__(self):
            self.waited_for = []

        def wait_stream(self, other):
            self.waited_for.append(other)

    class Step:
        def run(self, batches, logits):
            raise torch.OutOfMemoryError("full")

    main = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    runner = StepRunner([Step(), Step()], use_graph=False)
    runner._streams = [Stream(), Stream()]
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        runner([])
    assert main.waited_for == runner._streams
    assert all(stream.waited_for == [main] for stream in runner._streams)


@pytest.mark.gpu
def test_memory_that_runs_out_in_a_capture_is_named(make_step, make_batches, monkeypatch):
    device = torch.device("cuda")
    steps = [make_step("B0", device=device)[0] for _ in range(2)]
    run = steps[0].run

    def fail(*args):
        run(*args)
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(steps[0], "run", fail)
    stream = torch.cuda.current_stream()
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        StepRunner(steps, use_graph=True)(make_batches(1, 16, device=device))
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("first", [0, 4])
def test_graph_makes_the_eager_batches_and_learns_the_same(make_runner, case, first, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    device = torch.device("cuda")
    captured, eager = make_runner(case, use_graph=True, device=device), make_runner(case, device=device)
    assert run_epochs(*captured, first) == run_epochs(*eager, first)
    assert captured[1].clock.tolist() == [1, 6]
    for a, b in zip(captured[0].steps, eager[0].steps):
        assert int(a.step) == int(b.step)
        # Losses of other batches, or of a step made twice, would differ in the first digits.
        torch.testing.assert_close(a.history, b.history, rtol=1e-4, atol=1e-5)
