// The mathematics of one row's logits, of one class and of the sum of all terms; shared by every path.
#pragma once
#include "workspace.cuh"

namespace ngd_fast {

// The settings that rows read, in the arithmetic they are computed in: a double divided in every row makes a small
// batch wait. kClassesKnown: C as the compiler knows it, or 0.
template <typename A, int kClassesKnown = 0>
struct RowSettings {
  A kd_weight, kd_temperature, proto_weight, proto_temperature;
  int kd_mode, classes;
  bool kd_scale_by_t2;
  __device__ explicit RowSettings(const ObjectiveArgs& s)
      : kd_weight(A(s.kd_weight)), kd_temperature(A(s.kd_temperature)), proto_weight(A(s.proto_weight)),
        proto_temperature(A(s.proto_temperature)), kd_mode(s.kd_mode), classes(kClassesKnown ? kClassesKnown : s.classes),
        kd_scale_by_t2(s.kd_scale_by_t2) {}
};

// Means and slopes of this call, to shared memory, behind a barrier. `count(c)`: how many rows have target c. By one
// warp: loads of the counts and weights one after the other would wait for each.
template <typename A, typename Count>
__device__ void place_row_scales(const ObjectiveArgs& args, Count count, RowScales<A>& scales) {
  if (threadIdx.x < 32) {
    double divisor = double(args.rows);
    if (args.target) {
      double mine = 0;
      for (int c = int(threadIdx.x); c < args.classes; c += 32)
        mine += double(count(c)) * (args.class_weight.data ? double(given<A>(args.class_weight, c)) : 1.0);
      divisor = warp_sum(mine);
    }
    if (threadIdx.x == 0) scales = RowScales<A>::of(RowSettings<A>(args), A(args.rows), A(divisor));
  }
  __syncthreads();
}

// A row of eight numbers in registers, for loops that unroll; `absent` where the tensor is.
template <typename A, bool kAligned>
struct Row {
  A at[kClasses];
  __device__ __forceinline__ Row(const Tensor& t, int64_t row, A absent = A(0)) {
#pragma unroll
    for (int c = 0; c < kClasses; ++c) at[c] = absent;
    if (t.data) eight_elements<A, kAligned>(t, row * kClasses, at);
  }
  __device__ __forceinline__ A operator()(int c) const { return at[c]; }
};

// Cross-entropy and KD of one row: adds to `terms`, writes the gradient, sets a flag for a target out of range.
template <typename A, bool kAligned = false>
__device__ __forceinline__ void logits_row(const ObjectiveArgs& args, int64_t row, const RowScales<A>& scales,
                                           RowTerms<A>& terms, int& flags) {
  int target = args.target ? target_class(args.target[row], args.classes, flags) : 0;
  Smoothing<A> smoothing(A(args.label_smoothing), args.classes);
  bool has_kd = args.teacher_logits.data, want_grad = args.grad_logits.data;
  auto wanted = [&](A probability, A weight, int c) {
    return target < 0 ? A(0) : smoothing.wanted(args.target ? A(c == target) : probability, weight);
  };
  if (args.classes == kClasses) {
    Row<A, kAligned> z(args.logits, row), distribution(args.target_distribution, row), teacher(args.teacher_logits, row);
    A gradient[kClasses], weight_of[kClasses];
#pragma unroll
    for (int c = 0; c < kClasses; ++c) weight_of[c] = args.class_weight.data ? given<A>(args.class_weight, c) : A(1);
    auto weight = [&](int c) { return weight_of[c]; };
    logits_row(
        RowSettings<A, kClasses>(args), scales, has_kd, want_grad, z, [&](int c) { return wanted(distribution(c), weight(c), c); }, teacher,
        [&](int c, A slope) { gradient[c] = slope; }, terms);
    if (want_grad) set_eight_elements<A, kAligned>(args.grad_logits, row * kClasses, gradient);
  } else {
    int64_t first = row * args.classes;
    logits_row(
        RowSettings<A>(args), scales, has_kd, want_grad, [&](int c) { return element<A>(args.logits, first + c); },
        [&](int c) {
          return wanted(args.target_distribution.data ? element<A>(args.target_distribution, first + c) : A(0),
                        args.class_weight.data ? given<A>(args.class_weight, c) : A(1), c);
        },
        [&](int c) { return element<A>(args.teacher_logits, first + c); },
        [&](int c, A slope) { set_element(args.grad_logits, first + c, slope); }, terms);
  }
}

template <typename A>
__device__ __forceinline__ A geo_weight(const ObjectiveArgs& args) {
  return args.geo_weight.data ? given<A>(args.geo_weight, 0) : A(args.geo_weight_value);
}

// D-Geo of class c, by one warp: its variance term, its margin terms with all other classes, and the gradient vector G
// of its rows. mean(c, d), count(c), square(c): the class sums; gradient(d): a reference to G_d that only this lane
// uses.
template <typename A, typename Mean, typename Count, typename Square, typename Gradient>
__device__ void class_terms(const ObjectiveArgs& args, int c, Mean mean, Count count, Square square, Gradient gradient,
                            A* var, A* margin) {
  constexpr int kTogether = 8;
  int lane = int(threadIdx.x % 32), dim = args.dim;
  A rows = count(c), weight = geo_weight<A>(args) * A(args.geo_grad_scale);
  *var = *margin = 0;
  double length = 0;
  for (int d = lane; d < dim; d += 32) length += double(mean(c, d)) * double(mean(c, d));
  length = warp_sum(length);
  A pull = 0;
  if (args.high_valence >> c & 1) *var = A(variance_excess(args, double(square(c)), double(rows), length));
  if (*var != A(0)) pull = variance_pull(args, weight, double(rows));
  for (int first = 0; first < args.classes; first += kTogether) {
    A distance[kTogether] = {}, push[kTogether];
    for (int d = lane; d < dim; d += 32) {
      A own = mean(c, d);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        A difference = first + j < args.classes ? own - mean(first + j, d) : A(0);
        distance[j] += difference * difference;
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) distance[j] = sqrt(warp_sum(distance[j]));
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      int other = first + j;
      bool pair = other < args.classes && other != c && rows > A(0) && count(other < args.classes ? other : c) > A(0);
      A term = 0, slope = margin_push(args, weight, double(rows), distance[j], term);
      *margin += pair ? term : A(0);
      push[j] = pair ? slope : A(0);
    }
    for (int d = lane; d < dim; d += 32) {
      A own = mean(c, d), g = first ? gradient(d) : pull * own;
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        if (push[j] != A(0)) g += push[j] * (own - mean(first + j, d));
      gradient(d) = g;
    }
  }
}

// The output, from all rows' sums.
template <typename A>
__device__ void write_output(const ObjectiveArgs& args, const RowTerms<A>& sums, const RowScales<A>& scales, A geo_var,
                             A geo_margin, int flags) {
  double ce = args.logits.data ? double(sums.ce) * double(scales.ce) : 0;
  double kd = args.teacher_logits.data ? double(sums.kd) * double(scales.kd) : 0;
  double proto = args.prototypes.data ? double(sums.proto) * double(scales.proto) : 0;
  double weight = args.labels ? double(geo_weight<A>(args)) : 0;
  write_terms(args, ce, kd, proto, double(geo_var), double(geo_margin), weight, flags,
              static_cast<A*>(args.terms.data));
}

// Sum of each thread's terms over the block, in a fixed order; the result holds in thread 0. `scratch`: 3 * warps
// numbers.
template <typename A>
__device__ RowTerms<A> block_sum(RowTerms<A> mine, A* scratch) {
  mine.ce = warp_sum(mine.ce);
  mine.kd = warp_sum(mine.kd);
  mine.proto = warp_sum(mine.proto);
  int warp = int(threadIdx.x / 32), warps = int(blockDim.x / 32);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    scratch[3 * warp] = mine.ce;
    scratch[3 * warp + 1] = mine.kd;
    scratch[3 * warp + 2] = mine.proto;
  }
  __syncthreads();
  RowTerms<A> sum{};
  if (threadIdx.x == 0)
    for (int i = 0; i < warps; ++i) {
      sum.ce += scratch[3 * i];
      sum.kd += scratch[3 * i + 1];
      sum.proto += scratch[3 * i + 2];
    }
  return sum;
}

// End of a rows kernel: leaves the block's sums, and the block that comes last adds all blocks' in their order and
// writes the output. The grid's threads must all have set their flags (w.flags) before.
template <typename A>
__device__ void finish(const ObjectiveArgs& args, const Workspace<A>& w, const RowScales<A>& scales, RowTerms<A> mine,
                       A geo_var, A geo_margin, A* scratch) {
  RowTerms<A> sum = block_sum(mine, scratch);
  if (threadIdx.x < 32) {
    int lane = int(threadIdx.x), last = 0;
    if (lane == 0) {
      A* slot = w.partial + 3 * int64_t(blockIdx.x);
      slot[0] = sum.ce;
      slot[1] = sum.kd;
      slot[2] = sum.proto;
      __threadfence();
      last = atomicAdd(w.ticket, 1) == int(gridDim.x) - 1;
    }
    if (!__shfl_sync(kAllLanes, last, 0)) return;
    __threadfence();  // what lane 0 saw of the other blocks ...
    __syncwarp();     // ... the other lanes see from here on: a shuffle orders no memory
    RowTerms<A> all{};
    for (int b = lane; b < int(gridDim.x); b += 32) {
      all.ce += __ldcg(w.partial + 3 * b);
      all.kd += __ldcg(w.partial + 3 * b + 1);
      all.proto += __ldcg(w.partial + 3 * b + 2);
    }
    all.ce = warp_sum(all.ce);
    all.kd = warp_sum(all.kd);
    all.proto = warp_sum(all.proto);
    if (lane == 0) write_output(args, all, scales, geo_var, geo_margin, __ldcg(w.flags));
  }
}

}  // namespace ngd_fast
