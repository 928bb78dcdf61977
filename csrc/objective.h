// The mathematics of one row and of one class (arXiv 2509.11916, section 4.3), written once for the C++ and the CUDA
// backend.
//
// `A` is what a row is computed in: float, double, or a vector with one row in each lane (csrc/cpu). So nothing branches
// on a row's values: `select(condition, a, b)` takes a where the condition holds. For a vector, select, exp and log must be
// declared in this namespace before this header is included. It includes nothing of the system, because csrc/cpu includes it
// once for each instruction set: include <cmath> and <cstdint> before it.
//
// `S`: Settings, or what has those of its fields that are read.
#pragma once
#include "settings.h"

#if defined(__CUDACC__)
#define NGD_INLINE __host__ __device__ __forceinline__
#define NGD_LAMBDA
#elif !defined(NGD_INLINE)
#define NGD_INLINE inline __attribute__((always_inline))
#define NGD_LAMBDA __attribute__((always_inline))
#endif

namespace ngd_fast {

constexpr double kNormEps = 1e-12;  // a row whose norm is not above this counts as zero: f = 0, gradient 0
constexpr int64_t kIgnoreIndex = -100, kNoLabel = -1;
// What a call reports of its input, together with NaN in the terms concerned.
enum Flags : int { kBadLabel = 1, kBadTarget = 2, kNotFinite = 4 };

using std::exp;
using std::log;
using std::sqrt;
NGD_INLINE float select(bool condition, float a, float b) { return condition ? a : b; }
NGD_INLINE double select(bool condition, double a, double b) { return condition ? a : b; }

// ---- rows ---------------------------------------------------------------------------------------------------------

// 1 / norm from the squared norm; 0 where the row counts as zero.
template <typename A>
NGD_INLINE A inverse_norm(A square) {
  return square <= A(kNormEps * kNormEps) ? A(0) : A(1) / sqrt(square);
}

// An index as a class; -1 for anything outside [0, classes).
NGD_INLINE int class_of(int64_t value, int classes) { return value >= 0 && value < classes ? int(value) : -1; }

// A row's class for D-Geo, -1 where it has none; reports one out of range.
NGD_INLINE int label_class(int64_t value, int classes, int& flags) {
  int c = class_of(value, classes);
  if (c < 0 && value != kNoLabel && value != kIgnoreIndex) flags |= kBadLabel;
  return c;
}

// A row's target, -1 where it has none; reports one out of range.
NGD_INLINE int target_class(int64_t value, int classes, int& flags) {
  int c = class_of(value, classes);
  if (c < 0 && value != kIgnoreIndex) flags |= kBadTarget;
  return c;
}

// The distribution that CE asks for: label smoothing over classes, then class weights. CE of a row is
// sum_c wanted_c (-log p_c); its gradient by z_c is (sum_j wanted_j) p_c - wanted_c.
template <typename A>
struct Smoothing {
  A keep, spread;
  template <typename Scalar>
  NGD_INLINE Smoothing(Scalar label_smoothing, int classes)
      : keep(A(1) * (1 - label_smoothing)), spread(A(1) * (label_smoothing / classes)) {}
  template <typename W>
  NGD_INLINE A wanted(A probability, W weight) const { return (probability * keep + spread) * weight; }
};

// log(sum_i exp(x(i))), i < count, as the largest x and the log of the rest.
template <typename A>
struct LogSum {
  A largest, log_rest;
  template <typename X>
  static NGD_INLINE LogSum of(const X& x, int count) {
    A largest = x(0);
    for (int i = 1; i < count; ++i) largest = select(x(i) > largest, x(i), largest);
    A sum = exp(x(0) - largest);
    for (int i = 1; i < count; ++i) sum = sum + exp(x(i) - largest);
    return {largest, log(sum)};
  }
  NGD_INLINE A log_p(A x) const { return (x - largest) - log_rest; }
};

constexpr double kStdEps = 1e-5;  // added to the variance of a row's logits: a flat row stays flat

// u(i) = (x(i) - mean) factor of x(i), i < count: divided by a temperature, and for logitstd by the standard deviation.
template <typename A>
struct Scaled {
  A mean, factor;
  template <typename Scalar, typename X>
  static NGD_INLINE Scaled of(const X& x, int count, Scalar cold, bool standardise) {
    const A zero = A{} * Scalar(0);
    if (!standardise) return {zero, zero + cold};
    A mean = zero, square = zero;
    for (int i = 0; i < count; ++i) mean = mean + x(i);
    mean = mean * Scalar(1.0 / count);
    for (int i = 0; i < count; ++i) square = square + (x(i) - mean) * (x(i) - mean);
    return {mean, cold / sqrt(square * Scalar(1.0 / count) + Scalar(kStdEps))};
  }
  NGD_INLINE A operator()(A x) const { return (x - mean) * factor; }
};

// Sums over rows, each term unscaled: CE over wanted classes, KD over classes (mse: squares, else: KL), Proto-KD: KL.
template <typename A>
struct RowTerms {
  A ce, kd, proto;
};

// What turns those sums into means, and slopes into gradients of the total.
template <typename A>
struct RowScales {
  A ce, kd, proto;              // 1 / the mean's divisor (with KD's T^2)
  A ce_grad, kd_grad, proto_grad;  // the same times the term's weight

  // ce_divisor: the number of rows, or for class indices the sum of their targets' weights. In the arithmetic of S.
  template <typename S, typename Scalar>
  static NGD_INLINE RowScales of(const S& s, Scalar rows, Scalar ce_divisor) {
    auto kd = (s.kd_scale_by_t2 ? s.kd_temperature * s.kd_temperature : Scalar(1)) / rows / (s.kd_mode == kMse ? s.classes : 1);
    return {A(1 / ce_divisor),          A(kd),
            A(1 / rows),                A(1 / ce_divisor),
            A(s.kd_weight * kd / s.kd_temperature), A(s.proto_weight / rows / s.proto_temperature)};
  }
};

// CE and KD of one row (or of a lane's row). z(c): logits; wanted(c): see Smoothing; teacher(c), read only if has_kd.
// Adds to terms.ce and terms.kd; calls out(c, gradient of the total by z_c) if want_grad.
template <typename A, typename Scalar, typename S, typename Z, typename Wanted, typename Teacher, typename Out>
NGD_INLINE void logits_row(const S& s, const RowScales<Scalar>& scales, bool has_kd, bool want_grad, const Z& z,
                           const Wanted& wanted, const Teacher& teacher, const Out& out, RowTerms<A>& terms) {
  const A zero = A{} * Scalar(0);
  LogSum<A> all = LogSum<A>::of(z, s.classes);
  A mass = zero;
  for (int c = 0; c < s.classes; ++c) {
    A w = wanted(c);
    mass = mass + w;
    terms.ce = terms.ce - select(w == zero, zero, w * all.log_p(z(c)));  // 0 log 0 = 0
  }
  const Scalar cold = Scalar(1 / s.kd_temperature);
  const bool kl = has_kd && s.kd_mode != kMse, standardise = has_kd && s.kd_mode == kLogitStd;
  Scaled<A> own{zero, zero}, theirs{zero, zero};
  auto z_cold = [&](int c) NGD_LAMBDA { return own(z(c)); };
  auto teacher_cold = [&](int c) NGD_LAMBDA { return theirs(teacher(c)); };
  LogSum<A> student{zero, zero}, master{zero, zero};
  A along = zero, factor = zero;  // of the gradient through mean and standard deviation
  if (kl) {
    own = Scaled<A>::of(z, s.classes, cold, standardise);
    theirs = Scaled<A>::of(teacher, s.classes, cold, standardise);
    student = LogSum<A>::of(z_cold, s.classes);
    master = LogSum<A>::of(teacher_cold, s.classes);
  }
  if (standardise) {
    for (int c = 0; c < s.classes; ++c)
      along = along + (exp(student.log_p(z_cold(c))) - exp(master.log_p(teacher_cold(c)))) * z_cold(c);
    along = along * Scalar(s.kd_temperature * s.kd_temperature / s.classes);
    factor = own.factor * Scalar(s.kd_temperature);
  }
  for (int c = 0; c < s.classes; ++c) {
    // A row without a target has mass 0; its softmax may be NaN and must not count.
    A slope = select(mass == zero, zero, (mass * exp(all.log_p(z(c))) - wanted(c)) * scales.ce_grad);
    if (kl) {
      A log_q = student.log_p(z_cold(c)), log_p = master.log_p(teacher_cold(c)), p = exp(log_p);
      terms.kd = terms.kd + select(p == zero, zero, p * (log_p - log_q));
      A step = exp(log_q) - p;
      if (standardise) step = (step - z_cold(c) * along) * factor;
      slope = slope + step * scales.kd_grad;
    } else if (has_kd) {
      A difference = (z(c) - teacher(c)) * cold;
      terms.kd = terms.kd + difference * difference;
      slope = slope + difference * (2 * scales.kd_grad);
    }
    if (want_grad) out(c, slope);
  }
}

// Proto-KD of one row. cosine(k), prior(k), log_prior(k) = log(prior(k) count), 0 where the prior is. The factor count keeps the
// logs near 0, where float32 is fine: near a uniform prior KL is a small difference of logs. Calls out(k, gradient by cosine).
template <typename A, typename Scalar, typename S, typename Cosine, typename Prior, typename LogPrior, typename Out>
NGD_INLINE void proto_row(const S& s, const RowScales<Scalar>& scales, int count, bool want_grad, const Cosine& cosine,
                          const Prior& prior, const LogPrior& log_prior, const Out& out, RowTerms<A>& terms) {
  const A zero = A{} * Scalar(0);
  const Scalar cold = Scalar(1 / s.proto_temperature);
  A largest = cosine(0) * cold;
  for (int k = 1; k < count; ++k) largest = select(cosine(k) * cold > largest, cosine(k) * cold, largest);
  A sum = zero, mass = zero, inner = zero;
  for (int k = 0; k < count; ++k) {
    A u = cosine(k) * cold - largest;
    sum = sum + exp(u);
    mass = mass + prior(k);
    inner = inner + prior(k) * (log_prior(k) - u);
  }
  sum = sum * Scalar(1.0 / count);
  terms.proto = terms.proto + (mass * log(sum) + inner);
  if (!want_grad) return;
  A q = mass * (scales.proto_grad / Scalar(count)) / sum;
  for (int k = 0; k < count; ++k) out(k, q * exp(cosine(k) * cold - largest) - prior(k) * scales.proto_grad);
}

// ---- classes ------------------------------------------------------------------------------------------------------
// D-Geo of a class with n rows: their sum S, mean mu = S/n, q the sum of their squared norms (n but for zero rows).
// The gradient by a row f of class c is G_c + h f; the normalisation's own gradient projects h f out, so only G_c is needed:
// pull mu_c + sum over other classes of push (mu_c - mu_other).

// sigma2 - var_cap where that is positive, else 0. The difference q/n - |mu|^2 of numbers near 1 is taken in double.
template <typename S>
NGD_INLINE double variance_excess(const S& s, double square, double rows, double mean_square) {
  double excess = rows > 0 ? square / rows - mean_square - s.var_cap : 0;
  return excess <= 0 ? 0 : excess;  // NaN stays NaN
}

// weight: D-Geo's.
template <typename A, typename S>
NGD_INLINE A variance_pull(const S& s, A weight, double rows) { return A(-2 * weight * A(s.var_weight) / rows); }

// Of one other class at this distance; adds its term. The factor 2: the pair counts in both orders.
template <typename A, typename S, typename Rows>
NGD_INLINE A margin_push(const S& s, A weight, Rows rows, A distance, A& term) {
  A shortage = A(s.margin) - distance;
  if (shortage <= A(0)) return A(0);
  term += shortage;
  return distance == A(0) ? A(0) : A(-2 * weight * A(s.margin_weight) / (distance * rows));
}

// ---- the result ---------------------------------------------------------------------------------------------------

// terms = total, ce, kd, proto, geo_var, geo_margin, from the last five as means and sums.
template <typename A, typename S>
NGD_INLINE void write_terms(const S& s, double ce, double kd, double proto, double geo_var, double geo_margin,
                            double geo_weight, int flags, A* terms) {
  const double nan = NAN;
  if (flags & kBadTarget) ce = nan;
  if (flags & (kBadLabel | kNotFinite)) geo_var = geo_margin = nan;
  terms[0] = A(ce + s.kd_weight * kd + s.proto_weight * proto +
               geo_weight * (s.var_weight * geo_var + s.margin_weight * geo_margin));
  terms[1] = A(ce);
  terms[2] = A(kd);
  terms[3] = A(proto);
  terms[4] = A(geo_var);
  terms[5] = A(geo_margin);
}

}  // namespace ngd_fast
