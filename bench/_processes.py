"""A command that is run aside, and ended with all that it started."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

# The command's group also holds a watcher. Its standard input is ours to hold open: when we are gone, killed even, it
# ends, and the watcher ends the group. A command in the background would have no standard input, so 3 is the pipe.
_WATCHED = '(read -r line <&3; kill -KILL 0) >/dev/null 2>&1 & exec 3<&-; exec "$@"'


class Process:
    """A command in a process group of its own; its output goes to a file, so that no child left behind holds us up.

    Neither it nor what it starts in its group outlives :meth:`wait`, :meth:`end`, or the process that made it.
    """

    def __init__(self, command: list[str], folder: Path, log: Path, environment: dict[str, str]):
        self.log = log
        # Not a session: who ends ours then ends it too.
        group = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
        with open(log, "w") as output:
            self.popen = subprocess.Popen(
                ["sh", "-c", f"exec 3<&0 </dev/null; {_WATCHED}", "sh", *map(str, command)], cwd=folder,
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment, **group,
            )  # fmt: skip

    def wait(self, limit: float) -> int | None:
        """The exit status; None where it ran out of time and was ended."""
        try:
            status = self.popen.wait(max(0.0, limit))
        except subprocess.TimeoutExpired:
            status = None
        self.end()
        return status

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.popen.stdin.close()

    def last_lines(self, count: int = 40) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()[-count:]
