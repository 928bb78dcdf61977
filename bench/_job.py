"""One process of gpu-check: ``python -m ngd_fast.bench._job JOB``, JOB being JSON: see :func:`main`.

Each row is added to the file of rows as soon as it is measured, as a line of JSON: what is cut off leaves what it had.
An error ends its call alone.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path

import torch
from ngd_fast.bench import _timing


def main(job: dict) -> int:
    """``calls``: [module, arguments of its measure] each; ``about`` goes into every row; ``copy GB/s`` may be None.

    ``inductor``: what is set in torch._inductor.config. ``gate``: see :data:`_timing.gate`; may be None.
    """
    failed = False
    _timing.gate = Path(job["gate"]) if job.get("gate") else None
    for name, value in job["inductor"].items():
        setattr(importlib.import_module("torch._inductor.config"), name, value)
    for module, arguments in job["calls"]:
        try:
            measure = importlib.import_module(f"ngd_fast.bench.{module}").measure
            rows = measure(device=torch.device(job["device"]), **arguments)
        except Exception as error:
            traceback.print_exc()
            failed, rows = True, [{"error": f"{type(error).__name__}: {error}".splitlines()[0][:300], **arguments}]
        for row in rows:
            if row.get("GB/s") and job.get("copy GB/s"):
                row["share of copy"] = round(row["GB/s"] / job["copy GB/s"], 3)
            with open(Path(job["rows"]), "a") as lines:
                lines.write(json.dumps({**job["about"], "bench": module, **row}) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
