"""The compute-heavy parts, one module per op: a plain reference, its fast twins, and the choice between them."""

from .activated_product import activated_product, activated_product_backward
from .add_norm import add_norm
from .anchor_encoding import anchor_encoding
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
from .normalise import images_of, normalise
from .pixel_encoding import pixel_encoding
from .prelu import prelu
from .refine_boxes import refine_boxes
from .resize import resize
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
    "anchor_encoding",
    "assign",
    "column_sums",
    "conditional_attention",
    "conv3x3",
    "frozen_norm",
    "group_attention",
    "images_of",
    "level_sums",
    "match",
    "match_cost",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "ms_deform_attn_projected",
    "normalise",
    "packed_attention",
    "pixel_encoding",
    "prelu",
    "prelu_column_sums",
    "refine_boxes",
    "relu_column_sums",
    "resize",
    "set_loss",
    "stem",
    "weight_gradients",
]
