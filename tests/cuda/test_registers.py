"""No kernel of the fast shapes spills registers, as ptxas reports it. NGD_FAST_PTXAS_ARCHS="80 86 89 90 100 120" asks
for more architectures than the one that the tests have time for; `pytest -rA` then shows the registers of each kernel.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FAST = {
    "objective_rows": ("rows_mma", "rows_ffma"),
    "objective_sums": ("prepare", "class_sums_256", "export_sums", "scale"),
    "objective_small": ("small_objective",),
    "stem_forward": ("stem_moments", "stem_prepare", "stem_pool"),
    "stem_backward": ("stem_products", "stem_finish"),
}
FUNCTION = re.compile(
    r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r"(?:\s+ptxas info\s*: Used (\d+) registers)?"
)


@pytest.fixture(scope="module")
def nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    path = os.pathsep.join(f"{home}/bin" for home in [*homes, "/usr/local/cuda"])
    found = shutil.which("nvcc", path=path) or shutil.which("nvcc")
    if found is None:
        pytest.skip("needs nvcc")
    return found


@pytest.mark.parametrize("arch", os.environ.get("NGD_FAST_PTXAS_ARCHS", "90").split())
@pytest.mark.parametrize("source", FAST)
def test_no_spills(nvcc, source, arch, tmp_path):
    # the options of setup.py: others give other registers
    options = ["-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]
    command = [nvcc, *options, "-I", CSRC, CSRC / "cuda" / f"{source}.cu", "-o", tmp_path / "kernels.cubin"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    functions = FUNCTION.findall(result.stdout + result.stderr)
    # Mangled names: the name's length, the name, I for template arguments. Functions that a kernel calls have reports
    # of their own and must not spill either; the kernels of all shapes may.
    for kernel in FAST[source]:
        assert any(f"{len(kernel)}{kernel}I" in name for name, *_ in functions), f"no report on {kernel}"
    for name, stack, stores, loads, registers in functions:
        print(f"sm_{arch} {name}: {registers or '?'} registers, {stack} bytes of stack, spills {stores}/{loads}")
    spills = [name for name, _, stores, loads, _ in functions if (stores, loads) != ("0", "0")]
    assert not [name for name in spills if "general" not in name]
