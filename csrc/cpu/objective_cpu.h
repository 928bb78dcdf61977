// The CPU kernels without ATen: plain pointers in. kernels.inc is compiled once for each instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "../settings.h"

namespace ngd_fast::cpu {

enum class Type : int { kFloat32, kFloat16, kBFloat16, kFloat64 };

// A matrix whose columns lie side by side; data null where the caller gave none. stride: elements from row to row.
struct Matrix {
  const void* data = nullptr;
  Type type = Type::kFloat32;
  int64_t stride = 0;
};

struct Args : Settings {
  int64_t rows = 0;
  int dim = 0, classes = 0, prototype_count = 0;
  Matrix features, logits, teacher_logits, target_distribution, prototypes;  // [B, D], 3 times [B, C], [K, D]
  Matrix prior;         // [B, K]; stride 0 where all rows share one
  Matrix class_weight;  // [1, C]
  Matrix class_sums;    // [C, D + 2]: replaces the sums over these rows
  const int64_t* target = nullptr;  // [B]
  const int64_t* labels = nullptr;  // [B]
  const unsigned char* high_valence = nullptr;  // [C]: whether the class has the variance term
  double geo_weight = 0, geo_grad_scale = 1;
  void* grad_features = nullptr;  // [B, D], contiguous, of the features' type; null where not wanted
  void* grad_logits = nullptr;    // [B, C], likewise
};

constexpr int kBlockRows = 16;  // rows of a block: the unit of work of the last stage
constexpr int kPad = 64;        // D and K are padded with zeros to a multiple of this

inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// What the stages of a call share; A is float, or double where features or logits are.
template <typename A>
struct Shared {
  A* sums;            // [C, padded(D) + 2]: S, n, q of each class (CE's divisor is kept apart)
  A* mean;            // [C, padded(D)]
  A* class_gradient;  // [C, padded(D)]: G
  A* distance;        // [C, C]
  A* bank;            // [K, padded(D)] normalised prototypes
  A* bank_columns;    // at most [padded(K), D]: the same in tiles [D, prototypes of the tile]
  A* prior;           // [K] and log(prior K) [K], where all rows share one
  double ce_divisor;
  double geo_var, geo_margin;
};

template <typename A>
struct Stages {
  // Class sums of rows [begin, end) into sums [C, padded(D) + 2], and the sum of their targets' weights. Sets flags.
  void (*sums)(const Args&, int64_t begin, int64_t end, A* sums, double* target_weight, int* flags, A* scratch);
  // D-Geo's terms and class vectors from shared.sums.
  void (*classes)(const Args&, Shared<A>&);
  // Normalised prototypes, prior.
  void (*bank)(const Args&, Shared<A>&);
  // Terms (sums of CE, KD, Proto-KD over the rows, in that order) and gradients of rows [begin, end), at most kBlockRows.
  void (*rows)(const Args&, const Shared<A>&, int64_t begin, int64_t end, double* terms, A* scratch);
  // Elements of scratch that sums and rows need.
  int64_t (*scratch_size)(const Args&);
};

struct Kernels {
  const char* name;
  Stages<float> in_float;
  Stages<double> in_double;
};

extern const Kernels baseline_kernels, avx2_kernels, avx512_kernels;

// Those of the best instruction set of this machine, or the one last asked for.
const Kernels& kernels();
// Throws std::invalid_argument for a name that is unknown or that this machine does not have.
void use_instruction_set(const std::string& name);

}  // namespace ngd_fast::cpu
