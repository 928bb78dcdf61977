// For any machine: vectors of 16 bytes (SSE2, NEON).
#include "objective_cpu.h"

#define NGD_BYTES 16
#define NGD_ROWS 4
#define NGD_GRAD_ROWS 4
#define NGD_VECTORS 2
#define NGD_GRAD_VECTORS 2
#define NGD_NAME "baseline"
#define NGD_KERNELS baseline_kernels
#include "kernels.inc"
