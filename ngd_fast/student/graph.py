"""Runs training steps: line by line, or as one CUDA graph that holds the whole step of one or several students."""

from collections.abc import Sequence

import torch

from ngd_fast.faces.feeds import Batch
from ngd_fast.student.kd_teacher import Teacher
from ngd_fast.student.step import StudentStep

_WARM_UP = 3  # steps before the capture: lazy initialisation, autotuning and torch.compile must be over by then


class StepRunner:
    """Calls :meth:`StudentStep.run` of every student on the same batches and the same teacher's logits of them.

    With ``use_graph`` the first call warms up on a side stream, puts every tensor back as it was, and captures; this
    and every later call copies the batch into the graph's own input and replays it. Several students run on streams
    of their own inside the one graph, so that they fill each other's gaps.
    """

    def __init__(self, steps: Sequence[StudentStep], teacher: Teacher | None = None, *, use_graph: bool):
        self.steps, self.teacher = list(steps), teacher
        self.use_graph = use_graph
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input: list[Batch] = []
        self._streams = [torch.cuda.Stream() for _ in self.steps] if use_graph and len(self.steps) > 1 else []

    def __call__(self, batches: Sequence[Batch]) -> None:
        if not self.use_graph:
            self._run(batches)
            return
        if self._graph is None:
            self._capture(batches)
        for own, given in zip(self._input, batches):
            for name, tensor in vars(own).items():
                tensor.copy_(getattr(given, name), non_blocking=True)
        self._graph.replay()

    def _capture(self, batches: Sequence[Batch]) -> None:
        self._input = [Batch(*(tensor.clone() for tensor in vars(batch).values())) for batch in batches]
        before = [snapshot(step) for step in self.steps]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._run(self._input)
        torch.cuda.current_stream().wait_stream(side)
        for step, state in zip(self.steps, before):
            restore(step, state)
            step.optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: the feed's threads may allocate and copy meanwhile; they touch nothing of the graph's.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._run(self._input)

    def _run(self, batches: Sequence[Batch]) -> None:
        logits = [None if self.teacher is None else self.teacher(batch) for batch in batches]
        if len(self.steps) == 1 or not self.use_graph:
            for step in self.steps:
                step.run(batches, logits)
            return
        main = torch.cuda.current_stream()
        for step, stream in zip(self.steps, self._streams):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                step.run(batches, logits)
        for stream in self._streams:
            main.wait_stream(stream)


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
