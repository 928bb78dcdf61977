// For x86-64 with AVX-512: vectors of 64 bytes. Everything included before the pragma stays portable.
#include "objective_cpu.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define NGD_BYTES 64
#define NGD_ROWS 8
#define NGD_GRAD_ROWS 4
#define NGD_VECTORS 2
#define NGD_GRAD_VECTORS 4
#define NGD_NAME "avx512"
#define NGD_KERNELS avx512_kernels
#include "kernels.inc"
#endif
