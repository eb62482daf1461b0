"""Reads state dictionaries of detrex's DINO: the same tensors under the names of the official code."""

import re
from collections.abc import Iterable

from torch import Tensor

# All that match, in order.
_RENAMES = (
    (r"^backbone\.stem\.", "backbone.0.body."),
    *((rf"^backbone\.res{stage + 1}\.", f"backbone.0.body.layer{stage}.") for stage in range(1, 5)),
    (r"^(backbone\..*)conv(\d)\.norm\.", r"\1bn\2."),
    (r"^(backbone\..*)shortcut\.norm\.", r"\1downsample.1."),
    (r"^(backbone\..*)shortcut\.", r"\1downsample.0."),
    (r"^(neck\..*)\.conv\.", r"\1.0."),
    (r"^(neck\..*)\.norm\.", r"\1.1."),
    (r"^neck\.convs\.", "input_proj."),
    (r"\.level_embeds$", ".level_embed"),
    (r"\.ffns\.0\.layers\.0\.0\.", ".linear1."),
    (r"\.ffns\.0\.layers\.1\.", ".linear2."),
    (r"(\.encoder\..*)\.attentions\.0\.", r"\1.self_attn."),
    (r"(\.encoder\..*)\.norms\.0\.", r"\1.norm1."),
    (r"(\.encoder\..*)\.norms\.1\.", r"\1.norm2."),
    (r"(\.decoder\..*)\.attentions\.0\.attn\.", r"\1.self_attn."),
    (r"(\.decoder\..*)\.attentions\.1\.", r"\1.cross_attn."),
    # Officially norm2 is the one after self-attention, norm1 that after cross-attention.
    (r"(\.decoder\..*)\.norms\.0\.", r"\1.norm2."),
    (r"(\.decoder\..*)\.norms\.1\.", r"\1.norm1."),
    (r"(\.decoder\..*)\.norms\.2\.", r"\1.norm3."),
)
_OWN = "transformer.level_embeds"
_LABEL_TABLE = "label_enc.weight"


def is_detrex(names: Iterable[str]) -> bool:
    """Whether a state dictionary with these names is one of detrex's deformable detectors."""
    return _OWN in names


def official_from_detrex(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """detrex's state dictionary under official names.

    The encoder's heads stay the last ones, as in the DINO of DN-DETR's repository. The label table, which has a row for
    each class and no more, gets one of zeros for "no label".
    """
    levels = sum(re.fullmatch(r"neck\.convs\.\d+\.conv\.weight", name) is not None for name in state)
    official = {}
    for name, value in state.items():
        name = re.sub(r"^neck\.extra_convs\.(\d+)\.", lambda found: f"neck.convs.{int(found[1]) + levels}.", name)
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        official[name] = value
    if _LABEL_TABLE in official:
        table = official[_LABEL_TABLE]
        official[_LABEL_TABLE] = table.new_zeros(len(table) + 1, *table.shape[1:])
        official[_LABEL_TABLE][:-1] = table
    return official
