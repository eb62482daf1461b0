"""Reads state dictionaries of the official DN-DETR code: the same tensors under our names."""

import re

from torch import Tensor

# In order; the first pattern that matches decides.
_RENAMES = (
    (r"backbone\.0\.body\.(.*)", r"backbone.\1"),
    (r"(class|bbox)_embed\.(.*)", r"decoder.\1_embed.\2"),
    (r"(label_enc|refpoint_embed|tgt_embed)\.weight", r"queries.\1.weight"),
    (r"transformer\.patterns\.weight", "queries.patterns.weight"),
    (r"transformer\.level_embed", "projection.level_embed"),
    (r"input_proj\.(weight|bias)", r"projection.projections.0.\1"),
    (r"input_proj\.(.*)", r"projection.projections.\1"),
    (r"transformer\.encoder\.layers\.(\d+)\.norm2\.(.*)", r"encoder.layers.\1.ffn.norm.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.norm3\.(.*)", r"decoder.layers.\1.ffn.norm.\2"),
    (r"transformer\.(\w+)\.layers\.(\d+)\.(linear1|linear2|activation)\.(.*)", r"\1.layers.\2.ffn.\3.\4"),
    (r"transformer\.decoder\.layers\.(\d+)\.ca_out_v_proj\.(.*)", r"decoder.layers.\1.ca_out_proj.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.lvl_attn\.(.*)", r"decoder.layers.\1.level_gate.\2"),
    (r"transformer\.(.*)", r"\1"),
)
# The dense decoder's output projections sit in attention modules of which nothing else is left; the deformable
# decoder's modules of the same names are whole, and keep them.
_DENSE_RENAMES = (
    (r"transformer\.decoder\.layers\.(\d+)\.self_attn\.out_proj\.(.*)", r"decoder.layers.\1.sa_out_proj.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.cross_attn\.out_proj\.(.*)", r"decoder.layers.\1.ca_out_proj.\2"),
)


def official_names(names) -> dict[str, str]:
    """Names in an official state dictionary -> ours. Unknown names keep theirs.

    The heads appear there under two names, once in the decoder; both become the same one.
    """
    names = list(names)
    dense = any(name.endswith("sa_qcontent_proj.weight") for name in names)
    renames = (*_DENSE_RENAMES, *_RENAMES) if dense else _RENAMES
    ours = {}
    for name in names:
        for pattern, replacement in renames:
            match = re.fullmatch(pattern, name)
            if match:
                ours[name] = match.expand(replacement)
                break
        else:
            ours[name] = name
    return ours


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official state dictionary under our names."""
    return {ours: state[theirs] for theirs, ours in official_names(state).items()}
