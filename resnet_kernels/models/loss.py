"""Cross-entropy on logits, or on the probabilities of a network that ends in a softmax."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


def loss_function(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the loss for a model: cross-entropy, averaged over the batch.

    It takes (logits, labels), or (probabilities, labels) if the model ends in a Softmax. As in Keras, probabilities are
    clipped to [1e-7, 1 - 1e-7] before the logarithm.
    """
    if not isinstance(list(model.modules())[-1], nn.Softmax):
        return F.cross_entropy
    return lambda probabilities, labels: F.nll_loss(probabilities.clamp(1e-7, 1 - 1e-7).log(), labels)
