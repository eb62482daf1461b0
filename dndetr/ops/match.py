"""Bipartite matching of queries with targets, for every decoder layer and image at once, all results on the device.

``match_cost`` then ``assign``, with the result in the two forms that losses need: the query of each target and the
target of each query. Shapes depend on nothing but the shapes of the inputs, and nothing is asked of the device.
With ``sets`` > 1 the queries are that many equal sets, each matched on its own (Group DETR, arXiv 2207.13085).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Targets
from .assign import assign
from .match_cost import CostWeights, match_cost


class Matches(NamedTuple):
    """Who is matched with whom.

    query [Y, B, sets, T] int32, index into all N queries, -1 where padded or unmatched;
    target [Y, B, N] int32, -1 where a query has no target;
    finite [Y, B] bool, False where a cost was not finite (its matches are valid indices, but mean little).
    """

    query: Tensor
    target: Tensor
    finite: Tensor


@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    weights: CostWeights = CostWeights(),
    sets: int = 1,
) -> Matches:
    """The cheapest matching of every (layer, image), by ``match_cost``.

    logits [Y, B, N, K], boxes [Y, B, N, 4] cxcywh, N a multiple of ``sets`` -> Matches.
    """
    layers, batch, queries, _ = logits.shape
    slots = targets.labels.shape[1]
    if queries % sets:
        raise ValueError(f"match: {queries} queries do not divide into {sets} equal sets")
    cost = match_cost(logits, boxes, targets, weights)
    finite = (cost.isfinite() | ~targets.valid[:, None, :]).flatten(2).all(2)
    counts = targets.counts[None, :, None].expand(layers, batch, sets).reshape(-1)
    query = assign(cost.reshape(-1, queries // sets, slots), counts).view(layers, batch, sets, slots)
    first = torch.arange(0, queries, queries // sets, device=query.device, dtype=torch.int32) if queries else 0
    query = torch.where(query < 0, -1, query + first[:, None]) if sets > 1 else query
    return Matches(query, invert(query, queries), finite)


def invert(query: Tensor, queries: int) -> Tensor:
    """query [Y, B, sets, T] of each target -> target [Y, B, queries] of each query, both int32, -1 for none."""
    layers, batch, sets, slots = query.shape
    # Targets without a query write to one column too many, which is cut off: no data-dependent shape.
    index = torch.where(query < 0, queries, query).flatten(2).long()
    number = torch.arange(slots, device=query.device, dtype=torch.int32).repeat(sets)
    target = torch.full((layers, batch, queries + 1), -1, device=query.device, dtype=torch.int32)
    return target.scatter_(2, index, number.expand_as(index))[..., :queries]
