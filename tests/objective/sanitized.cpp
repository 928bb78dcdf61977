// The C++ backend on random shapes, every buffer exactly as large as it must be: built with AddressSanitizer and UBSan by
// test_sanitizers.py. Also holds the bits of a call to those of the same call in other pieces.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "cpu/compute.h"

using namespace ngd_fast;
using namespace ngd_fast::cpu;

std::mt19937 random_bits;

int pick(std::initializer_list<int> values) { return values.begin()[random_bits() % values.size()]; }
bool coin() { return random_bits() % 2; }

constexpr int kBytes[] = {4, 2, 2, 8};  // of each Type

struct Buffer {
  std::vector<unsigned char> bytes;
  Matrix matrix;

  // `positive` for weights and distributions; NaN, infinity and zero are among the other numbers.
  Buffer(int64_t rows, int64_t columns, Type type, bool positive = false, bool one_row = false) {
    const int64_t stride = one_row ? 0 : columns + (coin() ? 0 : pick({1, 3, 64}));
    const int64_t count = rows && columns ? (one_row ? 0 : rows - 1) * stride + columns : 0;
    bytes.resize(size_t(count * kBytes[int(type)]));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
      float value = normal(random_bits);
      if (positive) value = std::fabs(value);
      if (!positive && random_bits() % 500 == 0) value = float(pick({0, 1, 2})) * (coin() ? NAN : INFINITY);
      const double wide = value;
      const uint16_t half = uint16_t(0x2c00 + random_bits() % 0x1400);  // 1/16 to 2
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const uint16_t brain = uint16_t(bits >> 16);
      const void* from[] = {&value, &half, &brain, &wide};
      std::memcpy(bytes.data() + i * kBytes[int(type)], from[int(type)], size_t(kBytes[int(type)]));
    }
    matrix = {bytes.data(), type, stride};
  }
};

struct Result {
  std::vector<unsigned char> terms, features, logits;
  bool operator==(const Result& other) const {
    return terms == other.terms && features == other.features && logits == other.logits;
  }
};

template <typename A>
Result run(Args args, int64_t pieces, bool want_features, bool want_logits) {
  Result result;
  result.terms.resize(6 * sizeof(A));
  result.features.resize(want_features ? size_t(args.rows * args.dim * kBytes[int(args.features.type)]) : 0);
  result.logits.resize(want_logits ? size_t(args.rows * args.classes * kBytes[int(args.logits.type)]) : 0);
  args.grad_features = want_features ? result.features.data() : nullptr;
  args.grad_logits = want_logits ? result.logits.data() : nullptr;
  const auto parallel_for = [&](int64_t count, int64_t grain, const auto& body) {
    const int64_t piece = std::max(grain, (count + pieces - 1) / pieces);
    for (int64_t i = 0; i < count; i += piece) body(i, std::min(count, i + piece));
  };
  std::vector<A> terms(6);
  compute(parallel_for, args, terms.data());
  std::memcpy(result.terms.data(), terms.data(), 6 * sizeof(A));
  return result;
}

int main(int, char** argv) {
  use_instruction_set(argv[1]);
  const int cases = std::atoi(argv[2]);
  for (int i = 0; i < cases; ++i) {
    random_bits.seed(unsigned(i));
    Args args;
    args.rows = pick({0, 1, 2, 7, 15, 16, 17, 33, 64, 65, 130});
    args.dim = pick({1, 2, 31, 63, 64, 65, 100, 256});
    args.classes = pick({1, 2, 3, 7, 8, 9, 17, 64});
    args.prototype_count = pick({1, 2, 7, 8, 9, 16, 17, 24, 25, 31, 33, 48, 50, 64, 65, 130});
    const auto type = [] { return Type(pick({0, 0, 0, 1, 2, 3})); };
    const Type features_type = type(), logits_type = type();
    const bool twice = features_type == Type::kFloat64 || logits_type == Type::kFloat64;
    const Buffer features(args.rows, args.dim, features_type), logits(args.rows, args.classes, logits_type);
    const Buffer teacher(args.rows, args.classes, type()), target(args.rows, args.classes, type(), true);
    const Buffer weight(1, args.classes, type(), true), bank(args.prototype_count, args.dim, type());
    const Buffer prior(args.rows, args.prototype_count, type(), true, coin());
    const Buffer sums(args.classes, args.dim + 2, twice ? Type::kFloat64 : Type::kFloat32, true);
    const auto classes = [&] {
      std::vector<int64_t> values(size_t(args.rows));
      for (int64_t& c : values) c = random_bits() % 9 ? int64_t(random_bits() % unsigned(args.classes)) : pick({-1, -100, 64});
      return values;
    };
    const auto indices = classes(), labels = classes();
    std::vector<unsigned char> valence(size_t(args.classes), 0);
    valence[random_bits() % valence.size()] = 1;
    args.high_valence = valence.data();
    const bool some_features = coin() || coin(), some_logits = !some_features || coin() || coin();
    if (some_features) {
      args.features = features.matrix;
      if (coin() || coin()) args.prototypes = bank.matrix, args.prior = prior.matrix;
      if (coin() || coin()) args.labels = labels.data();
      if (args.labels && coin() && coin()) args.class_sums = sums.matrix;
    } else {
      args.dim = 0;
    }
    if (!args.prototypes.data) args.prototype_count = 0;
    if (some_logits) {
      args.logits = logits.matrix;
      if (coin()) args.target = indices.data();
      else args.target_distribution = target.matrix;
      if (coin()) args.teacher_logits = teacher.matrix;
      if (coin()) args.class_weight = weight.matrix;
    }
    args.label_smoothing = 0.1, args.kd_weight = 0.3, args.kd_temperature = 5, args.kd_mode = pick({0, 1, 2});
    args.proto_weight = 0.12, args.proto_temperature = 0.9, args.geo_weight = 0.5, args.margin = 1, args.var_cap = 0.1;
    args.var_weight = args.margin_weight = 1;
    // A gradient by features that nothing depends on is the caller's to clear.
    const bool want_features = some_features && (args.prototypes.data || args.labels) && (coin() || coin());
    const bool want_logits = some_logits && (coin() || coin());
    const auto call = twice ? run<double> : run<float>;
    const Result whole = call(args, 1, want_features, want_logits);
    if (!(whole == call(args, pick({2, 3, 1000}), want_features, want_logits))) {
      std::printf("case %d: other bits in other pieces\n", i);
      return 1;
    }
  }
  std::printf("%d cases\n", cases);
}
