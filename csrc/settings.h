// The objective's settings: their names, their order and their types stand in this one list. Python's twin, which
// documents them, is ngd_fast/objective/settings.py; the two are compared when the extension is imported.
//
// Operators take them as `float[] settings` in this order. A new one: a line here, a field there, and its use.
#pragma once
#include <cstdint>

namespace ngd_fast {

enum KdMode : int { kMse, kKl, kLogitStd };
constexpr const char* kKdModes = "mse kl logitstd";

#define NGD_SETTINGS(X)        \
  X(double, label_smoothing)   \
  X(double, kd_weight)         \
  X(double, kd_temperature)    \
  X(int, kd_mode)              \
  X(bool, kd_scale_by_t2)      \
  X(double, proto_weight)      \
  X(double, proto_temperature) \
  X(double, var_cap)           \
  X(double, margin)            \
  X(double, var_weight)        \
  X(double, margin_weight)

struct Settings {
#define NGD_FIELD(type, name) type name{};
  NGD_SETTINGS(NGD_FIELD)
#undef NGD_FIELD

  // From as many numbers as there are names.
  void unpack(const double* from) {
#define NGD_UNPACK(type, name) name = type(*from++);
    NGD_SETTINGS(NGD_UNPACK)
#undef NGD_UNPACK
  }
};

#define NGD_NAME_OF(type, name) #name " "
#define NGD_ONE_MORE(type, name) +1
constexpr const char* kSettings = NGD_SETTINGS(NGD_NAME_OF);
constexpr int64_t kSettingsCount = 0 NGD_SETTINGS(NGD_ONE_MORE);
#undef NGD_NAME_OF
#undef NGD_ONE_MORE

}  // namespace ngd_fast
