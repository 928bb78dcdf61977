// objective_fwd and geo_sums from plain pointers: the stages in their order, shared among threads. No ATen, so that a test can
// build it with sanitizers.
//
// The rows are cut into chunks (class sums) and blocks (everything else) whose size depends on the shapes alone, and partial
// sums are added in their order: the result is the same, bit for bit, for any number of threads.
#pragma once
#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "objective_cpu.h"

#include "../objective.h"

namespace ngd_fast::cpu {

template <typename A>
const Stages<A>& stages() {
  if constexpr (std::is_same_v<A, float>)
    return kernels().in_float;
  else
    return kernels().in_double;
}

// Rows of a chunk of class sums. A chunk costs a pass over [C, D] to clear and one to add, so it has several rows a class.
inline int64_t chunk_rows(int64_t rows, int classes) {
  return std::max({int64_t(64), int64_t(4) * classes, (rows + 31) / 32});
}

// Runs body(i, scratch) for i in [0, count). parallel_for(count, grain, f) runs f(begin, end) over pieces of [0, count) of at
// least `grain`, on several threads.
template <typename A, typename For, typename Body>
void parallel(const For& parallel_for, int64_t count, int64_t grain, int64_t scratch_size, const Body& body) {
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> scratch(new A[size_t(scratch_size)]);
    for (int64_t i = begin; i < end; ++i) body(i, scratch.get());
  });
}

// Class sums and CE's divisor over all rows; returns flags. `sums` may be null where there is no D-Geo to sum for. One of the
// threads runs `beside` meanwhile.
template <typename A, typename For, typename Beside>
int sum_rows(const For& parallel_for, const Args& args, A* sums, double* ce_divisor, const Beside& beside) {
  const int64_t size = args.classes * (padded(args.dim) + 2), chunk = chunk_rows(args.rows, args.classes);
  const int64_t chunks = (args.rows + chunk - 1) / chunk;
  const bool accumulate = args.labels && !args.class_sums.data;
  if (accumulate) std::fill(sums, sums + size, A(0));
  *ce_divisor = 0;
  const std::unique_ptr<A[]> partial(new A[size_t(accumulate && chunks > 1 ? chunks * size : 1)]);
  std::vector<double> weights(size_t(chunks), 0.0);
  std::vector<int> flags(size_t(chunks), 0);
  parallel<A>(parallel_for, chunks + 1, 1, stages<A>().scratch_size(args), [&](int64_t i, A* scratch) {
    if (i == chunks) return beside();
    A* to = !accumulate ? nullptr : chunks > 1 ? partial.get() + i * size : sums;
    stages<A>().sums(args, i * chunk, std::min(args.rows, (i + 1) * chunk), to, &weights[i], &flags[i], scratch);
  });
  int all_flags = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    *ce_divisor += weights[i];
    all_flags |= flags[i];
  }
  for (int64_t i = 0; accumulate && chunks > 1 && i < chunks; ++i)
    for (int64_t j = 0; j < size; ++j) sums[j] += partial[i * size + j];
  return all_flags;
}

// Terms [6] and gradients; returns flags.
template <typename A, typename For>
int compute(const For& parallel_for, const Args& args, A* terms) {
  const int64_t width = padded(args.dim), n = args.classes, k = args.prototype_count;
  const bool geo = args.labels != nullptr;
  const int64_t sizes[] = {geo ? n * (width + 2) : 0, geo ? n * width : 0, geo ? n * width : 0, geo ? n * n : 0,
                           k * width,                 width * padded(k),   2 * k};
  int64_t total = 0;
  for (int64_t size : sizes) total += size;
  const std::unique_ptr<A[]> memory(new A[size_t(total + 1)]);
  Shared<A> shared{};
  A** const parts[] = {&shared.sums, &shared.mean,         &shared.class_gradient, &shared.distance,
                       &shared.bank, &shared.bank_columns, &shared.prior};
  A* next = memory.get();
  for (int i = 0; i < 7; ++i) {
    *parts[i] = next;
    next += sizes[i];
  }

  int flags = 0;
  const auto bank = [&] {
    if (args.prototypes.data && args.rows) stages<A>().bank(args, shared);  // a prior [0, K] holds nothing to read
  };
  if (geo || args.target)
    flags = sum_rows(parallel_for, args, shared.sums, &shared.ce_divisor, bank);
  else
    bank();
  if (geo) {
    if (args.class_sums.data) {
      for (int64_t c = 0; c < n; ++c) {
        // [C, D + 2] into rows of padded(D) + 2; objective_fwd has converted them to A.
        const A* from = static_cast<const A*>(args.class_sums.data) + c * args.class_sums.stride;
        A* to = shared.sums + c * (width + 2);
        std::copy(from, from + args.dim, to);
        std::fill(to + args.dim, to + width, A(0));
        std::copy(from + args.dim, from + args.dim + 2, to + width);
      }
    }
    stages<A>().classes(args, shared);
  }

  const int64_t blocks = (args.rows + kBlockRows - 1) / kBlockRows;
  const std::unique_ptr<double[]> partial(new double[size_t(3 * blocks + 1)]);
  parallel<A>(parallel_for, blocks, 2, stages<A>().scratch_size(args), [&](int64_t i, A* scratch) {
    const int64_t begin = i * kBlockRows;
    stages<A>().rows(args, shared, begin, std::min(args.rows, begin + kBlockRows), partial.get() + 3 * i, scratch);
  });
  double sums[3] = {};
  for (int64_t i = 0; i < 3 * blocks; ++i) sums[i % 3] += partial[i];
  const auto scales = RowScales<double>::of(args, double(args.rows), args.target ? shared.ce_divisor : double(args.rows));
  write_terms(args, args.logits.data ? sums[0] * scales.ce : 0.0, args.teacher_logits.data ? sums[1] * scales.kd : 0.0,
              args.prototypes.data ? sums[2] * scales.proto : 0.0, shared.geo_var, shared.geo_margin, args.geo_weight, flags,
              terms);
  return flags;
}

}  // namespace ngd_fast::cpu
