"""Muon for a backbone's convolutions, AdamW for everything else, behind one optimizer.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) steps along the momentum with its singular values
set to about 1. Moonlight (arXiv 2502.16982) scales that step to the RMS of AdamW's, so that both take one learning
rate. ``torch.optim.Muon`` does the same, but from PyTorch 2.9 on, for matrices alone, and asks the device for the
learning rate.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

_A, _B, _C = 3.4445, -4.7750, 2.0315  # the quintic whose five-fold iteration takes [0.003, 1] to about [0.7, 1.2]
_ITERATIONS = 5
_EPS = 1e-7
_ADAMW_RMS = 0.2


def muon_weights(backbone: nn.Module) -> list[nn.Parameter]:
    """Weights of the convolutions behind the first, the stem; those in channel groups are no matrix and left out."""
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    return [module.weight for module in convolutions[1:] if module.groups == 1 and module.weight.requires_grad]


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Newton-Schulz: [N, rows, columns] -> the same with singular values near 1, computed in ``dtype``."""
    tall = matrices.shape[1] > matrices.shape[2]
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    x = (matrices / norms.clamp(min=_EPS)).to(dtype)
    x = x.mT if tall else x
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay for ``weights``; ``adamw`` steps its own parameters.

    Asks the device nothing and reads the tensor ``lr`` in place: a step may be captured. Weights of one shape are one
    parameter group, and one batch of matrices [O, I * k * k]. GradScaler leaves steps out as with a fused AdamW.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        adamw: torch.optim.AdamW,
        *,
        lr: torch.Tensor | float,
        weight_decay: float,
        momentum: float = 0.95,
        lr_scale: float = 1.0,
    ):
        options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "lr_scale": lr_scale}
        shapes = dict.fromkeys(p.shape for p in weights)
        groups = [{"params": [p for p in weights if p.shape == shape], **options} for shape in shapes]
        self._adamw = adamw
        super().__init__([*groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """AdamW works on this optimizer's own state and parameter groups, which loading replaces."""
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if "lr_scale" not in group]

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self) -> None:
        # GradScaler sets these around the call.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            if "lr_scale" in group:
                self._step_group(group, grad_scale, found_inf)
        self._adamw.grad_scale, self._adamw.found_inf = grad_scale, found_inf
        self._adamw.step()

    def _step_group(self, group: dict, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> None:
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        for p in weights:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in weights]
        grads = [p.grad for p in weights]
        lr, momentum = group["lr"] * group["lr_scale"], group["momentum"]
        if grad_scale is not None:
            grads = torch._foreach_div(grads, grad_scale)
        if found_inf is not None:  # a step of length 0 whose gradient moves no momentum
            grads = [torch.where(found_inf > 0, buffer, grad) for buffer, grad in zip(buffers, grads)]
            lr = lr * (found_inf == 0)
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch.stack(torch._foreach_lerp(grads, buffers, momentum))
        matrices = updates.flatten(2)
        dtype = torch.bfloat16 if matrices.is_cuda else torch.float32
        length = _ADAMW_RMS * math.sqrt(max(matrices.shape[1:]))
        steps = orthogonalize(matrices, dtype).float() * (lr * -length)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(weights, list(steps.reshape(updates.shape).unbind()))
