"""The joint functional that falls: particles as a density on a circle, coupled both ways to the weights. Ours, not the
paper's own construction.

With features x(theta) [d], C = W S_mu W^T and J = |W|_F^2 / 2 - log det(C) / 2 (rule "oja"):
F(mu, W) = int U dmu + (1/beta) int mu log mu + kappa J;
d_t mu = (1/delta) div(mu grad(V + (1/beta) log mu)), V = U - (kappa/2) y^T C^-1 y;
W' = gamma (W S - C W) = -gamma C grad J;
dF/dt = -(1/delta) int |grad(V + (1/beta) log mu)|^2 dmu - kappa gamma tr(grad J^T C grad J) <= 0.
Rule "trace": tr(C) in the place of C throughout, J = |W|_F^2 / 2 - log tr(C) / 2.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Circle:
    """U [G] and features [G, d] at G equally spaced angles, and the constants."""

    energy: np.ndarray
    features: np.ndarray
    beta: float = 2.0
    kappa: float = 0.3
    gamma: float = 1.0
    delta: float = 0.2
    rule: str = "oja"

    @property
    def spacing(self) -> float:
        return 2 * math.pi / len(self.energy)

    @property
    def stable_dt(self) -> float:
        """delta beta spacing^2 / 2, above which the explicit step of the density oscillates."""
        return self.delta * self.beta * self.spacing**2 / 2


def example_circle(points: int = 96, **constants) -> Circle:
    """A closed curve in R^4 with two wells of different depth."""
    angle = np.arange(points) * (2 * np.pi / points)
    features = np.stack([np.cos(angle), np.sin(angle), 0.6 * np.cos(2 * angle), 0.6 * np.sin(2 * angle)], axis=1)
    return Circle(-np.cos(2 * angle - 0.6) - 0.5 * np.cos(angle), features, **constants)


def joint_energy(circle: Circle, mu: np.ndarray, W: np.ndarray) -> float:
    """F for a density mu [G] (its sum times the spacing is 1) and weights W [m, d]."""
    volume, C = _metric(circle, mu, W)
    J = (W**2).sum() / 2 - volume / 2
    return float(((circle.energy + np.log(mu) / circle.beta) * mu).sum() * circle.spacing + circle.kappa * J)


def _metric(circle: Circle, mu: np.ndarray, W: np.ndarray) -> tuple[float, np.ndarray]:
    """log det C and C for oja; log tr C and tr(C) I for trace."""
    y = circle.features @ W.T
    C = y.T @ (mu[:, None] * y) * circle.spacing
    if circle.rule == "trace":
        return math.log(np.trace(C)), np.trace(C) * np.eye(len(W))
    return float(np.linalg.slogdet(C)[1]), C


def _potential(circle: Circle, mu: np.ndarray, W: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """V [G], grad J [m, d], and the C or tr(C) I that scales it."""
    _, C = _metric(circle, mu, W)
    x, y = circle.features, circle.features @ W.T
    V = circle.energy - circle.kappa / 2 * (y * np.linalg.solve(C, y.T).T).sum(1)
    WS = y.T @ (mu[:, None] * x) * circle.spacing
    return V, W - np.linalg.solve(C, WS), C


def predicted_slope(circle: Circle, mu: np.ndarray, W: np.ndarray) -> float:
    """dF/dt by the formula above: no use is made of how the equations are integrated."""
    V, grad, C = _potential(circle, mu, W)
    level = V + np.log(mu) / circle.beta
    force, between = np.roll(level, -1) - level, (mu + np.roll(mu, -1)) / 2
    particles = (between * force**2).sum() / circle.spacing / circle.delta
    return float(-particles - circle.kappa * circle.gamma * np.trace(grad.T @ C @ grad))


def step(circle: Circle, mu: np.ndarray, W: np.ndarray, dt: float) -> tuple[np.ndarray, np.ndarray]:
    """Explicit: Scharfetter-Gummel fluxes, which keep exp(-beta V) exactly and mu positive and of mass 1."""
    V, grad, C = _potential(circle, mu, W)
    w = circle.beta * (np.roll(V, -1) - V)
    flux = (_bernoulli(w) * mu - _bernoulli(-w) * np.roll(mu, -1)) / (circle.beta * circle.spacing)
    mu = mu - dt / (circle.delta * circle.spacing) * (flux - np.roll(flux, 1))
    return mu, W - dt * circle.gamma * C @ grad


def _bernoulli(w: np.ndarray) -> np.ndarray:
    """w / (e^w - 1), 1 at 0."""
    near = np.abs(w) < 1e-8
    return np.where(near, 1 - w / 2, np.where(near, 1, w) / np.expm1(np.where(near, 1, w)))


def descend(circle: Circle, W: np.ndarray, *, time: float = 2.0, samples: int = 80) -> dict[str, list[float]]:
    """F along the coupled flow from a uniform density; its slope as measured (a central difference) and predicted."""
    dt = circle.stable_dt / 2
    every = max(1, round(time / dt / samples))
    mu = np.full(len(circle.energy), 1 / (2 * np.pi))
    rows = {"time": [], "energy": [], "measured": [], "predicted": []}
    for sample in range(samples):
        before = joint_energy(circle, mu, W)
        mu, W = step(circle, mu, W, dt)
        rows["time"].append((sample * every + 1) * dt)
        rows["energy"].append(joint_energy(circle, mu, W))
        rows["predicted"].append(predicted_slope(circle, mu, W))
        mu, W = step(circle, mu, W, dt)
        rows["measured"].append((joint_energy(circle, mu, W) - before) / (2 * dt))
        for _ in range(every - 2):
            mu, W = step(circle, mu, W, dt)
    return rows
