"""Random statistics and affine parameters for the BNs of a network that nobody has trained."""

from __future__ import annotations

import torch
from torch import nn


def randomise_batch_norms_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives the BNs of a fresh model values that a trained one could have, in place.

    With means of 0, variances of 1 and weights of 1 a wrong scale or shift would go unseen. Weights below 1 on the last BN
    of a block keep a deep network's activations from growing without bound.

    Args:
        model: the model.
        seed: seed of the random values.

    Returns:
        The model.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                for tensor, low, high in (
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 2.0),
                    (module.weight, 0.2, 0.8),
                    (module.bias, -0.5, 0.5),
                ):
                    if tensor is not None:
                        values = torch.empty(tensor.shape, dtype=torch.float32, device="cpu").uniform_(
                            low, high, generator=generator
                        )
                        tensor.copy_(values)
    return model
