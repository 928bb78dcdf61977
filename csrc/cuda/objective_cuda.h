// The fused objective on a GPU: plain pointers in, one launch function for each op. No ATen, so that nvcc needs
// seconds.
//
// Which kernels run (B rows, D features, C classes, K prototypes):
// - small (objective_small.cu): D=256, C<=8, K<=32, not float64, and B small enough that the features and their
//   gradients fit the shared memory of one cluster of 16 (or 8) blocks; compute capability 9.0 and later. One launch.
// - large (objective_sums.cu, objective_rows.cu): D=256, C<=8, K<=32: prepare, class sums, rows; three launches that
//   overlap. Similarities and gradients by tensor cores for bfloat16 features, by FFMA for the others (TF32
//   would miss the 1e-5 asked for).
// - general (objective_sums.cu, objective_general.cu): every other shape up to D=2048, C=64, K=256, and float64:
//   prepare, class sums, class gradients, rows.
//
// Floor of the large path at B=262,144, bfloat16, D=256: the features are read twice, because D-Geo's gradient of any
// row needs the sums over all of them, and the gradient is written once: 3 x 134 MB; logits, teacher, target, labels
// and the logits' gradient add 17 MB: 0.42 GB, 99 us at the 4.23 TB/s that a copy reaches on an H200. The rows kernel
// begins with the rows read last, of which L2 still holds some. Arithmetic: 2 x 262,144 x 256 x 40 multiply-adds = 5.4
// T, some 10 us of mma.sync; class sums in FFMA, about 15 us of issue slots beside 32 us of reading.
//
// Bit-identical from run to run: sums over rows that cross blocks are added as 64-bit integers (fixed point, exact in
// any order), all others in an order fixed by the launch shape. The workspace is below 0.2 MB at the fast shapes.
//
// Overlap (programmatic dependent launch). In prepare -> class sums -> [class vectors ->] rows each kernel but the first
// may start while the one before runs, and as prepare and the class sums let their successor start at once, rows may
// start while prepare still runs. So every kernel waits (griddepcontrol.wait) before it touches anything that another of
// the call wrote, and before it writes at all: its end then implies the end of all before it, and no write overtakes a
// read. prepare itself never overlaps: it waits for whatever used the workspace's memory before, in the last call or the
// last replay of a graph. The rows kernels let nobody start early.
//
// Checked without a GPU, on every path, by tests/cuda/test_checks.py: those orders, races within a kernel and a cluster,
// alignment, bounds, memory read before it is written, and launches that a device would refuse. By reading: 64-bit
// offsets wherever rows enter; every launch below 65,535 blocks in y; attributes set per device, and legal while a
// stream is captured; at most 60 KB of shared memory but for the cluster kernel, which takes what the device has.
// By nvdisasm: no local memory in the fast kernels, no loads through the read-only cache, waits where they should be.
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif
#include <cstdint>

#include "settings.h"

namespace ngd_fast {

enum class Type : int { kNone, kFloat32, kFloat16, kBFloat16, kFloat64 };

// A contiguous device tensor of a floating type; data null where the caller gave none.
struct Tensor {
  void* data = nullptr;
  Type type = Type::kNone;
};

struct ObjectiveArgs : Settings {
  int64_t rows = 0;
  int dim = 0, classes = 0, prototype_count = 0;
  Tensor features;                  // [B, D]; float64 only if all floating tensors are
  Tensor logits;                    // [B, C]
  Tensor teacher_logits;            // [B, C]
  Tensor target_distribution;       // [B, C]
  const int64_t* target = nullptr;  // [B], -100 is left out
  const int64_t* labels = nullptr;  // [B], -1 is left out
  // These in the type that is computed in, that of `terms`:
  Tensor prototypes;                // [K, D]
  Tensor prior;                     // [K], or [B, K] where prior_per_row
  Tensor class_weight;              // [C]
  Tensor geo_weight;                // one number; replaces geo_weight_value
  Tensor class_sums;                // [C, D+2]: replaces the sums over these rows
  bool prior_per_row = false;
  uint64_t high_valence = 0;  // bit c: class c has the variance term
  double geo_weight_value = 0, geo_grad_scale = 1;
  Tensor terms;          // [6]: total, ce, kd, proto, geo_var, geo_margin
  Tensor grad_features;  // [B, D] or null
  Tensor grad_logits;    // [B, C] or null
  void* workspace = nullptr;
};

// Bytes of args.workspace; 0 where one launch does it all. Reads everything of args but workspace.
size_t objective_workspace(const ObjectiveArgs& args);

// Values and gradients of the objective. A mean over no rows is NaN, as PyTorch has it; `data` is null only where the
// caller gave no tensor, not where it is empty.
cudaError_t launch_objective(const ObjectiveArgs& args, cudaStream_t stream);

// [C, D+2]: per class the sum of the normalised rows, their number, the sum of their squared norms. Reads of args:
// rows, dim, classes, features, labels, terms (the output, float32 or float64) and workspace.
size_t geo_sums_workspace(const ObjectiveArgs& args);
cudaError_t launch_geo_sums(const ObjectiveArgs& args, cudaStream_t stream);

// tensor[i] *= *factor, in place; returns at once on the device where *factor is 1.
cudaError_t launch_scale(Tensor tensor, int64_t count, Tensor factor, cudaStream_t stream);

}  // namespace ngd_fast
