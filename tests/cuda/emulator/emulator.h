// Runs CUDA kernels on the CPU, so that their logic is tested on machines without a GPU. Compile a .cu file with
//   g++ -std=c++17 -O1 -x c++ -include emulator.h kernel.cu
// Every thread of a block (of all blocks of a cluster) is a fiber; blocks and clusters run one after the other.
// Barriers, shuffles and votes are real: a fiber waits until the others have arrived. The order in which fibers run is
// shuffled by a seed, and shared memory starts as NaN, so a missing barrier or an unwritten value shows as a changed
// result. What a GPU would hang on (a barrier that not all threads reach) or write beyond (shared memory) aborts with a
// message. Not emulated: the memory model (fences do nothing), alignment of vector accesses, time.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define NGD_EMULATED 1

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- the two half types, as bits with conversions that round to nearest even -------------------------------------
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline uint32_t float_bits(float v) {
  uint32_t b;
  memcpy(&b, &v, 4);
  return b;
}
inline float bits_float(uint32_t b) {
  float v;
  memcpy(&v, &b, 4);
  return v;
}
inline float __bfloat162float(__nv_bfloat16 v) { return bits_float(uint32_t(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t b = float_bits(v);
  if (v != v) return {0x7fff};
  return {uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16)};
}
inline float __half2float(__half v) {
  int exponent = (v.bits >> 10) & 31, mantissa = v.bits & 1023;
  float magnitude = exponent == 0    ? std::ldexp(float(mantissa), -24)
                    : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                     : std::ldexp(float(mantissa + 1024), exponent - 25);
  return v.bits & 0x8000 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float v) {
  uint16_t sign = (float_bits(v) >> 16) & 0x8000;
  if (v != v) return {0x7fff};
  float magnitude = std::fabs(v);
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : -24, -14);
  int units = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // 1024..2048 when normal
  return {uint16_t(sign | (((exponent + 14) << 10) + units))};
}

// ---- fibers -----------------------------------------------------------------------------------------------------
inline dim3 gridDim, blockDim;

namespace emulator {

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  uint64_t arrive() {
    uint64_t mine = generation;
    if (++arrived == expected) release();
    return mine;
  }
  void leave() {
    --expected;
    if (expected > 0 && arrived == expected) release();
  }
  void release() {
    arrived = 0;
    ++generation;
  }
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][32];
};

struct Block {
  uint3 index;
  unsigned rank = 0;
  int alive = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Fiber {
  uint3 thread;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  bool started = false, done = false;
  const Barrier* waiting = nullptr;
  uint64_t seen = 0, cluster_ticket = 0;
  jmp_buf state;
  ucontext_t start;
};

struct Machine {
  int multiprocessors = 3, max_cluster = 16, capability = 90, max_shared = 227 * 1024;
  unsigned seed = 0;
};

inline Machine machine;
inline Fiber* current = nullptr;
inline Cluster* cluster = nullptr;
inline jmp_buf scheduler;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

inline void wait(const Barrier& barrier, uint64_t seen) {
  if (barrier.generation != seen) return;
  current->waiting = &barrier;
  current->seen = seen;
  if (!_setjmp(current->state)) _longjmp(scheduler, 1);
}

inline void entry() {
  body();
  Fiber* self = current;
  self->done = true;
  --self->block->alive;
  self->block->barrier.leave();
  cluster->barrier.leave();
  _longjmp(scheduler, 1);
}

constexpr size_t kStack = 128 * 1024, kCanary = 256;

inline void run_cluster(unsigned first, unsigned size, unsigned threads, size_t shared, char* stacks,
                        std::mt19937& random) {
  Cluster own;
  cluster = &own;
  own.barrier.expected = int(size * threads);
  std::vector<Fiber> fibers(size * threads);
  for (unsigned b = 0; b < size; ++b) {
    own.blocks.push_back(std::make_unique<Block>());
    Block& block = *own.blocks.back();
    unsigned flat = first + b;
    block.index = {flat % gridDim.x, flat / gridDim.x % gridDim.y, flat / (gridDim.x * gridDim.y)};
    block.rank = b;
    block.alive = block.barrier.expected = int(threads);
    block.shared.assign(shared + kCanary, 0xff);
    block.warps.resize((threads + 31) / 32);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[b * threads + t];
      fiber.thread = {t, 0, 0};
      fiber.block = &block;
      fiber.warp = &block.warps[t / 32];
      fiber.lane = int(t % 32);
      fiber.warp->barrier.expected++;
    }
  }
  std::vector<Fiber*> order;
  for (size_t i = 0; i < fibers.size(); ++i) {
    getcontext(&fibers[i].start);
    fibers[i].start.uc_stack = {stacks + i * kStack, 0, kStack};
    fibers[i].start.uc_link = nullptr;
    makecontext(&fibers[i].start, entry, 0);
    order.push_back(&fibers[i]);
  }
  while (!order.empty()) {
    if (machine.seed) std::shuffle(order.begin(), order.end(), random);
    volatile bool progress = false;
    for (volatile size_t i = 0; i < order.size(); i = i + 1) {
      Fiber& fiber = *order[i];
      if (fiber.waiting && fiber.waiting->generation == fiber.seen) continue;
      progress = true;
      fiber.waiting = nullptr;
      current = &fiber;
      if (!_setjmp(scheduler)) {
        if (fiber.started) _longjmp(fiber.state, 1);
        fiber.started = true;
        setcontext(&fiber.start);
      }
    }
    if (!progress) fail("deadlock: some threads wait at a barrier, shuffle or vote that the others never reach");
    order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->done; }), order.end());
  }
  for (auto& block : own.blocks)
    for (size_t i = shared; i < shared + kCanary; ++i)
      if (block->shared[i] != 0xff) fail("a kernel wrote beyond its shared memory");
}

// A warp-wide exchange: every lane gives a value and sees all 32.
template <typename T>
const uint64_t* exchange(T value) {
  Warp& warp = *current->warp;
  uint64_t* slots = warp.slots[warp.barrier.generation & 1];
  slots[current->lane] = 0;
  memcpy(&slots[current->lane], &value, sizeof(T));
  wait(warp.barrier, warp.barrier.arrive());
  return slots;
}

template <typename T>
T take(const uint64_t* slots, int lane) {
  T value;
  memcpy(&value, &slots[lane], sizeof(T));
  return value;
}
}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block->index)

inline void __syncthreads() {
  auto& b = emulator::current->block->barrier;
  emulator::wait(b, b.arrive());
}
inline void __syncwarp(unsigned = ~0u) {
  auto& b = emulator::current->warp->barrier;
  emulator::wait(b, b.arrive());
}
inline void __threadfence() {}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::take<T>(emulator::exchange(value), lane & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  int lane = emulator::current->lane;
  return emulator::take<T>(emulator::exchange(value), lane ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  int lane = emulator::current->lane;
  return emulator::take<T>(emulator::exchange(value), lane < delta ? lane : lane - delta);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const uint64_t* slots = emulator::exchange<int>(predicate != 0);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= unsigned(slots[lane]) << lane;
  return votes;
}
template <typename T>
T atomicAdd(T* at, T value) {
  T old = *at;
  *at = old + value;
  return old;
}
template <typename T>
T atomicOr(T* at, T value) {
  T old = *at;
  *at = old | value;
  return old;
}
template <typename T>
T __ldcg(const T* at) {
  return *at;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  uint64_t bytes = uint64_t(high) << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= unsigned(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return out;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline long long __double2ll_rn(double v) { return std::llrint(v); }
inline float __uint_as_float(unsigned v) { return bits_float(v); }
inline unsigned __float_as_uint(float v) { return float_bits(v); }

// ---- what kernels reach through device.cuh ----------------------------------------------------------------------
inline unsigned char* shared_memory() { return emulator::current->block->shared.data(); }
inline unsigned cluster_rank() { return emulator::current->block->rank; }
inline unsigned cluster_size() { return unsigned(emulator::cluster->blocks.size()); }
inline void cluster_arrive() { emulator::current->cluster_ticket = emulator::cluster->barrier.arrive(); }
inline void cluster_wait() { emulator::wait(emulator::cluster->barrier, emulator::current->cluster_ticket); }
template <typename T>
T* cluster_map(T* own, unsigned rank) {
  auto offset = reinterpret_cast<const unsigned char*>(own) - emulator::current->block->shared.data();
  emulator::Block& block = *emulator::cluster->blocks.at(rank);
  if (!block.alive) emulator::fail("shared memory of a block that has left its cluster");
  return reinterpret_cast<T*>(block.shared.data() + offset);
}
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}
inline void forget(uint32_t&) {}
inline uint32_t equal_halves(uint32_t a, uint32_t b) {
  return ((a ^ b) & 0xffff ? 0 : 0xffffu) | ((a ^ b) >> 16 ? 0 : 0xffff0000u);
}
template <typename T>
uint32_t add_pairs(uint32_t a, uint32_t b);
template <>
inline uint32_t add_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
  auto add = [](uint32_t x, uint32_t y) { return __float2bfloat16_rn(bits_float(x << 16) + bits_float(y << 16)).bits; };
  return add(a, b) | uint32_t(add(a >> 16, b >> 16)) << 16;
}
template <>
inline uint32_t add_pairs<__half>(uint32_t a, uint32_t b) {
  auto add = [](uint32_t x, uint32_t y) {
    return __float2half_rn(__half2float({uint16_t(x)}) + __half2float({uint16_t(y)})).bits;
  };
  return add(a, b) | uint32_t(add(a >> 16, b >> 16)) << 16;
}

// mma.sync.aligned.m16n8k{16,8}.row.col.f32: the lane's share of each operand as the PTX manual lays it out.
template <typename T, int kDepth>
void emulate_mma(float (&acc)[4], const uint32_t* a, const uint32_t* b, float (*widen)(T)) {
  constexpr int kA = kDepth / 4, kB = kDepth / 8;
  const uint64_t* slots[kA + kB];
  uint32_t operand[kA + kB][32];
  for (int r = 0; r < kA + kB; ++r) {
    slots[r] = emulator::exchange(r < kA ? a[r] : b[r - kA]);
    for (int lane = 0; lane < 32; ++lane) operand[r][lane] = uint32_t(slots[r][lane]);
  }
  auto element = [&](int r, int lane, int half) { return widen(T{uint16_t(operand[r][lane] >> (16 * half))}); };
  int group = emulator::current->lane / 4, member = emulator::current->lane % 4;
  for (int i = 0; i < 4; ++i) {
    int row = group + 8 * (i / 2), column = 2 * member + i % 2;
    for (int k = 0; k < kDepth; ++k) {
      int lane = k % 8 / 2;
      acc[i] +=
          element(row / 8 + 2 * (k / 8), row % 8 * 4 + lane, k % 2) * element(kA + k / 8, column * 4 + lane, k % 2);
    }
  }
}
template <typename T>
float emulate_widen(T v);
template <>
inline float emulate_widen(__half v) {
  return __half2float(v);
}
template <>
inline float emulate_widen(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
template <typename T>
void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate_mma<T, 16>(acc, a, b, emulate_widen<T>);
}
template <typename T>
void mma_16x8x8(float (&acc)[4], const uint32_t (&a)[2], uint32_t b) {
  emulate_mma<T, 8>(acc, a, &b, emulate_widen<T>);
}

#include "runtime.h"  // what it calls is above
