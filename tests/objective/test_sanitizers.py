"""The C++ backend's kernels and their scratch under AddressSanitizer and UBSan, for each instruction set."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

FLAGS = ["-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
CASES = "400"
# GCC bug 110027: the fake stack of this check, which is on by default since GCC 13, misaligns variables of 64 bytes
# where the compiler guards the stack, as Ubuntu's does unasked. Aligned AVX-512 accesses of correct code then end in a
# SEGV. What is given up: to find a variable that is used after its function has returned.
OPTIONS = "detect_stack_use_after_return=0"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program(repository, tmp_path_factory):
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler} was not found")
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "empty.cpp").write_text("int main() {}\n")
    probe = subprocess.run(
        [compiler, *FLAGS, folder / "empty.cpp", "-o", folder / "empty"], capture_output=True, text=True
    )
    if probe.returncode or subprocess.run([folder / "empty"], capture_output=True).returncode:
        pytest.skip(f"{compiler} has no -fsanitize=address,undefined that works here: {probe.stderr.strip()[:200]}")

    def compile_one(source):
        to = folder / f"{source.stem}.o"
        command = [compiler, *FLAGS, "-c", f"-I{repository / 'csrc'}", source, "-o", to]
        subprocess.run(command, check=True, capture_output=True)
        return to

    sources = [*(repository / "csrc" / "cpu").glob("kernels*.cpp"), repository / "tests/objective/sanitized.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([compiler, *FLAGS, *objects, "-o", folder / "sanitized"], check=True, capture_output=True)
    return folder / "sanitized"


@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
def test_no_access_out_of_bounds_and_nothing_undefined(program, instructions):
    given = os.environ.get("ASAN_OPTIONS")
    environment = {**os.environ, "ASAN_OPTIONS": f"{given}:{OPTIONS}" if given else OPTIONS}
    done = subprocess.run([program, instructions, CASES], capture_output=True, text=True, env=environment)
    if "this machine has" in done.stderr:
        pytest.skip(f"this machine has no {instructions}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout == f"{CASES} cases\n"
