// Runs CUDA kernels on the CPU, so that their logic is tested on machines without a GPU. Compile each .cu file with
//   g++ -std=c++17 -O1 -x c++ -include emulator.h -c kernel.cu
// and link with emulator.cpp and checks.cpp. Every thread of a block (of all blocks of a cluster) is a fiber; blocks
// and clusters run one after the other. Barriers, shuffles and votes are real: a fiber waits until the others have
// arrived. The order in which fibers run is shuffled by a seed, and shared memory starts as NaN, so a missing barrier
// or an unwritten value shows as a changed result. A launch that a GPU would refuse is refused; one that it would hang
// on (a barrier that not all threads reach) or that writes beyond its shared memory is given up, and `faults` says why.
// checks.cpp finds what need not show in a result, in kernels compiled with its options. Not emulated: time, caches,
// float rounding of the tensor cores' sums.
#pragma once
#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define NGD_EMULATED 1
// Not seen by checks.cpp; it then needs to be told.
#define NGD_UNCHECKED __attribute__((noinline, no_sanitize("thread", "undefined")))

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

// ---- the machine (emulator.cpp) -----------------------------------------------------------------------------------
extern dim3 gridDim, blockDim;

namespace emulator {

struct Machine {
  int multiprocessors = 3, max_cluster = 16, capability = 90, max_shared = 227 * 1024;
  unsigned seed = 0;
  int compiled = 90;  // the architecture that the kernels were compiled for
};
extern Machine machine;
int device();  // each machine is another device to the launch functions, which remember what fits one

struct Launch {
  dim3 grid, block;
  size_t shared = 0;
  unsigned cluster = 1;  // blocks
  bool overlap = false;  // may start before the kernel before it has ended
};
struct Function {  // what cudaFuncSetAttribute changes, of a kernel on a device
  int shared = 48 * 1024;
  bool large_clusters = false;
};
Function& function(const void* kernel);
bool run(const Launch& launch, const void* kernel, void (*call)(void*), void* context);  // false: refused

uint3 thread_index();
uint3 block_index();
int lane();
uint64_t shuffle(uint64_t value, unsigned mask, int from);  // what lane `from` gave
unsigned ballot(unsigned mask, bool predicate);
void mma(float* acc, const uint32_t* a, const uint32_t* b, int depth, float (*widen)(uint16_t));
unsigned cluster_rank_of();
unsigned cluster_blocks();
unsigned char* shared_base();
unsigned char* shared_base_of(unsigned rank);
void grid_wait();
void grid_trigger();
void atomic(const void* at, size_t bytes);  // tells checks.cpp of an atomic on device memory

template <typename T>
__forceinline__ T shuffled(T value, unsigned mask, int from) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(bits, mask, from);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())

void __syncthreads();
void __syncwarp(unsigned mask = ~0u);
void __threadfence();
template <typename T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::shuffled(value, mask, lane & 31);
}
template <typename T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulator::shuffled(value, mask, emulator::lane() ^ bits);
}
template <typename T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, int delta) {
  int lane = emulator::lane();
  return emulator::shuffled(value, mask, lane < delta ? lane : lane - delta);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) { return emulator::ballot(mask, predicate); }
template <typename T>
NGD_UNCHECKED T atomicAdd(T* at, T value) {
  emulator::atomic(at, sizeof(T));
  T old = *at;
  *at = old + value;
  return old;
}
template <typename T>
NGD_UNCHECKED T atomicOr(T* at, T value) {
  emulator::atomic(at, sizeof(T));
  T old = *at;
  *at = old | value;
  return old;
}
template <typename T>
__forceinline__ T __ldcg(const T* at) {
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
inline unsigned char* shared_memory() { return emulator::shared_base(); }
inline unsigned cluster_rank() { return emulator::cluster_rank_of(); }
inline unsigned cluster_size() { return emulator::cluster_blocks(); }
void cluster_arrive();
void cluster_wait();
template <typename T>
T* cluster_map(T* own, unsigned rank) {
  auto offset = reinterpret_cast<const unsigned char*>(own) - emulator::shared_base();
  return reinterpret_cast<T*>(emulator::shared_base_of(rank) + offset);
}
inline void wait_for_previous_kernel() { emulator::grid_wait(); }
inline void let_next_kernel_start() { emulator::grid_trigger(); }
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

template <typename T>
float widen_bits(uint16_t bits);
template <>
inline float widen_bits<__half>(uint16_t bits) {
  return __half2float({bits});
}
template <>
inline float widen_bits<__nv_bfloat16>(uint16_t bits) {
  return __bfloat162float({bits});
}
template <typename T>
__forceinline__ void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(acc, a, b, 16, widen_bits<T>);
}
template <typename T>
__forceinline__ void mma_16x8x8(float (&acc)[4], const uint32_t (&a)[2], uint32_t b) {
  emulator::mma(acc, a, &b, 8, widen_bits<T>);
}

#include "runtime.h"  // what it calls is above
