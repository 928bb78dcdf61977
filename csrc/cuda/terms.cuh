// The mathematics of one row's logits, of one class and of the sum of all terms; shared by every path.
#pragma once
#include "workspace.cuh"

namespace ngd_fast {

// Sums over a thread's, a block's or all rows, each row's terms unscaled.
template <typename A>
struct RowTerms {
  A ce = 0, kd = 0, proto = 0;
};

// What a call's rows have in common.
template <typename A>
struct Scales {
  A ce, kd, proto;  // of the summed row terms: 1 / the mean's divisor, with KD's T^2

  // `count(c)`: how many rows have target c.
  template <typename Count>
  __device__ Scales(const ObjectiveArgs& args, Count count) {
    A rows = A(args.rows), divisor = rows;
    if (args.target) {
      divisor = 0;
      for (int c = 0; c < args.classes; ++c)
        divisor += A(count(c)) * (args.class_weight.data ? element<A>(args.class_weight, c) : A(1));
    }
    ce = A(1) / divisor;
    kd = A(args.kd_scale_by_t2 ? args.kd_temperature * args.kd_temperature : 1.0) / rows;
    proto = A(1) / rows;
  }
};

// A row of C numbers: in registers where kMost > 0 (loops must be unrolled), else read again at each use.
template <typename A, int kMost>
struct Row {
  A at[kMost];
  __device__ __forceinline__ Row(const Tensor& t, int64_t row, int count) {
#pragma unroll
    for (int c = 0; c < kMost; ++c) at[c] = c < count ? element<A>(t, row * count + c) : A(0);
  }
  __device__ __forceinline__ A operator()(int c) const { return at[c]; }
};
template <typename A>
struct Row<A, 0> {
  const Tensor& tensor;
  int64_t first;
  __device__ Row(const Tensor& t, int64_t row, int count) : tensor(t), first(row * count) {}
  __device__ A operator()(int c) const { return element<A>(tensor, first + c); }
};

template <int kMost, typename Body>
__device__ __forceinline__ void each_class(int classes, Body body) {
  if constexpr (kMost > 0) {
#pragma unroll
    for (int c = 0; c < kMost; ++c)
      if (c < classes) body(c);
  } else {
    for (int c = 0; c < classes; ++c) body(c);
  }
}

// log(sum exp(z(c) * factor)), as the largest and the log of the rest.
template <typename A>
struct LogSum {
  A largest, log_rest;
  template <int kMost, typename Z>
  static __device__ __forceinline__ LogSum of(const Z& z, A factor, int classes) {
    A largest = z(0) * factor, sum = 0;
    each_class<kMost>(classes, [&](int c) { largest = z(c) * factor > largest ? z(c) * factor : largest; });
    each_class<kMost>(classes, [&](int c) { sum += exp(z(c) * factor - largest); });
    return {largest, log(sum)};
  }
  __device__ __forceinline__ A log_p(A z) const { return (z - largest) - log_rest; }
};

// Cross-entropy and KD of one row: adds to `terms`, writes the gradient, sets a flag for a target out of range.
template <typename A, int kMost>
__device__ __forceinline__ void logits_row(const ObjectiveArgs& args, int64_t row, const Scales<A>& scales, RowTerms<A>& terms,
                                           int& flags) {
  int classes = args.classes, target = -1;
  if (args.target) {
    target = class_of(args.target[row], classes);
    if (target < 0 && args.target[row] != kIgnoreIndex) flags |= kBadTarget;
  }
  Row<A, kMost> z(args.logits, row, classes);
  Row<A, kMost> distribution(args.target ? args.logits : args.target_distribution, row, classes);
  Row<A, kMost> teacher(args.teacher_logits.data ? args.teacher_logits : args.logits, row, classes);
  A keep = A(1 - args.label_smoothing), spread = A(args.label_smoothing / classes);
  auto wanted = [&](int c) {
    A probability = args.target ? A(c == target) : distribution(c);
    A weight = args.class_weight.data ? element<A>(args.class_weight, c) : A(1);
    return args.target && target < 0 ? A(0) : weight * (probability * keep + spread);
  };
  A mass = 0;
  LogSum<A> log_sum = LogSum<A>::template of<kMost>(z, A(1), classes);
  each_class<kMost>(classes, [&](int c) {
    A u = wanted(c);
    mass += u;
    if (u != A(0)) terms.ce -= u * log_sum.log_p(z(c));
  });

  bool has_kd = args.teacher_logits.data != nullptr;
  A cold = A(1 / args.kd_temperature), kd_slope = A(args.kd_weight) * scales.kd * cold;
  LogSum<A> student{A(0), A(0)}, master{A(0), A(0)};
  if (has_kd && args.kd_is_kl) {
    student = LogSum<A>::template of<kMost>(z, cold, classes);
    master = LogSum<A>::template of<kMost>(teacher, cold, classes);
  }
  each_class<kMost>(classes, [&](int c) {
    A slope = mass == A(0) ? A(0) : scales.ce * (mass * exp(log_sum.log_p(z(c))) - wanted(c));
    if (has_kd && args.kd_is_kl) {
      A log_q = student.log_p(z(c) * cold), log_p = master.log_p(teacher(c) * cold), p = exp(log_p);
      if (p != A(0)) terms.kd += p * (log_p - log_q);
      slope += kd_slope * (exp(log_q) - p);
    } else if (has_kd) {
      A difference = (z(c) - teacher(c)) * cold;
      terms.kd += difference * difference / A(classes);
      slope += kd_slope * A(2) * difference / A(classes);
    }
    if (!args.grad_logits.data) return;
    int64_t at = row * classes + c;
    switch (args.grad_logits.type) {
      case Type::kFloat16: static_cast<__half*>(args.grad_logits.data)[at] = Convert<__half, A>::narrow(slope); break;
      case Type::kBFloat16: static_cast<__nv_bfloat16*>(args.grad_logits.data)[at] = Convert<__nv_bfloat16, A>::narrow(slope); break;
      case Type::kFloat64: static_cast<double*>(args.grad_logits.data)[at] = double(slope); break;
      default: static_cast<float*>(args.grad_logits.data)[at] = float(slope);
    }
  });
}

template <typename A>
__device__ __forceinline__ A geo_weight(const ObjectiveArgs& args) {
  return args.geo_weight.data ? element<A>(args.geo_weight, 0) : A(args.geo_weight_value);
}

// D-Geo of class c, by one warp: its variance term, its margin terms with all other classes, and the gradient vector G of
// its rows. mean(c, d), count(c), square(c): the class sums; gradient(d): a reference to G_d that only this lane uses.
// The gradient by f of a class's row is G + h f; normalising projects h f out, so h is not computed.
template <typename A, typename Mean, typename Count, typename Square, typename Gradient>
__device__ void class_terms(const ObjectiveArgs& args, int c, Mean mean, Count count, Square square, Gradient gradient, A* var,
                            A* margin) {
  constexpr int kTogether = 8;
  int lane = int(threadIdx.x % 32), dim = args.dim;
  A rows = count(c), weight = geo_weight<A>(args) * A(args.geo_grad_scale);
  *var = *margin = 0;
  double length = 0;  // the variance is a difference of numbers near 1
  for (int d = lane; d < dim; d += 32) length += double(mean(c, d)) * double(mean(c, d));
  length = warp_sum(length);
  A pull = 0;
  if (rows > A(0) && (args.high_valence >> c & 1)) {
    A excess = A(double(square(c)) / double(rows) - length - args.var_cap);
    if (!(excess <= A(0))) {
      *var = excess;
      pull = A(-2) * weight * A(args.var_weight) / rows;
    }
  }
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
      A shortage = A(args.margin) - distance[j];
      bool close = pair && !(shortage <= A(0));
      *margin += close ? shortage : A(0);
      // Twice: the pair counts in both orders.
      push[j] = close && distance[j] != A(0) ? A(-2) * weight * A(args.margin_weight) / (distance[j] * rows) : A(0);
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

// The output from all rows' sums.
template <typename A>
__device__ void write_terms(const ObjectiveArgs& args, const RowTerms<A>& sums, const Scales<A>& scales, A geo_var, A geo_margin,
                            int flags) {
  A ce = args.logits.data ? sums.ce * scales.ce : A(0), kd = args.teacher_logits.data ? sums.kd * scales.kd : A(0);
  A proto = args.prototypes.data ? sums.proto * scales.proto : A(0);
  if (flags & kBadTarget) ce = A(NAN);
  if (flags & (kBadLabel | kNotFinite)) geo_var = geo_margin = A(NAN);
  A total = ce + A(args.kd_weight) * kd + A(args.proto_weight) * proto;
  if (args.labels) total += geo_weight<A>(args) * (A(args.var_weight) * geo_var + A(args.margin_weight) * geo_margin);
  A out[6] = {total, ce, kd, proto, geo_var, geo_margin};
  for (int i = 0; i < 6; ++i) static_cast<A*>(args.terms.data)[i] = out[i];
}

// Sum of each thread's terms over the block, in a fixed order; the result holds in thread 0. `scratch`: 3 * warps numbers.
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
  RowTerms<A> sum;
  if (threadIdx.x == 0)
    for (int i = 0; i < warps; ++i) {
      sum.ce += scratch[3 * i];
      sum.kd += scratch[3 * i + 1];
      sum.proto += scratch[3 * i + 2];
    }
  return sum;
}

// End of a rows kernel: leaves the block's sums, and the block that comes last adds all blocks' in their order and writes the
// output. The grid's threads must all have set their flags (w.flags) before.
template <typename A>
__device__ void finish(const ObjectiveArgs& args, const Workspace<A>& w, const Scales<A>& scales, RowTerms<A> mine, A geo_var,
                       A geo_margin, A* scratch) {
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
    __threadfence();
    RowTerms<A> all;
    for (int b = lane; b < int(gridDim.x); b += 32) {
      all.ce += __ldcg(w.partial + 3 * b);
      all.kd += __ldcg(w.partial + 3 * b + 1);
      all.proto += __ldcg(w.partial + 3 * b + 2);
    }
    all.ce = warp_sum(all.ce);
    all.kd = warp_sum(all.kd);
    all.proto = warp_sum(all.proto);
    if (lane == 0) write_terms(args, all, scales, geo_var, geo_margin, __ldcg(w.flags));
  }
}

}  // namespace ngd_fast
