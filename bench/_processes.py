"""A command that is run aside, and ended with all that it started."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path


class Process:
    """A command in a process group of its own; its output goes to a file, so that no child left behind holds us up."""

    def __init__(self, command: list[str], folder: Path, log: Path, environment: dict[str, str]):
        self.log = log
        with open(log, "w") as output:
            self.popen = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, env=environment,
            )  # fmt: skip

    def wait(self, limit: float) -> int | None:
        """The exit status; None where it ran out of time and was ended."""
        try:
            return self.popen.wait(max(0.0, limit))
        except subprocess.TimeoutExpired:
            self.end()
            return None

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def let_go(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.close()

    def last_lines(self, count: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])
