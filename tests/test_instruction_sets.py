"""The core of the suite once more, as on a processor a step below this one: two instruction sets on any machine."""

import os
import subprocess
import sys

import pytest

from ngd_fast.objective import backends

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(backends.why_not("cpu")), reason=backends.why_not("cpu")),
]

# PyTorch's own kernels, oneDNN's, ours.
BELOW = {
    "avx512": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "NGD_FAST_CPU_ISA": "avx2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX", "NGD_FAST_CPU_ISA": "baseline"},
}
CORE = ["objective/test_fused.py", "objective/test_gradients.py", "student/test_networks.py", "student/test_step.py"]


def test_core_on_the_instruction_set_below(repository):
    from ngd_fast import _C

    if _C.instruction_set() not in BELOW:
        pytest.skip(f"there is none below {_C.instruction_set()}")
    held = BELOW[_C.instruction_set()]
    code = "import torch; from ngd_fast import _C; print(_C.instruction_set(), torch.backends.cpu.get_cpu_capability())"
    environment = {**os.environ, **held, "MALLOC_PERTURB_": "85"}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert said.lower().split() == [held["NGD_FAST_CPU_ISA"], held["ATEN_CPU_CAPABILITY"]]
    core = [repository / "tests" / name for name in CORE]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not triton", *core]
    done = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " passed" in done.stdout


def test_code_compiled_for_another_instruction_set_is_not_taken(tmp_path):
    """PyTorch keeps what it compiles in a folder that processes, and machines, share."""
    code = """if True:
        import torch
        from ngd_fast.devices import torch_compile
        call = lambda x: (x.exp() * x.sin()).sum(-1, keepdim=True) + 3 * x
        compiled, x = torch_compile(call), torch.randn(37, 131, dtype=torch.float32)
        for _ in range(100):
            torch.testing.assert_close(compiled(x), call(x), atol=1e-3, rtol=1e-3)
        """
    for held in ("avx2", None, "avx2", "default"):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        if held:
            environment["ATEN_CPU_CAPABILITY"] = held
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (held, done.stderr[-2000:])
