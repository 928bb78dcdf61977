"""Slow: five rules by which weights W [m, d] follow the second moment S = E[x x^T] of what passes them, y = W x.

Each takes G = W S = E[y x^T] and C = W S W^T = E[y y^T], of a batch or exact, and the step gamma:

trace      W += gamma (G - tr(C) W), the flow that a public review quotes from the paper's appendix
oja        W += gamma (G - C W)
sanger     W += gamma (G - tril(C) W)
projected  W = qr(W + gamma G), bounded without any condition
hebb       W += gamma G, the negative control: it diverges
"""

import numpy as np
import torch
from torch import Tensor

from ngd_fast.errors import UserError

RULES = ("trace", "oja", "sanger", "projected", "hebb")
STABLE = 0.5
"""gamma R^2 up to which the trace rule keeps |W|_F^2 <= 2 for any |x| <= R from any start within it. Proof, for one
sample with s = |y|^2 and |W|_F^2 = 2 - p: an update adds gamma s (2p - 2 + gamma (|x|^2 - p s)) <= gamma s (2p - 3/2),
and gamma s <= (2 - p) / 2, so at most (2 - p) (p - 3/4) <= p; convexity carries it to means over a batch. Oja and
Sanger stay bounded there too against adversarial data, as measured: no proof."""


def moments(W: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """G [m, d] and C [m, m] of a batch x [N, d]."""
    y = x @ W.T
    return y.T @ x / len(x), y.T @ y / len(x)


def exact_moments(W: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """G [m, d] and C [m, m] under the second moment S [d, d]."""
    G = W @ S
    return G, G @ W.T


def update(rule: str, W: Tensor, G: Tensor, C: Tensor, gamma: float) -> Tensor:
    """W [m, d] after one step; a new tensor."""
    if rule == "projected":
        q, r = torch.linalg.qr((W + gamma * G).T)
        return (q * r.diagonal().sign()).T
    if rule == "hebb":
        return W + gamma * G
    decay = {"trace": lambda: C.trace() * W, "oja": lambda: C @ W, "sanger": lambda: C.tril() @ W}[rule]()
    return W + gamma * (G - decay)


def require_stable(rule: str, gamma: float, radius: float) -> None:
    """Raise UserError where ``gamma`` times the squared ``radius`` max |x| leaves the regime with a known bound."""
    if rule in ("trace", "oja", "sanger") and gamma * radius**2 > STABLE:
        raise UserError(
            f"gamma={gamma:g}: gamma R^2 is {gamma * radius**2:.3g} at R = {radius:.3g}, and {rule} is known to stay "
            f"bounded up to {STABLE:g}; use gamma={STABLE / radius**2:.3g} or less"
        )


def principal_angles(W: Tensor, V: Tensor) -> np.ndarray:
    """Degrees [m], largest first, between the row spaces of W and V, both [m, d]; 90 where W has lost a direction."""
    from scipy.linalg import subspace_angles

    a, b = (t.detach().double().cpu().numpy() for t in (W, V))
    # what is left of a direction that decays is noise: the row space is that of the singular values that count
    _, values, rows = np.linalg.svd(a, full_matrices=False)
    rows = rows[values > 1e-3 * max(values[0], 1e-300)]
    angles = np.full(len(a), 90.0)
    angles[len(a) - len(rows) :] = np.degrees(subspace_angles(rows.T, b.T))[: len(rows)]
    return angles


def eigenspace(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The exact principal eigenspace of E[x x^T] for points x [N, d]: (all eigenvalues, falling; V [m, d]), float64.

    By ``eigh`` of the smaller of x^T x and x x^T. For points that are stored this is exact and faster than any rule.
    """
    x = x.double()
    wide = x.shape[1] > len(x)
    values, vectors = torch.linalg.eigh((x @ x.T if wide else x.T @ x) / len(x))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)[:, :m]
    if wide:
        vectors = torch.linalg.qr(x.T @ vectors)[0]
    return values, vectors.T.contiguous()
