"""The loop: epochs of steps over one feed, for one student or for several that see the same batches.

Made by ``run``; drives ``StepRunner`` and tells each student's ``Session`` when to look, to validate and to save.
"""

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Iterator, Sequence

import torch

from ngd_fast.console import progress, say
from ngd_fast.errors import UserError, lacks_memory
from ngd_fast.faces.feeds import Feed
from ngd_fast.faces.resident import ResidentFeed
from ngd_fast.student.distributed import Ranks
from ngd_fast.student.kd_teacher import Teacher
from ngd_fast.student.schedule import train_image_size
from ngd_fast.student.session import Session
from ngd_fast.student.step_runner import StepRunner


class Trainer:
    """Trains ``sessions`` side by side; they share epochs, batch size, accumulation and how far they are.

    ``train_feed`` must leave incomplete batches out (``drop_last``): a captured step holds full ones.
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        train_feed: Feed,
        valid_feed: Feed,
        *,
        teacher: Teacher | None = None,
        ranks: Ranks,
        use_graph: bool,
    ):
        if not train_feed.drop_last:
            raise ValueError("train_feed: must leave incomplete batches out (drop_last=True)")
        self.sessions, self.train_feed, self.valid_feed, self.ranks = list(sessions), train_feed, valid_feed, ranks
        self.teacher = teacher
        self.config = self.sessions[0].config.train
        self.steps_per_epoch = train_feed.steps_per_epoch // self.config.accumulation
        self.images_per_step = train_feed.batch_size * self.config.accumulation * ranks.world_size
        self.runner = StepRunner([s.step for s in self.sessions], teacher, use_graph=use_graph)
        self._stop = self._interrupted = False
        self._text = ""

    def run(self) -> bool:
        """Train to the last epoch. False where SIGTERM stopped it; a checkpoint was written then.

        Ctrl-C writes one too and raises KeyboardInterrupt.
        """
        first = self.sessions[0].progress
        where = {(s.progress.epoch, s.progress.step) for s in self.sessions}
        if len(where) != 1:
            raise UserError("these students are not equally far, so they cannot be trained side by side")
        with self._bar(first.epoch * self.steps_per_epoch + first.step) as bar, self._until_signalled():
            for epoch in range(first.epoch, self.config.epochs):
                with self._explained():
                    finished = self._run_epoch(epoch, bar)
                if not finished and self._interrupted:
                    raise KeyboardInterrupt
                if not finished:
                    return False
        return True

    def _run_epoch(self, epoch: int, bar) -> bool:
        clock = _Clock(self.sessions[0].step.device, self.runner)
        start = self.sessions[0].progress.step
        image_size = train_image_size(self.sessions[0].config, epoch)
        if image_size != self.train_feed.image_size:
            with clock.waiting():  # faces from files are read again
                self.train_feed.set_image_size(image_size)
        if self.teacher is not None:
            self.teacher.set_epoch(epoch)
        unread, every = 0, self.config.checkpoint_every
        for step in self._steps(epoch, start, clock):
            unread += 1
            done = epoch * self.steps_per_epoch + step + 1
            looks = unread == self.config.log_every or step + 1 == self.steps_per_epoch
            saves = every is not None and done % every == 0 and step + 1 < self.steps_per_epoch
            if looks or saves or (self._stop and self.ranks.world_size == 1):
                self._look(unread, done, epoch, image_size, clock, bar)
                unread = 0
                stops = self.ranks.any(self._stop) and step + 1 < self.steps_per_epoch
                if saves or stops:
                    self._account(clock)
                    for session in self.sessions:
                        session.save()
                if stops:
                    return self._stopped(bar)
        self._account(clock)
        more = {"image_size": image_size}
        if clock.device.type == "cuda":
            more["memory_gib"] = _memory(clock.device)
        for session in self.sessions:
            session.end_epoch(self.valid_feed, more)
        best = max(self.sessions, key=lambda s: s.progress.best).progress
        bar.set_postfix_str(f"{self._text}, best {self.config.best_metric} {best.best:.4f}", refresh=False)
        self.ranks.barrier()
        if self.ranks.any(self._stop):  # after the last epoch too: a suite must not go on to its next run
            for session in self.sessions:
                session.save()
            return self._stopped(bar)
        return True

    def _steps(self, epoch: int, start: int, clock: "_Clock") -> Iterator[int]:
        """Run the epoch's steps from ``start`` on; gives the number of each."""
        feed, size = self.train_feed, self.config.accumulation
        if isinstance(feed, ResidentFeed):
            with clock.waiting():
                feed.begin_epoch(epoch, start * size)
            for step in range(start, self.steps_per_epoch):
                self.runner.run_from(feed, size)
                yield step
            return
        batches = feed.epoch(epoch, start * size)
        for step in range(start, self.steps_per_epoch):
            with clock.waiting():
                given = list(itertools.islice(batches, size))
            self.runner(given)
            yield step
        for _ in batches:  # that fill no step: DALI keeps its pipeline only if it has seen the end of the epoch
            pass

    def _look(self, steps: int, done: int, epoch: int, image_size: int, clock: "_Clock", bar) -> None:
        """Read what the device has done since the last look, and show it."""
        means = [session.read_history(steps, done) for session in self.sessions]
        clock.steps(steps * self.images_per_step)
        loss = sum(mean["loss"] for mean in means) / len(means)
        self._text = f"epoch {epoch + 1}/{self.config.epochs}, {image_size} px, loss {loss:.3f}"
        self._text += f", waiting {clock.share_waiting:.1%}"
        if clock.device.type == "cuda":
            self._text += f", {_memory(clock.device):.1f} GiB"
        bar.set_postfix_str(self._text, refresh=False)
        bar.update(steps * self.images_per_step)

    def _account(self, clock: "_Clock") -> None:
        spent = clock.take()
        for session in self.sessions:
            for name, value in spent.items():
                setattr(session.progress, name, getattr(session.progress, name) + value)

    def _stopped(self, bar) -> bool:
        bar.close()
        if self.ranks.is_main:
            at = self.sessions[0].progress
            say(f"stopped after epoch {at.epoch}, step {at.step}; a checkpoint was written, --resume continues it")
        return False

    def _bar(self, done: int):
        """A bar over all images of the run, which shows the rate and the time that is left."""
        names = "+".join(f"{s.config.name}/{s.config.seed}" for s in self.sessions)
        total = self.config.epochs * self.steps_per_epoch * self.images_per_step
        hidden = {} if self.ranks.is_main else {"disable": True}  # False would override TQDM_DISABLE
        return progress(desc=f"train {names}", total=total, unit="img", initial=done * self.images_per_step, **hidden)

    @contextlib.contextmanager
    def _until_signalled(self):
        """Within: SIGTERM and Ctrl-C ask the loop to write a checkpoint and return; a second Ctrl-C ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def ask(number, frame):
            self._stop = True
            if number == signal.SIGINT:
                self._interrupted = True
                signal.signal(signal.SIGINT, before[signal.SIGINT])

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _explained(self):
        """Within: too little memory becomes an error that says which batch to try."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            size = self.config.batch_size
            advice = "choose a smaller data.image_size or model.arch"
            if len(self.sessions) > 1:
                advice = f"train fewer than {len(self.sessions)} students side by side (--side-by-side)"
            elif size > 1:
                advice = (
                    f"try --set train.batch_size={size // 2}, with train.accumulation={2 * self.config.accumulation} "
                    "for steps on as many faces"
                )
            raise UserError(f"a batch of {size} faces does not fit in the device's memory; {advice}") from error


def _memory(device: torch.device) -> float:
    """GiB of the device's memory that PyTorch has held at most."""
    return torch.cuda.max_memory_reserved(device) / 2**30


class _Clock:
    """Seconds of an epoch without the making of graphs, and how many of them the device waited for data."""

    def __init__(self, device: torch.device, runner: StepRunner):
        self.device, self._runner = device, runner
        self._begin, self._prepared = time.perf_counter(), runner.preparing
        self._waited = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._images = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within: the host gets data, and the device waits for them.

        A GPU may still be at the last step, or wait on after the host has gone on (DALI works on a stream of its own),
        so it takes the time itself: from the end of its work so far to when the data are there.
        """
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._marks.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self._waited += time.perf_counter() - start

    def _seconds_waited(self) -> float:
        for begin, end in self._marks:
            end.synchronize()
            self._waited += begin.elapsed_time(end) / 1000
        self._marks.clear()
        return self._waited

    def steps(self, images: int) -> None:
        self._images += images

    @property
    def share_waiting(self) -> float:
        return self._seconds_waited() / self._seconds()

    def _seconds(self) -> float:
        return max(1e-9, time.perf_counter() - self._begin - (self._runner.preparing - self._prepared))

    def take(self) -> dict[str, float]:
        """What was spent since the last call; call it when the device has just been waited for."""
        spent = {
            "seconds": self._seconds(),
            "preparing": self._runner.preparing - self._prepared,
            "waited": self._seconds_waited(),
            "images": self._images,
        }
        self._begin, self._prepared = time.perf_counter(), self._runner.preparing
        self._waited, self._images = 0.0, 0
        return spent
