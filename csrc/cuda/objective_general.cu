// The general path's last two stages, for any shape and for float64: D-Geo's class vectors, a warp for each class, then
// the rows, a warp for each. Correct everywhere before fast: features are read from cache once for every 8 prototypes.
#include "objective_terms.cuh"

namespace ngd_fast {
namespace {

template <typename A>
__global__ void __launch_bounds__(32) class_vectors(const __grid_constant__ ObjectiveArgs args) {
  wait_for_previous_kernel();
  Workspace<A> w = workspace<A>(args);
  int own = int(blockIdx.x), dim = args.dim;
  bool exchanged = args.class_sums.data != nullptr, broken = !exchanged && (*w.flags & kNotFinite);
  double unit = ldexp(1.0, -fraction_bits(args.rows));
  auto sum = [&](int c, int i) {
    int64_t at = int64_t(c) * (dim + 2) + i;
    if (exchanged) return given<A>(args.class_sums, at);
    return broken ? A(NAN) : A(double(w.sums[at]) * (i == dim ? 1.0 : unit));
  };
  A var, margin;
  A* gradient = w.class_gradient + int64_t(own) * dim;
  auto mean = [&](int c, int d) {
    A rows = sum(c, dim);
    return rows == A(0) ? A(0) : sum(c, d) / rows;
  };
  class_terms<A>(
      args, own, mean, [&](int c) { return sum(c, dim); }, [&](int c) { return sum(c, dim + 1); },
      [&](int d) -> A& { return gradient[d]; }, &var, &margin);
  if (threadIdx.x == 0) {
    w.class_terms[2 * own] = var;
    w.class_terms[2 * own + 1] = margin;
  }
}

constexpr int kThreads = 128;

template <typename T, typename A>
__device__ void feature_row(const ObjectiveArgs& args, const Workspace<A>& w, int64_t row, A* slopes,
                            RowTerms<A>& terms, int& flags) {
  constexpr int kTogether = 8;
  int lane = int(threadIdx.x % 32), dim = args.dim, many = args.prototype_count;
  const T* x = static_cast<const T*>(args.features.data) + row * dim;
  auto at = [&](int d) { return Convert<T, A>::widen(x[d]); };
  A square = 0;
  for (int d = lane; d < dim; d += 32) square += at(d) * at(d);
  A inverse = inverse_norm(warp_sum(square)), along = 0;

  if (many) {
    A largest = A(-INFINITY), sum = 0, prior_sum = 0, cold = A(1 / args.proto_temperature);
    A weight = A(args.proto_weight / (args.proto_temperature * double(args.rows)));
    for (int first = 0; first < many; first += kTogether) {
      A product[kTogether] = {};
      for (int d = lane; d < dim; d += 32) {
        A v = at(d);
#pragma unroll
        for (int j = 0; j < kTogether; ++j)
          if (first + j < many) product[j] += v * given<A>(args.prototypes, int64_t(first + j) * dim + d);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        A total = warp_sum(product[j]);
        if (first + j < many) {
          total *= inverse * w.prototype_scale[first + j];
          if (lane == 0) slopes[first + j] = total;
          largest = total * cold > largest ? total * cold : largest;
        }
      }
    }
    __syncwarp();
    auto prior = [&](int k) { return given<A>(args.prior, (args.prior_per_row ? row * many : 0) + k); };
    for (int k = lane; k < many; k += 32) {
      sum += exp(slopes[k] * cold - largest);
      prior_sum += prior(k);
    }
    sum = warp_sum(sum);
    prior_sum = warp_sum(prior_sum);
    A rest = log(sum / A(many));  // logarithms relative to 1/K, as in Ffma::chunk
    for (int k = lane; k < many; k += 32) {
      A similarity = slopes[k], z = similarity * cold - largest, p = prior(k);
      if (p != A(0)) terms.proto += p * (log(p * A(many)) - (z - rest));
      A slope = weight * (prior_sum * (exp(z) / sum) - p);
      along += slope * similarity;
      slopes[k] = slope * w.prototype_scale[k];
    }
    __syncwarp();
  }

  const A* vector = nullptr;
  if (args.labels) {
    int c = label_class(args.labels[row], args.classes, flags);
    if (c >= 0) vector = w.class_gradient + int64_t(c) * dim;
  }
  if (!args.grad_features.data) return;
  for (int d = lane; vector && d < dim; d += 32) along += vector[d] * at(d) * inverse;
  along = warp_sum(along);
  for (int d = lane; d < dim; d += 32) {
    A g = vector ? vector[d] : A(0);
    for (int k = 0; k < many; ++k) g += slopes[k] * given<A>(args.prototypes, int64_t(k) * dim + d);
    static_cast<T*>(args.grad_features.data)[row * dim + d] =
        Convert<T, A>::narrow((g - at(d) * inverse * along) * inverse);
  }
}

template <typename T, typename A>
__global__ void __launch_bounds__(kThreads) rows_general(const __grid_constant__ ObjectiveArgs args) {
  Workspace<A> w = workspace<A>(args);
  auto& scales = *reinterpret_cast<RowScales<A>*>(shared_memory());
  A* scratch = reinterpret_cast<A*>(&scales + 1);  // [3 * warps], then [warps, K] slopes
  int warp = int(threadIdx.x / 32), flags = 0;
  A* slopes = scratch + 3 * (kThreads / 32) + warp * args.prototype_count;
  wait_for_previous_kernel();
  place_row_scales(args, [&](int c) { return w.target_counts[c]; }, scales);
  RowTerms<A> terms{};
  int64_t stride = int64_t(gridDim.x) * (kThreads / 32);
  if (args.features.data)
    for (int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + warp; row < args.rows; row += stride) {
      __syncwarp();  // the last row's slopes have been read
      feature_row<T, A>(args, w, row, slopes, terms, flags);
    }
  if (args.logits.data)
    for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < args.rows;
         row += int64_t(gridDim.x) * kThreads)
      logits_row<A>(args, row, scales, terms, flags);
  if (flags) atomicOr(w.flags, flags);
  A var = 0, margin = 0;
  for (int c = 0; args.labels && c < args.classes; ++c) {
    var += w.class_terms[2 * c];
    margin += w.class_terms[2 * c + 1];
  }
  finish(args, w, scales, terms, var, margin, scratch);
}

template <typename T, typename A>
cudaError_t start(const ObjectiveArgs& args, cudaStream_t stream) {
  bool overlap = capability_major() >= 9;
  if (args.labels) {
    cudaError_t error = launch(class_vectors<A>, dim3(unsigned(args.classes)), dim3(32), 0, stream, overlap, 1, args);
    if (error != cudaSuccess) return error;
  }
  size_t shared = sizeof(RowScales<A>) + size_t(kThreads / 32) * (3 + args.prototype_count) * sizeof(A);
  dim3 grid(unsigned(persistent_blocks((args.rows + kThreads / 32 - 1) / (kThreads / 32), 8)));
  return launch(rows_general<T, A>, grid, dim3(kThreads), shared, stream, overlap, 1, args);
}

}  // namespace

cudaError_t launch_general(const ObjectiveArgs& args, cudaStream_t stream) {
  if (args.terms.type == Type::kFloat64) return start<double, double>(args, stream);
  switch (args.features.type) {
    case Type::kFloat16:
      return start<__half, float>(args, stream);
    case Type::kBFloat16:
      return start<__nv_bfloat16, float>(args, stream);
    default:
      return start<float, float>(args, stream);
  }
}

size_t geo_sums_workspace(const ObjectiveArgs& args) {
  size_t bytes = 0;
  if (args.terms.type == Type::kFloat64)
    workspace<double>(args, &bytes);
  else
    workspace<float>(args, &bytes);
  return bytes;
}

size_t objective_workspace(const ObjectiveArgs& args) { return small_cluster(args) ? 0 : geo_sums_workspace(args); }

cudaError_t launch_objective(const ObjectiveArgs& args, cudaStream_t stream) {
  if (int cluster = small_cluster(args)) return launch_small(args, cluster, stream);
  cudaError_t error = launch_prepare(args, stream);
  if (error == cudaSuccess) error = launch_class_sums(args, stream);
  if (error != cudaSuccess) return error;
  return fast_shape(args) && args.terms.type != Type::kFloat64 ? launch_rows(args, stream)
                                                               : launch_general(args, stream);
}

}  // namespace ngd_fast
