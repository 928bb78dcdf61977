// Schemas of the operators, and the Python module: importing it runs the registrations linked into it. csrc/cuda adds its
// kernels with TORCH_LIBRARY_IMPL(ngd_fast, CUDA, m). Documented in ngd_fast/objective/functional.py.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "autograd.h"
#include "objective_cpu.h"

#define NGD_INPUTS                                                                                                       \
  "(Tensor? features, Tensor? logits, Tensor? target, Tensor? prototypes, Tensor? prior, Tensor? labels, "               \
  "Tensor? teacher_logits, Tensor? class_weight, Tensor? geo_weight, Tensor? class_sums, int num_classes, "              \
  "int[] high_valence, float[] settings, float geo_weight_value, float geo_grad_scale"

TORCH_LIBRARY(ngd_fast, m) {
  // Terms [6] (total, ce, kd, proto, geo_var, geo_margin) and the gradients of total; [0] where not wanted.
  m.def("objective_fwd" NGD_INPUTS
        ", bool want_features_grad, bool want_logits_grad) -> (Tensor terms, Tensor grad_features, Tensor grad_logits)");
  // The differentiable form, for any device that has objective_fwd: total (0-dim), terms [6].
  m.def("objective" NGD_INPUTS ") -> (Tensor total, Tensor terms)");
  // [num_classes, D + 2]: per class the sum of the normalised rows, their number, the sum of their squared norms.
  m.def("geo_sums(Tensor features, Tensor labels, int num_classes) -> Tensor");
  // gradient *= factor (0-dim, same device), in place and without asking the device.
  m.def("scale_(Tensor(a!) gradient, Tensor factor) -> ()");
  // A ResNet's first layers on grey images; for CUDA alone. Documented in ngd_fast/student/stem.py.
  m.def(
      "stem_fwd(Tensor images, Tensor weight, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? variance, "
      "bool batch_statistics, float epsilon, bool want_index) "
      "-> (Tensor out, Tensor index, Tensor kernel, Tensor statistics, Tensor taps)");
  m.def(
      "stem_bwd(Tensor grad_out, Tensor images, Tensor weight, Tensor? gamma, Tensor index, Tensor kernel, "
      "Tensor statistics, Tensor taps, bool batch_statistics) "
      "-> (Tensor grad_weight, Tensor grad_gamma, Tensor grad_beta)");
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  // For ngd_fast/objective/backends.py to compare with Python's.
  m.attr("SETTINGS") = ngd_fast::kSettings;
  m.attr("KD_MODES") = ngd_fast::kKdModes;
  m.def("instruction_set", [] { return std::string(ngd_fast::cpu::kernels().name); },
        "Instruction set that the C++ backend uses: avx512, avx2 or baseline.");
  m.def("use_instruction_set", &ngd_fast::cpu::use_instruction_set,
        "Use another instruction set (one that this machine has); for tests and comparisons.", pybind11::arg("name"));
  m.def("objective", &ngd_fast::eager_objective, "ngd_fast::objective for eager calls; see csrc/cpu/autograd.h.",
        pybind11::call_guard<pybind11::gil_scoped_release>());
}
