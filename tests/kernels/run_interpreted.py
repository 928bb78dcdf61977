"""Runs every case through Triton's interpreter and saves what came out: ``python run_interpreted.py OUT.pt``.

The interpreter is chosen when Triton is imported, for the whole process, so it has a process of its own: tests of other
folders may have imported Triton without it.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import objective_cases as cases
import torch
from ngd_fast.kernels import objective

from ngd_fast.objective import functional

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # torch.empty then holds NaN: what a kernel does not write shows

np.seterr(all="ignore")  # padding divides by zero on purpose
results = {}
for name, case in {**cases.CASES, **cases.NAN_CASES}.items():
    tensors, options = cases.arguments(**case)
    before = {key: value.clone() for key, value in tensors.items() if value is not None}
    results[name] = cases.call(objective.objective_fwd, tensors, options)
    for key, value in before.items():
        torch.testing.assert_close(
            tensors[key], value, rtol=0, atol=0, equal_nan=True, msg=f"{name}: {key} was written"
        )

for B in (37, 300):
    tensors, options = cases.arguments(B=B)
    results[f"again {B}"] = cases.call(objective.objective_fwd, tensors, options)
    results[f"device weight {B}"] = cases.call(
        objective.objective_fwd, tensors, {**options, "geo_weight": 7.0}, geo_weight=torch.tensor(options["geo_weight"])
    )
    sums = objective.geo_sums(tensors["features"], tensors["labels"], 8)
    results[f"sums {B}"] = sums
    results[f"given sums {B}"] = cases.call(objective.objective_fwd, tensors, options, class_sums=sums)
    results[f"grad scale {B}"] = cases.call(objective.objective_fwd, tensors, options, grad_scale=2.0)
    results[f"no gradients {B}"] = cases.call(objective.objective_fwd, tensors, options, want=(False, False))
    for factor in (1.0, 0.3):
        scaled = objective.scale_(tensors["features"].clone(), torch.tensor(factor))
        results[f"scaled by {factor} {B}"] = scaled


tensors, options = cases.arguments(B=37)
leaves = [tensors[name].requires_grad_() for name in ("features", "logits")]
options.pop("num_classes")
total = functional.ngd_objective(**tensors, **options, backend="triton").total
cut_off = torch.autograd.grad(torch._C._functions.UndefinedGrad()(total), leaves, allow_unused=True, retain_graph=True)
assert cut_off == (None, None)
results["by autograd"] = torch.autograd.grad(2.0 * total, leaves, retain_graph=True)
tensors["teacher_logits"].zero_()
try:
    torch.autograd.grad(total, leaves)
except RuntimeError as error:
    results["refusal"] = str(error)
torch.save(results, sys.argv[1])
