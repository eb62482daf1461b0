"""Cross-attention whose scores add a content and a position term (DAB-DETR, arXiv 2201.12329, section 3.3).

    out = softmax(scale * (q_content k_content^T + q_position k_position^T)) v

The official code concatenates content and position per head, which makes queries and keys twice as wide as values;
here the two products are summed instead and nothing is concatenated. Keys that are not valid are hidden. Gradients are
those of softmax attention, with ds multiplied into each of the four factors.
"""

import math

import torch
from torch import Tensor

from . import _backend


def conditional_attention_reference(
    q_content: Tensor,
    q_position: Tensor,
    k_content: Tensor,
    k_position: Tensor,
    v: Tensor,
    valid: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The specification, by concatenation as in the official code; arguments and result as below."""
    q = torch.cat((q_content, q_position), -1)
    k = torch.cat((k_content, k_position), -1)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return hidden_softmax(scores, valid).to(v.dtype) @ v


def hidden_softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Softmax over the last dimension of scores [B, H, Q, S] with keys hidden where valid [B, S] is False.

    A row without any valid key becomes zeros, with zero gradients.
    """
    if valid is None:
        return scores.softmax(-1)
    valid = valid[:, None, None, :]
    blind = ~valid.any(-1, keepdim=True)
    # Filling a blind row with a finite number keeps its softmax, and so its gradient, free of NaN.
    return scores.masked_fill(~(valid | blind), -math.inf).softmax(-1).masked_fill(blind, 0)


def conditional_attention(
    q_content: Tensor,
    q_position: Tensor,
    k_content: Tensor,
    k_position: Tensor,
    v: Tensor,
    valid: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention with separate content and position parts of queries and keys.

    q_content, q_position [B, H, Q, D], k_content, k_position, v [B, H, S, D]; valid [B, S] bool, True = real key;
    scale defaults to 1 / sqrt(2 D) -> [B, H, Q, D]. Rows with no valid key are zero.
    """
    if k_content.shape[2] != v.shape[2] or k_position.shape[2] != v.shape[2]:
        raise ValueError(f"keys and values must agree in S: {tuple(k_content.shape)}, {tuple(v.shape)}")
    scale = 1 / math.sqrt(2 * q_content.shape[-1]) if scale is None else scale
    chosen, _ = _backend.choose("conditional_attention", backend, v.device.type)
    attend = conditional_attention_reference if chosen == "reference" else _conditional_attention_summed
    return attend(q_content, q_position, k_content, k_position, v, valid, scale)


def _conditional_attention_summed(
    q_content: Tensor,
    q_position: Tensor,
    k_content: Tensor,
    k_position: Tensor,
    v: Tensor,
    valid: Tensor | None,
    scale: float,
) -> Tensor:
    """Two products into one score, without concatenating."""
    scores = (q_content * scale) @ k_content.transpose(-1, -2) + (q_position * scale) @ k_position.transpose(-1, -2)
    return hidden_softmax(scores, valid).to(v.dtype) @ v


# name: batch, heads, queries, keys, width, valid keys of each image (None: all)
CASES = {
    "tiny": (2, 2, 3, 5, 4, (5, 2)),
    "all-valid": (2, 2, 7, 9, 8, None),
    "nothing-valid": (2, 2, 3, 5, 4, (0, 4)),
    "no-queries": (1, 2, 0, 5, 4, (5,)),
    "one-key": (1, 2, 3, 1, 4, (1,)),
    "no-images": (0, 2, 3, 5, 4, ()),
    "c5": (2, 8, 100, 150, 32, (150, 120)),
}


def make_case(name: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """(q_content, q_position, k_content, k_position, v, valid) of a case, strided as projections leave them."""
    batch, heads, queries, keys, width, counts = CASES[name]
    draw = torch.Generator().manual_seed(seed)

    def heads_of(length: int) -> Tensor:
        x = torch.randn(batch, length, heads, width, generator=draw, dtype=torch.float64)
        return x.to(dtype).transpose(1, 2)

    valid = None if counts is None else torch.arange(keys) < torch.tensor(counts, dtype=torch.int64).view(-1, 1)
    return heads_of(queries), heads_of(queries), heads_of(keys), heads_of(keys), heads_of(keys), valid


def _self_test(_device_type: str) -> float:
    case = make_case("tiny")
    given = _conditional_attention_summed(*case, scale=0.3)
    return (given - conditional_attention_reference(*case, scale=0.3)).abs().max().item()


_backend.register("conditional_attention", _backend.Backend("torch", (), lambda _: None, _self_test, tolerance=1e-5))
