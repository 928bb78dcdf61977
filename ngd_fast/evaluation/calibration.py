"""Calibration of a trained student: a factor (and with ``vector`` an offset) on its logits, fitted on validation faces.

Temperature scaling and vector scaling are those of Guo et al. (2017), classwise ECE that of Kull et al. (2019). One
temperature changes no prediction; vector scaling may.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ngd_fast.artifacts.files import read_json, write_json
from ngd_fast.errors import UserError
from ngd_fast.evaluation import bootstrap as boot
from ngd_fast.evaluation.metrics import prepare
from ngd_fast.evaluation.predictions import softmax

CALIBRATION_NAME = "calibration.json"
METHODS = ("temperature", "vector")
SCORES = ("nll", "brier", "ece", "classwise_ece")
FOLDS = 5
_BOUNDS = (1e-2, 1e2)
_LEAST = 1e-300


@dataclass(frozen=True)
class Calibration:
    """Calibrated logits are ``logits * scale + bias``.

    scale   float64 [1] (1/temperature) or [C], above 0
    bias    float64 of the same shape, 0 for a temperature
    info    what calibration.json says besides: the weights' SHA-256, the scores before and after
    """

    method: str
    scale: np.ndarray
    bias: np.ndarray
    info: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Logits [N, C] -> calibrated logits, float32 [N, C]."""
        return (np.asarray(logits, np.float64) * self.scale + self.bias).astype(np.float32)

    def save(self, path: str | Path) -> None:
        """Write calibration.json."""
        values = {"method": self.method, "scale": self.scale.tolist(), "bias": self.bias.tolist()}
        write_json(path, {**self.info, **values})

    @classmethod
    def load(cls, path: str | Path, classes: int) -> "Calibration":
        """Read what :meth:`save` wrote, for ``classes`` classes. Raises UserError for anything else."""
        content = read_json(path)
        try:
            method, scale, bias = content["method"], np.array(content["scale"], float), np.array(content["bias"], float)
            fits = method in METHODS and scale.shape == bias.shape == ((1,) if method == "temperature" else (classes,))
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits or not (np.isfinite(bias).all() and np.isfinite(scale).all() and (scale > 0).all()):
            raise UserError(f"{path}: is no calibration of {classes} classes as ngd-fast evaluate calibrate writes it")
        return cls(method, scale, bias, {k: v for k, v in content.items() if k not in ("method", "scale", "bias")})


def fit_calibration(labels: np.ndarray, logits: np.ndarray, method: str = "temperature") -> Calibration:
    """The calibration of least negative log-likelihood on ``labels`` [N] (-1: left out) and ``logits`` [N, C].

    Raises UserError where every row has one class, or no finite optimum is found.
    """
    from scipy.optimize import minimize, minimize_scalar

    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, is {method!r}")
    labels, logits = _labelled(labels, logits)
    if len(np.unique(labels)) < 2:
        raise UserError("calibration needs labelled faces of at least two classes")
    log_low, log_high = np.log(_BOUNDS)
    best = minimize_scalar(
        lambda log_scale: _nll(labels, softmax(logits * np.exp(log_scale))),
        bounds=(log_low, log_high), method="bounded", options={"xatol": 1e-10},
    )  # fmt: skip
    if not log_low + 1e-3 < best.x < log_high - 1e-3:
        raise UserError(
            f"calibration: the best temperature lies at the edge of {1 / _BOUNDS[1]:g} to {1 / _BOUNDS[0]:g}; "
            "logits and labels do not fit each other"
        )
    scale = np.array([np.exp(best.x)])
    if method == "temperature":
        return Calibration(method, scale, np.zeros(1))
    classes = logits.shape[1]
    truth = np.eye(classes)[labels]

    def loss(parameters):
        factor, bias = np.exp(parameters[:classes]), parameters[classes:]
        p = softmax(logits * factor + bias)
        slope = (p - truth) / len(labels)
        return _nll(labels, p), np.concatenate([(slope * logits).sum(0) * factor, slope.sum(0)])

    start = np.concatenate([np.full(classes, best.x), np.zeros(classes)])
    # bounds keep a class without faces from running to infinity; biases count differences, so their mean is free
    limits = [(log_low, log_high)] * classes + [(-20.0, 20.0)] * classes
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=limits, options={"maxiter": 500})
    bias = found.x[classes:]
    return Calibration(method, np.exp(found.x[:classes]), bias - bias.mean())


def cross_fitted(labels: np.ndarray, logits: np.ndarray, method: str, *, seed: int = 0) -> np.ndarray:
    """Calibrated logits, float32 [N, C], of which no row took part in its own fit (5 stratified folds).

    What a calibration is worth on other faces: scores of the rows that it was fitted on would flatter it.
    """
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    fold = np.empty(len(labels), np.int64)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        fold[rows] = (rng.permutation(len(rows)) + rng.integers(FOLDS)) % FOLDS
    made = np.empty(np.shape(logits), np.float32)
    for k in range(FOLDS):
        if (fold == k).any():
            made[fold == k] = fit_calibration(labels[fold != k], logits[fold != k], method).apply(logits[fold == k])
    return made


def calibration_scores(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Of labelled rows: ``nll`` in nats, ``brier`` in [0, 2] (sum over classes), ``ece`` and ``classwise_ece`` (15
    bins) in [0, 1]."""
    scored = prepare(labels, logits, "eight_way")
    truth = np.eye(scored.probabilities.shape[1])[scored.labels]
    return {
        "nll": _nll(scored.labels, scored.probabilities),
        "brier": float(((scored.probabilities - truth) ** 2).sum(1).mean()),
        "ece": float(boot.ece(scored, np.ones((len(scored.labels), 1)))[0]),
        "classwise_ece": float(np.mean([_gap(p, t) for p, t in zip(scored.probabilities.T, truth.T)])),
    }


def _gap(probability: np.ndarray, truth: np.ndarray, bins: int = boot.ECE_BINS) -> float:
    """Mean over rows of |frequency - probability| of their bin, of one class."""
    where = np.clip(np.ceil(probability * bins).astype(np.int64) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(where, truth - probability, minlength=bins)).sum() / len(truth))


def _labelled(labels, logits) -> tuple[np.ndarray, np.ndarray]:
    scored = prepare(labels, logits, "eight_way")
    return scored.labels, np.asarray(logits, np.float64)[np.asarray(labels) >= 0]


def _nll(labels: np.ndarray, probabilities: np.ndarray) -> float:
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], _LEAST)).mean())
