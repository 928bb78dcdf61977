"""Five calls of what launches one of our hot kernels, for ``ncu`` to look at one of them; nothing is measured here."""

import torch
from ngd_fast.bench import objective, stem

#: kernel -> rows and dtype of the objective, or None: the stem
KERNELS = {
    "small_objective": (128, "float32"),
    "class_sums_256": (262_144, "bfloat16"),
    "rows_mma": (262_144, "bfloat16"),
    "stem_pool": None,
    "stem_products": None,
}


def measure(kernel: str, device: torch.device, *, batch: int = 128, size: int = 224) -> list[dict]:
    shape = KERNELS[kernel]
    if shape is None:
        call = stem.make_call("fused", batch, size, device, "both")
    else:
        rows, dtype = shape
        call = objective.make_call("cuda", objective.make_inputs(rows, objective.DTYPES[dtype], device), "both")
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    return []
