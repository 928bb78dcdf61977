// ngd_fast::objective for eager calls from Python, past the dispatcher's way there, which costs as much as the kernel.
#pragma once
#include <ATen/ATen.h>

#include <optional>
#include <vector>

namespace ngd_fast {

// total, ce, kd, proto, geo_var, geo_margin; nothing where the call has to go the checked way of functional.py, which finds
// another backend or says what is wrong. geo: whether D-Geo is on; its labels are by default the targets.
std::vector<at::Tensor> eager_objective(
    const std::optional<at::Tensor>& features, const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& prototypes, const std::optional<at::Tensor>& prior,
    const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& teacher_logits,
    const std::optional<at::Tensor>& class_weight, const std::optional<at::Tensor>& geo_weight, double geo_weight_value,
    bool geo, const std::vector<int64_t>& high_valence, const std::vector<double>& settings);

}  // namespace ngd_fast
