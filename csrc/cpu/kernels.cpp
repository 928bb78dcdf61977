// Chooses the instruction set when it is first needed: NGD_FAST_CPU_ISA, or the best that this machine has.
#include <atomic>
#include <cstdlib>
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

const Kernels* require(const std::string& name, const char* asked_by) {
  const Kernels* found = find(name);
  if (found) return found;
  std::string has;
  for (const char* other : {"avx512", "avx2", "baseline"})
    if (find(other)) has += (has.empty() ? "" : ", ") + std::string(other);
  throw std::invalid_argument(asked_by + name + ": this machine has " + has);
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen{[] {
    const char* wanted = std::getenv("NGD_FAST_CPU_ISA");
    return require(wanted ? wanted : "", "NGD_FAST_CPU_ISA=");
  }()};
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

void use_instruction_set(const std::string& name) {
  current().store(require(name, "instruction set "));
}

}  // namespace ngd_fast::cpu
