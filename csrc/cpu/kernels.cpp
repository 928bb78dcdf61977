// Chooses the instruction set when it is first needed.
#include <atomic>
#include <stdexcept>

#include "objective_cpu.h"

namespace ngd_fast::cpu {
namespace {

const Kernels* find(const std::string& name) {
#if defined(__x86_64__)
  // These ask the operating system too, whether it saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (name.empty() || name == "avx512")) return &avx512_kernels;
  if (avx2 && (name.empty() || name == "avx2")) return &avx2_kernels;
#endif
  return name.empty() || name == "baseline" ? &baseline_kernels : nullptr;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen{find("")};
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

void use_instruction_set(const std::string& name) {
  const Kernels* found = find(name);
  if (!found) throw std::invalid_argument("name: this machine has no instruction set '" + name + "'");
  current().store(found);
}

}  // namespace ngd_fast::cpu
