"""Fast: local moves that are accepted or not, their overdamped Langevin limit, and how far they are from it.

Propose z = exp_x(eps xi); accept with Barker's 1 / (1 + exp(beta dU)) or Metropolis' min(1, exp(-beta dU)). The density
exp(-beta U) is invariant at every eps. As eps falls, with the time h of a move below, the chain tends to
dX = -grad U dt + sqrt(2 / beta) dB, generator L = (1/beta) Laplacian - grad U . grad.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ngd_fast.console import say
from ngd_fast.devices import torch_compile
from ngd_fast.flows.manifolds import Spheres, Wells

RULES = ("barker", "metropolis")


def acceptance(rule: str, du: Tensor) -> Tensor:
    """The probability of accepting a move that changes beta U by ``du``."""
    return torch.sigmoid(-du) if rule == "barker" else torch.exp(-du.clamp(min=0))


def move_time(rule: str, beta: float, eps: float) -> float:
    """h, the time that one move stands for."""
    return beta * eps**2 / (4 if rule == "barker" else 2)


class Walk:
    """N particles, a move of all of them at a time: ``x`` [D, N] float32 and ``energy`` [N], changed in place.

    Compiled by the first step where PyTorch finds a compiler, else eager, with the same numbers up to rounding.
    """

    def __init__(
        self, manifold: Spheres, wells: Wells, *, particles: int, beta: float, eps: float, rule: str,
        generator: torch.Generator, compiled: bool = True,
    ):  # fmt: skip
        self.manifold, self.wells, self.rule, self.generator = manifold, wells, rule, generator
        self.x = manifold.random(particles, generator)
        self._points = self.x.unbind()
        self.energy = wells.energy(self._points)
        self._scale = torch.tensor([eps, beta], device=self.x.device)  # a tensor: other values need no other code
        self._noise, self._uniform = torch.empty_like(self.x), torch.empty_like(self.energy)
        self._move = _compiled(move) if compiled else move

    def step(self) -> None:
        self.draw()
        self.move()

    def draw(self) -> None:
        """The noise of the next move. PyTorch draws on a CPU with one thread, which costs more than the move."""
        self._noise.normal_(generator=self.generator)
        self._uniform.uniform_(generator=self.generator)

    def move(self) -> None:
        centers, axis = self.wells.centers, self.wells.axis
        shape = (self.manifold.count, self.manifold.size, self.rule)
        self._move(self._points, self.energy, self._noise, self._uniform, centers, axis, self._scale, *shape)

    def bytes_moved(self) -> int:
        """What a move must read (x, energy, noise, uniform) and write (x, energy)."""
        return 4 * self.x.shape[1] * (3 * self.x.shape[0] + 3)


def move(
    points: Sequence[Tensor], energy: Tensor, noise: Tensor, uniform: Tensor, centers: Tensor, axis: Tensor,
    scale: Tensor, count: int, size: int, rule: str,
) -> None:  # fmt: skip
    """Move every particle: D coordinates [N] and energy [N] change in place; ``scale`` is (eps, beta)."""
    wells, eps, beta = Wells(centers, axis), scale[0], scale[1]
    proposed = Spheres(count, size).propose(points, noise.unbind(), eps)
    after = wells.energy(proposed)
    accepted = uniform < acceptance(rule, beta * (after - energy))
    for point, z in zip(points, proposed):
        point.copy_(torch.where(accepted, z, point))
    energy.copy_(torch.where(accepted, after, energy))


def _compiled(function: Callable) -> Callable:
    current = torch_compile(function, fullgraph=True, dynamic=False)

    def call(*arguments):
        nonlocal current
        try:
            return current(*arguments)
        except RuntimeError as error:  # PyTorch's own for a missing or failing compiler
            if current is function:
                raise
            say(f"particles move uncompiled: {str(error).strip().splitlines()[0]}")
            current = function
            return current(*arguments)

    return call


def transition_matrix(energy: Tensor, rule: str, beta: float, eps: float) -> Tensor:
    """The chain on a grid of the circle, exactly: [G, G] float64 from the energies [G] of equally spaced angles."""
    points = len(energy)
    angle = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    turns = 2 * math.pi * torch.arange(-3, 4, dtype=torch.float64)
    kernel = torch.exp(-((angle[:, None] + turns) ** 2) / (2 * eps**2)).sum(1)
    kernel = kernel / kernel.sum()
    offset = (torch.arange(points)[None] - torch.arange(points)[:, None]) % points
    matrix = kernel[offset] * acceptance(rule, beta * (energy[None] - energy[:, None]))
    return matrix + torch.diag(1 - matrix.sum(1))


def generator(energy: Tensor, beta: float) -> Tensor:
    """L = (1/beta) d^2 - U' d on the circle's grid, [G, G] float64, by Fourier differentiation."""
    points = len(energy)
    wave = torch.fft.fftfreq(points, 1 / points, dtype=torch.float64)
    wave = torch.where(wave == -points / 2, 0, wave)
    spectrum = torch.fft.fft(torch.eye(points, dtype=torch.complex128), dim=0)
    first = torch.fft.ifft(1j * wave[:, None] * spectrum, dim=0).real
    second = torch.fft.ifft(-(wave[:, None] ** 2) * spectrum, dim=0).real
    return second / beta - (first @ energy)[:, None] * first


def limit_errors(
    rule: str, epsilons: Sequence[float] = (0.4, 0.2, 0.1, 0.05), *, beta: float = 1.5, points: int = 256
) -> dict:
    """How far the chain on a circle is from its limit, for each eps, and the slopes (least squares, log-log).

    generator: sup |(P - I) f / h - L f|. semigroup: sup over t <= 2 (at some 32 times) of |P^n f - exp(t L) f|.
    invariance: the largest change of exp(-beta U) by one move.
    """
    angle = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    energy = torch.cos(angle) + 0.5 * torch.sin(2 * angle)
    f = torch.sin(angle) + 0.5 * torch.cos(2 * angle)
    limit = generator(energy, beta)
    gibbs = torch.softmax(-beta * energy, 0)
    rows = {"epsilon": list(epsilons), "generator": [], "semigroup": [], "invariance": []}
    for eps in epsilons:
        chain, h = transition_matrix(energy, rule, beta, eps), move_time(rule, beta, eps)
        rows["generator"].append(float(((chain @ f - f) / h - limit @ f).abs().max()))
        rows["invariance"].append(float((gibbs @ chain - gibbs).abs().max()))
        moves = max(1, round(2 / h / 32))
        jump, flow = torch.linalg.matrix_power(chain, moves), torch.linalg.matrix_exp(moves * h * limit)
        walked, flowed, worst = f, f, 0.0
        for _ in range(int(2 / (moves * h))):
            walked, flowed = jump @ walked, flow @ flowed
            worst = max(worst, float((walked - flowed).abs().max()))
        rows["semigroup"].append(worst)
    for name in ("generator", "semigroup"):
        rows[f"{name}_slope"] = slope(rows["epsilon"], rows[name])
    return rows


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line through (log x, log y)."""
    a, b = (torch.tensor(v, dtype=torch.float64).log() for v in (x, y))
    a = a - a.mean()
    return float((a @ b) / (a @ a))
