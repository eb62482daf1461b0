"""Prediction heads."""

import math

from torch import nn

from .layers import MLP
from .linear import Linear


def class_head(width: int, classes: int) -> Linear:
    """Class logits; the bias starts every class at probability 0.01, as the focal loss wants."""
    head = Linear(width, classes)
    nn.init.constant_(head.bias, -math.log(99))
    return head


def box_head(width: int, zero: bool = True, size_bias: float = 0.0) -> MLP:
    """Box corrections in logit space; ``zero`` starts them at none, ``size_bias`` is the initial one of w and h."""
    head = MLP(width, width, width, 4)
    if zero:
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.zeros_(head.layers[-1].bias)
        nn.init.constant_(head.layers[-1].bias[2:], size_bias)
    return head
