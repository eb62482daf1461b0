"""Reads names of the original Swin code, also detectors' and timm's: the same tensors under those of transformers."""

import re

from torch import Tensor

# In every Swin, in its first block, and in no other network.
SWIN_BLOCK = "layers.0.blocks.0.attn.relative_position_bias_table"
_PREFIX = "backbone."
_BLOCK = r"layers\.(\d+\.blocks\.\d+)\."
_OUR_BLOCK = r"swin.encoder.layers.\1."
# The first pattern that matches all of a name decides.
_RENAMES = (
    (r"patch_embed\.proj\.(.*)", r"swin.embeddings.patch_embeddings.projection.\1"),
    (r"patch_embed\.norm\.(.*)", r"swin.embeddings.norm.\1"),
    (r"absolute_pos_embed", r"swin.embeddings.position_embeddings"),
    (_BLOCK + r"norm1\.(.*)", _OUR_BLOCK + r"layernorm_before.\2"),
    (_BLOCK + r"norm2\.(.*)", _OUR_BLOCK + r"layernorm_after.\2"),
    (_BLOCK + r"attn\.proj\.(.*)", _OUR_BLOCK + r"attention.o_proj.\2"),
    (_BLOCK + r"attn\.(relative_position_bias_table)", _OUR_BLOCK + r"attention.relative_position_bias.\2"),
    (_BLOCK + r"mlp\.(.*)", _OUR_BLOCK + r"mlp.\2"),
    (r"layers\.(\d+)\.downsample\.(.*)", r"swin.encoder.layers.\1.downsample.\2"),
    (r"norm\.(.*)", r"swin.layernorm.\1"),
)
_PACKED = re.compile(_BLOCK + r"attn\.qkv\.(weight|bias)")
_NORM_OF_MAP = re.compile(r"norm(\d+)\.(.*)")
# What windows' and images' sizes determine.
_COMPUTED = re.compile(_BLOCK + r"(attn\.relative_position_index|attn_mask)")


def from_official_swin(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dictionary with an original Swin as ``backbone`` -> with that of transformers, as our detectors have it.

    Queries, keys and values, packed in this order, become three tensors. Merging of patches, which timm has at the
    beginning of a stage since its version 0.9, ends the one before. A state without a Swin, and names that no Swin has,
    stay as they are.
    """
    if _PREFIX + SWIN_BLOCK not in state:
        return state
    late = not any(name.startswith(f"{_PREFIX}layers.0.downsample.") for name in state)
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        inner = name.removeprefix(_PREFIX)
        if inner == name:
            ours[name] = value
        elif (packed := _PACKED.fullmatch(inner)) and value.ndim and len(value) % 3 == 0:
            block = packed.expand(_OUR_BLOCK)
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                ours[f"{_PREFIX}model.{block}attention.{part}_proj.{packed[2]}"] = tensor
        elif not _COMPUTED.fullmatch(inner):
            ours[_ours(inner, late)] = value
    return ours


def _ours(name: str, late: bool) -> str:
    """A name within the backbone -> ours; late: whether a stage begins with the merging that ends the one before."""
    if late:
        name = re.sub(r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name)
    if norm := _NORM_OF_MAP.fullmatch(name):
        return f"{_PREFIX}model.hidden_states_norms.stage{int(norm[1]) + 1}.{norm[2]}"
    for pattern, replacement in _RENAMES:
        if found := re.fullmatch(pattern, name):
            return f"{_PREFIX}model.{found.expand(replacement)}"
    return _PREFIX + name
