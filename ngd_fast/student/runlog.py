"""What a training leaves to read: one JSON object a line in log.jsonl, and TensorBoard's events.

Written by ``Session`` at each epoch's end, read by ``ngd-fast report``.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from ngd_fast.artifacts.files import parse_json, read_text, write_text
from ngd_fast.console import say
from ngd_fast.errors import UserError

LOG_NAME = "log.jsonl"


class RunLog:
    """The log of the run in ``folder``, continued after ``last_epoch`` (-1: a new one)."""

    def __init__(self, folder: str | Path, last_epoch: int = -1):
        from torch.utils.tensorboard import SummaryWriter

        self.path = Path(folder) / LOG_NAME
        # Lines of epochs that the checkpoint does not know of are written again, the same.
        kept = [line for line in self._lines() if line["epoch"] <= last_epoch]
        epochs = {line["epoch"] for line in kept}
        first = next((epoch for epoch in range(1, last_epoch + 1) if epoch not in epochs), None)
        if first is not None:
            say(f"{self.path}: lacks epochs that were trained, from epoch {first}")
        write_text(self.path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept))
        self._board = SummaryWriter(Path(folder) / "tb", purge_step=last_epoch + 1)

    def _lines(self) -> list[dict]:
        if not self.path.exists():
            return []
        lines = []
        for text in read_text(self.path).splitlines():
            try:
                line = parse_json(text, self.path)
            except UserError:  # the line during which the run was killed
                break
            if not isinstance(line, dict) or type(line.get("epoch")) is not int:
                break
            lines.append(line)
        return lines

    def epoch(self, epoch: int, values: Mapping) -> None:
        """Append an epoch's values (numbers, or one level of mappings to numbers) and sync the file to the disk."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": "epoch", "epoch": epoch, **values}, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for name, value in values.items():
            entries = value.items() if isinstance(value, Mapping) else [("", value)]
            for key, number in entries:
                if isinstance(number, int | float) and math.isfinite(number):
                    self._board.add_scalar(f"{name}/{key}" if key else f"train/{name}", number, epoch)
        self._board.flush()

    def close(self) -> None:
        self._board.close()
