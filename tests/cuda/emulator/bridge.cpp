// The launch functions of csrc/cuda as C functions for ctypes, and the emulated machine's properties.
#include "cuda/objective_cuda.h"
#include "cuda/stem_cuda.h"

extern "C" {
size_t args_size() { return sizeof(ngd_fast::ObjectiveArgs); }
size_t objective_workspace(const ngd_fast::ObjectiveArgs* args) { return ngd_fast::objective_workspace(*args); }
size_t geo_sums_workspace(const ngd_fast::ObjectiveArgs* args) { return ngd_fast::geo_sums_workspace(*args); }
int objective(const ngd_fast::ObjectiveArgs* args) { return ngd_fast::launch_objective(*args, nullptr); }
int geo_sums(const ngd_fast::ObjectiveArgs* args) { return ngd_fast::launch_geo_sums(*args, nullptr); }
int scale(const ngd_fast::Tensor* tensor, int64_t count, const ngd_fast::Tensor* factor) {
  return ngd_fast::launch_scale(*tensor, count, *factor, nullptr);
}
size_t stem_workspace(const ngd_fast::StemShape* shape) { return ngd_fast::stem_workspace(*shape); }
bool stem_fits(const ngd_fast::StemShape* shape) { return ngd_fast::stem_fits(*shape); }
int stem_forward(const ngd_fast::StemForward* args) { return ngd_fast::launch_stem_forward(*args, nullptr); }
int stem_backward(const ngd_fast::StemBackward* args) { return ngd_fast::launch_stem_backward(*args, nullptr); }
void set_machine(int multiprocessors, int max_cluster, int capability, int max_shared, unsigned seed,
                 int compiled) {
  emulator::machine = {multiprocessors, max_cluster, capability, max_shared, seed, compiled};
}
}
