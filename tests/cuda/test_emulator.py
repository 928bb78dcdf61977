"""The emulator itself: it must show the faults that it is there to show."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

EMULATOR = Path(__file__).parent / "emulator"
PROGRAM = r"""
__global__ void reverse(int* out, bool synchronise) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = int(threadIdx.x);
  if (synchronise) __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}
__global__ void half_a_barrier(int*, bool) { if (threadIdx.x < 7) __syncthreads(); else __syncwarp(); }
__global__ void beyond(int*, bool) { shared_memory()[blockDim.x * 4] = 1; }
__global__ void leaves_early(int* out, bool) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  if (cluster_rank() == 1) return;
  cluster_arrive();
  cluster_wait();
  out[threadIdx.x] = *cluster_map(shared, 1u);
}
__global__ void warp_sums(int* out, bool) {
  int v = int(threadIdx.x);
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  out[threadIdx.x] = v;
}
int main(int count, char** words) {
  int out[64] = {};
  cudaLaunchAttribute pair;
  pair.id = cudaLaunchAttributeClusterDimension;
  pair.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config;
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = 64 * sizeof(int);
  emulator::machine.seed = unsigned(atoi(words[2]));
  auto kernel = reverse;
  switch (words[1][0]) {
    case 'h': kernel = half_a_barrier; break;
    case 'b': kernel = beyond; break;
    case 'w': kernel = warp_sums; break;
    case 'l': kernel = leaves_early; config.attrs = &pair; config.numAttrs = 1; config.gridDim = dim3(2); break;
  }
  int error = cudaLaunchKernelEx(&config, kernel, out, words[1][0] != 'm');
  for (int v : out) std::printf("%d ", v);
  return error + count - 3;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("program")
    (folder / "program.cu").write_text(PROGRAM)
    command = [compiler, "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-x", "c++", "-include", EMULATOR / "emulator.h"]
    subprocess.run([*command, folder / "program.cu", "-o", folder / "program"], check=True)
    return lambda mode, seed=0: subprocess.run([folder / "program", mode, str(seed)], capture_output=True, text=True)


def test_barrier(program):
    for seed in range(4):
        assert program("reverse", seed).stdout.split() == [str(i) for i in range(63, -1, -1)]


def test_a_missing_barrier_shows(program):
    results = [program("missing", seed).stdout for seed in range(4)]
    assert all("-1" in result.split() for result in results)  # read before it was written: all bits set
    assert len(set(results)) > 1


@pytest.mark.parametrize(
    ("mode", "message"),
    [("half", "deadlock"), ("beyond", "beyond its shared memory"), ("leaves early", "left its cluster")],
)
def test_faults_abort(program, mode, message):
    result = program(mode)
    assert result.returncode != 0
    assert message in result.stderr


def test_shuffles(program):
    assert program("warp", 3).stdout.split() == [str(sum(range(32)))] * 32 + [str(sum(range(32, 64)))] * 32
