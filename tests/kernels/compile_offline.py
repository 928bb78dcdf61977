"""Compiles the objective's kernels to machine code for a GPU that is not there: ``python compile_offline.py
CAPABILITY``.

Prints a JSON list: kernel, batch, dtype, registers, stack bytes (spills) and shared memory. The host code runs on CPU
tensors with Triton's driver and launch replaced, so that every kernel is compiled as it would be called. In a process
of its own, because both replacements are global.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import objective_cases as cases
import torch
import triton
from ngd_fast.kernels import objective
from triton.backends.compiler import GPUTarget

CAPABILITY = int(sys.argv[1])
MULTIPROCESSORS = 132
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Above 64 rows a multiprocessor the tiles are the largest.
SHAPES = [(128, torch.bfloat16), (128, torch.float32), (16_384, torch.bfloat16), (16_384, torch.float32)]


class AbsentGpu:
    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def usage(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "shared": kernel.metadata.shared}


compiled = []
run = triton.JITFunction.run


def compile_only(self, *args, grid, warmup, **options):
    compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **options)))


triton.JITFunction.run = compile_only
triton.runtime.driver.set_active(AbsentGpu())
objective._multiprocessors = lambda device: MULTIPROCESSORS
report = []
for B, dtype in SHAPES:
    compiled.clear()
    tensors, options = cases.arguments(B=B, dtype=dtype)
    cases.call(objective.objective_fwd, tensors, options)
    objective.scale_(tensors["features"], torch.ones(()))
    names = {"B": B, "dtype": str(dtype)}
    report += [{"kernel": name, **names, **usage(kernel)} for name, kernel in compiled]
print(json.dumps(report))
