"""The original Swin: its state dictionary of one of ours, and the maps that it computes, written from the paper."""

import math
import re

import torch
from torch.nn.functional import gelu, layer_norm, linear, pad

# Ours, within the backbone -> the original's, in order.
_BACK = (
    (r"^model\.(swin\.)?(encoder\.)?", ""),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.norm", "patch_embed.norm"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.relative_position_bias\.", "attn."),
    (r"attention\.o_proj", "attn.proj"),
    (r"attention\.q_proj", "attn.qkv"),
    (r"^layernorm", "norm"),
)


def original_swin(backbone, norms: bool = True, late: bool = False) -> dict:
    """Names and packing of the original for a backbone of ours, with all its buffers.

    norms: those of the maps, as detectors have them, or that of the last stage alone, as classifiers; late: merging of
    patches at the beginning of a stage, as in newer versions of timm.
    """
    ours, state = backbone.state_dict(), {}
    for name, value in ours.items():
        if norm := re.fullmatch(r"model\.hidden_states_norms\.stage(\d)\.(.*)", name):
            if norms:
                state[f"norm{int(norm[1]) - 1}.{norm[2]}"] = value.clone()
            continue
        if re.search(r"attention\.[kv]_proj", name) or (norms and ".layernorm." in name):
            continue
        if ".q_proj." in name:
            value = torch.cat([ours[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        for pattern, replacement in _BACK:
            name = re.sub(pattern, replacement, name)
        if late:
            name = re.sub(r"^layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample", name)
        state[name] = value.clone()
        if name.endswith("bias_table"):
            side = (math.isqrt(len(value)) + 1) // 2
            state[name.replace("bias_table", "index")] = _places(side)
        if re.search(r"blocks\.\d*[13579]\.norm1\.weight", name) and not norms:
            state[name.replace("norm1.weight", "attn_mask")] = torch.zeros(4, 9, 9)
    return state


def original_maps(state: dict, images, outputs: tuple[int, ...]) -> list:
    """The maps [B, C, h, w] of stages 1 to 4 that a detector's Swin gives, from its state dictionary alone."""

    def normed(x, name):
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def product(x, name):
        return linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    kernel = state["patch_embed.proj.weight"]
    x = torch.nn.functional.conv2d(images, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[2:])
    x = normed(x.permute(0, 2, 3, 1), "patch_embed.norm")
    maps = []
    for stage in range(max(outputs)):
        if stage:
            merge = f"layers.{stage - 1}.downsample"
            parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            x = product(normed(torch.cat(parts, dim=-1), f"{merge}.norm"), f"{merge}.reduction")
        blocks = len({name.split(".")[3] for name in state if name.startswith(f"layers.{stage}.blocks.")})
        for number in range(blocks):
            block = f"layers.{stage}.blocks.{number}"
            table = state[f"{block}.attn.relative_position_bias_table"]
            x = x + _attention(normed(x, f"{block}.norm1"), product, f"{block}.attn", table, number % 2 == 1)
            x = x + product(gelu(product(normed(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        if stage + 1 in outputs:
            maps.append(normed(x, f"norm{stage}").permute(0, 3, 1, 2))
    return maps


def _places(side: int) -> torch.Tensor:
    """Rows of the table for all pairs in a window, int64 [side², side²]."""
    y, x = (grid.flatten() for grid in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    return (y[:, None] - y + side - 1) * (2 * side - 1) + x[:, None] - x + side - 1


def _attention(x, product, name: str, table, shifted: bool):
    """Within windows: pixel by pixel of the padded, rolled map, all that share a window and no seam."""
    batch, height, width, channels = x.shape
    side, heads = (math.isqrt(len(table)) + 1) // 2, table.shape[1]
    shift = side // 2 if shifted else 0
    x = pad(x, (0, 0, 0, -width % side, 0, -height % side))
    rows, columns = x.shape[1:3]
    region = torch.zeros(rows, columns)
    if shift:
        region[rows - side :] += 1
        region[rows - shift :] += 1
        region[:, columns - side :] += 3
        region[:, columns - shift :] += 3
        x = x.roll((-shift, -shift), (1, 2))

    def windows(y):  # [..., rows, columns, C] -> [..., windows, side², C]
        y = y.unflatten(-3, (-1, side)).unflatten(-2, (-1, side)).transpose(-4, -3)
        return y.flatten(-3, -2).flatten(-4, -3)

    region = windows(region[..., None])
    apart = region != region.transpose(-1, -2)
    query, key, value = product(windows(x), f"{name}.qkv").unflatten(-1, (3, heads, -1)).unbind(-3)
    scores = torch.einsum("bwqhc,bwkhc->bwhqk", query, key) * query.shape[-1] ** -0.5
    scores = scores + table[_places(side)].permute(2, 0, 1) - 100.0 * apart[:, None]
    x = torch.einsum("bwhqk,bwkhc->bwqhc", scores.softmax(-1), value).flatten(-2)
    x = product(x, f"{name}.proj").unflatten(2, (side, side)).unflatten(1, (rows // side, columns // side))
    x = x.transpose(2, 3).reshape(batch, rows, columns, channels)
    return x.roll((shift, shift), (1, 2))[:, :height, :width] if shift else x[:, :height, :width]
