"""Batch norms as a training leaves them, without the training."""

import torch


def as_trained(network: torch.nn.Module) -> torch.nn.Module:
    """``network`` itself, its batch norms' statistics, scales and shifts drawn from torch's global numbers."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    return network
