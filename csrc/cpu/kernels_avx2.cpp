// For x86-64 with AVX2 and FMA: vectors of 32 bytes. Everything included before the pragma stays portable.
#include "objective_cpu.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define NGD_BYTES 32
#define NGD_ROWS 4
#define NGD_GRAD_ROWS 4
#define NGD_VECTORS 3
#define NGD_GRAD_VECTORS 3
#define NGD_NAME "avx2"
#define NGD_KERNELS avx2_kernels
#include "kernels.inc"
#endif
