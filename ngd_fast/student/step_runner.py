"""Runs training steps: line by line, or as one CUDA graph that holds the whole step of one or several students.

Between ``Trainer``, which says when, and ``StudentStep``, which says what.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ngd_fast.faces.feeds import Batch
from ngd_fast.faces.resident import ResidentFeed
from ngd_fast.student.kd_teacher import Teacher
from ngd_fast.student.step import StudentStep

_WARM_UP = 3  # steps before the capture: lazy initialisation, autotuning and torch.compile must be over by then


class StepRunner:
    """Calls :meth:`StudentStep.run` of every student on the same batches and the same teacher's logits of them.

    With ``use_graph`` the first step, and the first on images of another size, warms up on a side stream, puts every
    tensor back as it was, and captures; this step and every later one are replays. Several students run on streams of
    their own inside the one graph, so that they fill each other's gaps.

    A runner takes its batches in one way throughout: as arguments, or from one resident feed.
    """

    def __init__(self, steps: Sequence[StudentStep], teacher: Teacher | None = None, *, use_graph: bool):
        if use_graph and any(step.config.optimizer.sam.alternates for step in steps):
            raise ValueError("use_graph: one graph holds one kind of step, and optimizer.sam.every is above 1")
        self.steps, self.teacher = list(steps), teacher
        self.use_graph = use_graph
        self.preparing = 0.0
        """Seconds spent so far on warm-ups, compilation within them, and captures."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input: list[Batch] = []
        self._streams = [torch.cuda.Stream() for _ in self.steps] if use_graph and len(self.steps) > 1 else []

    def __call__(self, batches: Sequence[Batch]) -> None:
        """One step on ``batches``, which are copied into the graph's own input."""
        if not self.use_graph:
            self._run(batches)
            return
        if [own.images.shape for own in self._input] != [given.images.shape for given in batches]:
            self._input = [Batch(*(tensor.clone() for tensor in vars(batch).values())) for batch in batches]
            self._capture(lambda: self._run(self._input))
        for own, given in zip(self._input, batches):
            for name, tensor in vars(own).items():
                tensor.copy_(getattr(given, name), non_blocking=True)
        self._graph.replay()

    def run_from(self, feed: ResidentFeed, count: int) -> None:
        """One step on the next ``count`` batches of ``feed``, which makes them inside the step, and inside its graph.

        :meth:`ResidentFeed.begin_epoch` has said which they are; they must be full ones.
        """
        if len(self._input) != count or self._input[0].images.shape[-1] != feed.image_size:
            self._input = [feed.empty_batch() for _ in range(count)]
            if self.use_graph:
                clock = feed.clock.clone()
                self._capture(lambda: self._make_and_run(feed), rewind=lambda: feed.clock.copy_(clock))
        if self.use_graph:
            self._graph.replay()
        else:
            self._make_and_run(feed)

    def _make_and_run(self, feed: ResidentFeed) -> None:
        for batch in self._input:
            feed.capturable_step(batch)
        self._run(self._input)

    def _capture(self, step: Callable[[], None], rewind: Callable[[], object] = lambda: None) -> None:
        """Warm ``step`` up and capture it. ``rewind`` has it take the same batches again: no others may be left."""
        begin = time.perf_counter()
        self._graph = None  # one for another size of images gives its memory back first
        before = [snapshot(student) for student in self.steps]
        with _aside():
            for _ in range(_WARM_UP):
                step()
                rewind()
        for student, state in zip(self.steps, before):
            restore(student, state)
            student.optimizer.zero_grad(set_to_none=True)
        self._graph = _record(step)
        self.preparing += time.perf_counter() - begin

    def _run(self, batches: Sequence[Batch]) -> None:
        logits = [None if self.teacher is None else self.teacher(batch) for batch in batches]
        if not self._streams:
            for step in self.steps:
                step.run(batches, logits)
            return
        main = torch.cuda.current_stream()
        for stream in self._streams:
            stream.wait_stream(main)
        try:
            for step, stream in zip(self.steps, self._streams):
                with torch.cuda.stream(stream):
                    step.run(batches, logits)
        finally:  # a capture that ends without them fails too, and hides that memory ran out
            for stream in self._streams:
                main.wait_stream(stream)


@contextmanager
def _aside() -> Iterator[None]:
    """Within: a side stream, and random numbers that are put back afterwards."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.random.fork_rng([torch.cuda.current_device()]), torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


def _record(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # thread_local: the feed's threads may allocate and copy meanwhile; they touch nothing of the graph's.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph


def snapshot(step: StudentStep) -> dict:
    """Copies of everything that a step changes, for :func:`restore`."""
    return {
        "tensors": [tensor.clone() for tensor in step.tensors()],
        "optimizer": [tensor.clone() for tensor in step.optimizer_tensors()],
        "scaler": step.scaler.state_dict(),
    }


@torch.no_grad()
def restore(step: StudentStep, before: dict) -> None:
    """Put ``step`` back to a :func:`snapshot`, without moving any tensor in memory.

    An optimizer that had no state then keeps the tensors that it has made since, set to zero as it made them.
    """
    for tensor, value in zip(step.tensors(), before["tensors"], strict=True):
        tensor.copy_(value)
    if before["optimizer"]:
        for tensor, value in zip(step.optimizer_tensors(), before["optimizer"], strict=True):
            tensor.copy_(value)
    else:
        for tensor in step.optimizer_tensors():
            tensor.zero_()
    step.scaler.load_state_dict(before["scaler"])
