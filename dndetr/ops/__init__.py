"""The compute-heavy parts, one module per op: a plain reference, its fast twins, and the choice between them."""

from .activated_product import activated_product, activated_product_backward
from .add_norm import add_norm
from .assign import assign
from .column_sums import column_sums, prelu_column_sums, relu_column_sums
from .conditional_attention import conditional_attention, packed_attention
from .conv3x3 import conv3x3
from .frozen_norm import frozen_norm
from .group_attention import GroupLayout, group_attention
from .level_sums import level_sums
from .match import Matches, match
from .match_cost import CostWeights, match_cost
from .ms_deform_attn import ms_deform_attn, ms_deform_attn_fused, ms_deform_attn_projected
from .prelu import prelu
from .set_loss import PARTS, LossWeights, set_loss
from .stem import stem
from .weight_gradients import weight_gradients

__all__ = [
    "PARTS",
    "CostWeights",
    "GroupLayout",
    "LossWeights",
    "Matches",
    "activated_product",
    "activated_product_backward",
    "add_norm",
    "assign",
    "column_sums",
    "conditional_attention",
    "conv3x3",
    "frozen_norm",
    "group_attention",
    "level_sums",
    "match",
    "match_cost",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "ms_deform_attn_projected",
    "packed_attention",
    "prelu",
    "prelu_column_sums",
    "relu_column_sums",
    "set_loss",
    "stem",
    "weight_gradients",
]
