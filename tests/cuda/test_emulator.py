"""The emulator itself: it must show the faults that it is there to show."""

import subprocess

import pytest
from emulated import CHECKS, HERE, compiler_or_skip

PROGRAM = r"""
__device__ int* words() { return reinterpret_cast<int*>(shared_memory()); }
__global__ void reverse(int* out, int synchronise) {
  words()[threadIdx.x] = int(threadIdx.x);
  if (synchronise) __syncthreads();
  out[threadIdx.x] = words()[blockDim.x - 1 - threadIdx.x];
}
__global__ void half_a_barrier(int*, int) { if (threadIdx.x < 7) __syncthreads(); else __syncwarp(); }
__global__ void beyond(int*, int) { shared_memory()[blockDim.x * 4] = 1; }
__global__ void leaves_early(int* out, int) {
  if (cluster_rank() == 1) return;
  cluster_arrive();
  cluster_wait();
  out[threadIdx.x] = *cluster_map(words(), 1u);
}
__global__ void warp_sums(int* out, int) {
  int v = int(threadIdx.x);
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  out[threadIdx.x] = v;
}
__global__ void diverged(int* out, int) {
  out[threadIdx.x] = threadIdx.x % 2 ? __shfl_sync(~0u, 1, 0) : __shfl_xor_sync(~0u, 2, 1);
}
// A shuffle is no barrier of memory.
__global__ void neighbour(int* out, int synchronise) {
  words()[threadIdx.x] = __shfl_xor_sync(~0u, int(threadIdx.x), 1);
  if (synchronise) __syncwarp(); else __shfl_xor_sync(~0u, 0, 1);
  out[threadIdx.x] = words()[threadIdx.x ^ 1];
}
__global__ void unwritten(int* out, int) { out[threadIdx.x] = words()[threadIdx.x]; }
__global__ void misaligned(int* out, int) {
  uint4 v = *reinterpret_cast<uint4*>(out + 1);
  out[0] = int(v.x + v.y + v.z + v.w);
}
__global__ void past_the_end(int* out, int) { out[192 + threadIdx.x] = 0; }
// The block that comes last reads what the others left; out[0] counts them.
__global__ void last_block(int* out, int fence) {
  if (threadIdx.x) return;
  out[1 + blockIdx.x] = 1;
  if (fence) __threadfence();
  if (atomicAdd(out, 1) != int(gridDim.x) - 1) return;
  if (fence) __threadfence();
  out[64] = out[1] + out[2];
}
__global__ void swap(int* out, int wait) {  // with the other block of the cluster
  words()[threadIdx.x] = int(cluster_rank());
  cluster_arrive();
  if (wait) cluster_wait();
  out[64 * cluster_rank() + threadIdx.x] = *cluster_map(words() + threadIdx.x, 1 - cluster_rank());
  cluster_arrive();
  cluster_wait();
}
__global__ void first(int* out, int) { let_next_kernel_start(); out[threadIdx.x] = 1; }
__global__ void second(int* out, int wait) {
  let_next_kernel_start();
  if (wait) wait_for_previous_kernel();
  out[64 + threadIdx.x] = out[threadIdx.x];
}
__global__ void third(int* out, int wait) {  // starts when `second` has started, maybe before `first` has ended
  if (!wait) out[128] = out[threadIdx.x];
  wait_for_previous_kernel();
}

using Kernel = void (*)(int*, int);
const struct { const char* name; Kernel kernel; int blocks, cluster; } kTests[] = {
  {"reverse", reverse, 1, 1}, {"half a barrier", half_a_barrier, 1, 1}, {"beyond", beyond, 1, 1},
  {"leaves early", leaves_early, 2, 2}, {"warp sums", warp_sums, 1, 1}, {"diverged", diverged, 1, 1},
  {"neighbour", neighbour, 1, 1}, {"unwritten", unwritten, 1, 1}, {"misaligned", misaligned, 1, 1},
  {"past the end", past_the_end, 1, 1}, {"last block", last_block, 2, 1}, {"swap", swap, 2, 2},
};
extern "C" void watch(const void*, size_t, bool, const char*);
extern "C" const char* faults();

int launch(Kernel kernel, int* out, int blocks, int cluster, int option, bool overlap = false) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = overlap;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config;
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = 64 * sizeof(int);
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, out, option);
}

int main(int, char** words) {  // name, option, seed
  alignas(16) static int out[256] = {};
  watch(out, 192 * sizeof(int), true, "out");
  int option = atoi(words[2]), error = 0;
  emulator::machine.seed = unsigned(atoi(words[3]));
  for (auto& test : kTests)
    if (!strcmp(words[1], test.name)) error = launch(test.kernel, out, test.blocks, test.cluster, option);
  if (!strcmp(words[1], "two kernels"))
    error = launch(first, out, 1, 1, 0) | launch(second, out, 1, 1, option, true);
  if (!strcmp(words[1], "three kernels"))
    error = launch(first, out, 1, 1, 0) | launch(second, out, 1, 1, 1, true) | launch(third, out, 1, 1, option, true);
  for (int v : out) std::printf("%d ", v);
  std::fputs(faults(), stderr);
  return error;
}
"""


def build(folder, checks):
    compiler = compiler_or_skip()
    (folder / "program.cu").write_text(PROGRAM)
    command = [compiler, "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-x", "c++", "-include", HERE / "emulator.h"]
    subprocess.run([*command, *checks, "-c", folder / "program.cu", "-o", folder / "program.o"], check=True)
    objects = [folder / "program.o", HERE / "emulator.cpp", HERE / "checks.cpp"]
    subprocess.run([compiler, "-std=c++17", "-O1", *objects, "-ldl", "-o", folder / "program"], check=True)

    def run(name, option=1, seed=0):
        result = subprocess.run([folder / "program", name, str(option), str(seed)], capture_output=True, text=True)
        return result.stdout.split(), result.stderr

    return run


@pytest.fixture(scope="module")
def plain_program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("plain_program"), [])


@pytest.fixture(scope="module")
def checked_program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("checked_program"), CHECKS)


@pytest.fixture(params=["plain", "checked"])
def program(request):
    return request.getfixturevalue(f"{request.param}_program")


@pytest.mark.parametrize("seed", range(4))
def test_right_programs(program, seed):
    reverse = [str(i) for i in range(63, -1, -1)]
    sums = [str(sum(range(32)))] * 32 + [str(sum(range(32, 64)))] * 32
    for name, want in (
        ("reverse", reverse), ("warp sums", sums), ("neighbour", [str(i) for i in range(64)]),
        ("swap", ["1"] * 64 + ["0"] * 64), ("two kernels", ["1"] * 128), ("three kernels", ["1"] * 128),
    ):  # fmt: skip
        values, faults = program(name, 1, seed)
        assert values[: len(want)] == want
        assert not faults
    values, faults = program("last block", 1, seed)
    assert values[64] == "2" and not faults


def test_a_missing_barrier_shows_in_the_result(program):
    results = [program("reverse", 0, seed)[0] for seed in range(4)]
    assert all("-1" in result for result in results)  # read before it was written: all bits set
    assert len({tuple(result) for result in results}) > 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half a barrier", "deadlock"),
        ("leaves early", "left its cluster"),
        ("diverged", "different warp operations"),
        ("beyond", "beyond"),
    ],
)
def test_faults_that_always_show(program, name, message):
    assert message in program(name)[1]


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("reverse", 0, "race: "),
        ("neighbour", 0, "race: "),
        ("last block", 0, "race: read"),
        ("swap", 0, "race: "),
        ("two kernels", 0, "an earlier kernel's write"),
        ("two kernels", 0, "never waited"),
        ("three kernels", 0, "an earlier kernel's write"),
        ("unwritten", 1, "nobody wrote"),
        ("misaligned", 1, "misaligned"),
        ("past the end", 1, "no device buffer"),
        ("beyond", 1, "beyond shared memory"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_faults_that_checks_find(checked_program, name, option, message, seed):
    assert message in checked_program(name, option, seed)[1]
