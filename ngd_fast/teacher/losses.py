"""The regression loss: 1 - CCC, plus mean squared error."""

import torch


def concordance(prediction: torch.Tensor, target: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """Lin's concordance correlation coefficient of each column, [N, M] x [N, M] -> [M], in the inputs' dtype.

    2 cov / (var + var + (difference of means)^2), with 1/N moments. Two equal constants give 0, not NaN.
    """
    if prediction.shape != target.shape or prediction.ndim != 2:
        raise ValueError(
            f"prediction: must be [N, M] like target {list(target.shape)}, has shape {list(prediction.shape)}"
        )
    p_mean, t_mean = prediction.mean(dim=0), target.mean(dim=0)
    p, t = prediction - p_mean, target - t_mean
    total = p.square().mean(dim=0) + t.square().mean(dim=0) + (p_mean - t_mean).square()
    return 2 * (p * t).mean(dim=0) / (total + eps)


def regression_loss(
    prediction: torch.Tensor, target: torch.Tensor, *, ccc_weight: float = 1.0, mse_weight: float = 1.0
) -> torch.Tensor:
    """ccc_weight * (1 - mean CCC) + mse_weight * MSE over [N, 2] valence and arousal; a scalar."""
    ccc = 1 - concordance(prediction, target).mean()
    return ccc_weight * ccc + mse_weight * (prediction - target).square().mean()
