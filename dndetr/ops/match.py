"""Bipartite matching of queries with targets, for every decoder layer and image at once, all results on the device.

``match_cost`` then ``assign``, with the result in the two forms that losses need: the query of each target and the
target of each query. Shapes depend on nothing but the shapes of the inputs, and nothing is asked of the device.
With ``sets`` > 1 the queries are that many equal sets, each matched on its own (Group DETR, arXiv 2207.13085).

The C++ and CUDA paths do both in one call and keep the costs of one problem at a time, in cache or in shared memory.
The reference is the two ops one after the other, each on the backend it chooses.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Targets
from . import _backend
from .assign import assign, workspace
from .match_cost import CostWeights, compiled_inputs, make_case, match_cost, validate

MOST = 2048  # queries of a set, and targets, that a GPU matches at once (csrc/match/cuda.cu)


class Matches(NamedTuple):
    """Who is matched with whom.

    query [Y, B, sets, T] int32, index into all N queries, -1 where padded or unmatched;
    target [Y, B, N] int32, -1 where a query has no target;
    finite [Y, B] bool, False where a cost was not finite (its matches are valid indices, but mean little).
    """

    query: Tensor
    target: Tensor
    finite: Tensor


def match_reference(
    logits: Tensor, boxes: Tensor, targets: Targets, weights: CostWeights, sets: int, backend: str | None = None
) -> Matches:
    """``match_cost``, ``assign`` and the inverse, each on ``backend``: the specification."""
    layers, batch, queries, _ = logits.shape
    slots = targets.labels.shape[1]
    cost = match_cost(logits, boxes, targets, weights, backend)
    finite = (cost.isfinite() | ~targets.valid[:, None, :]).flatten(2).all(2)
    counts = targets.counts[None, :, None].expand(layers, batch, sets).reshape(-1)
    cost = cost.unflatten(2, (sets, queries // sets)).flatten(0, 2)
    query = assign(cost, counts, backend).view(layers, batch, sets, slots)
    first = torch.arange(sets, device=query.device, dtype=torch.int32)[:, None] * (queries // sets)
    query = torch.where(query < 0, -1, query + first)
    return Matches(query, invert(query, queries), finite)


def invert(query: Tensor, queries: int) -> Tensor:
    """query [Y, B, sets, T] of each target -> target [Y, B, queries] of each query, both int32, -1 for none."""
    layers, batch, sets, slots = query.shape
    # Targets without a query write to one column too many, which is cut off: no data-dependent shape.
    index = torch.where(query < 0, queries, query).flatten(2).long()
    number = torch.arange(slots, device=query.device, dtype=torch.int32).repeat(sets)
    target = torch.full((layers, batch, queries + 1), -1, device=query.device, dtype=torch.int32)
    return target.scatter_(2, index, number.expand_as(index))[..., :queries]


torch.library.define(
    "dndetr::match",
    "(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor counts, float[] weights, int sets,"
    " bool exact) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("dndetr::match", "cpu")
def _match_cpu(logits, boxes, labels, target_boxes, counts, weights, sets, exact):
    query, target, finite = _empty_matches(logits, labels, sets)
    module = _backend.compiled()
    with compiled_inputs(module, logits, boxes, labels, target_boxes, counts, weights) as inputs:
        outputs = (query.data_ptr(), target.data_ptr(), finite.data_ptr())
        module.match(inputs, sets, outputs, torch.get_num_threads())
    return query, target, finite


def _match_cuda(logits, boxes, labels, target_boxes, counts, weights, sets, exact):
    query, target, finite = _empty_matches(logits, labels, sets)
    module = _backend.compiled()
    precise = torch.promote_types(logits.dtype, torch.float32)
    stream = _backend.cuda_stream(logits)
    room = workspace(module, logits, finite.numel(), logits.shape[2] // sets, labels.shape[1], precise, stream)
    boxes, target_boxes = boxes.to(precise), target_boxes.to(precise)
    with compiled_inputs(module, logits, boxes, labels, target_boxes, counts, weights) as inputs:
        outputs = (query.data_ptr(), target.data_ptr(), finite.data_ptr())
        module.match_cuda(inputs, sets, outputs, exact, room.data_ptr(), stream)
    return query, target, finite


torch.library.impl("dndetr::match", "cuda", _match_cuda)


@torch.library.register_fake("dndetr::match")
def _match_fake(logits, boxes, labels, target_boxes, counts, weights, sets, exact):
    return _empty_matches(logits, labels, sets)


def _empty_matches(logits: Tensor, labels: Tensor, sets: int) -> tuple[Tensor, Tensor, Tensor]:
    layers, batch, queries, _ = logits.shape
    return (
        logits.new_empty((layers, batch, sets, labels.shape[1]), dtype=torch.int32),
        logits.new_empty((layers, batch, queries), dtype=torch.int32),
        logits.new_empty((layers, batch, sets), dtype=torch.bool),
    )


@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    weights: CostWeights = CostWeights(),
    sets: int = 1,
    backend: str | None = None,
    exact: bool = True,
) -> Matches:
    """The cheapest matching of every (layer, image), by ``match_cost``.

    logits [Y, B, N, K], boxes [Y, B, N, 4] cxcywh, N a multiple of ``sets`` -> Matches.
    exact: as in ``assign``.
    """
    validate("match", logits, boxes, targets, weights)
    if sets < 1 or logits.shape[2] % sets:
        raise ValueError(f"match: {logits.shape[2]} queries do not divide into {sets} equal sets")
    name, _ = _backend.choose("match", backend, logits.device.type)
    if name == "reference":
        return match_reference(logits, boxes, targets, weights, sets, backend)
    of_targets = targets.labels, targets.boxes, targets.counts, [float(weight) for weight in weights]

    def at_once(logits: Tensor, boxes: Tensor, sets: int) -> Matches:
        query, target, finite = torch.ops.dndetr.match(logits, boxes, *of_targets, sets, exact)
        return Matches(query, target, finite.squeeze(2) if sets == 1 else finite.all(2))

    if name == "cuda" and sets == 1 and logits.shape[2] > MOST and 4 * targets.labels.shape[1] <= MOST:
        return match_in_rounds(logits, boxes, targets.labels.shape[1], at_once, MOST)
    return at_once(logits, boxes, sets)


def match_in_rounds(
    logits: Tensor, boxes: Tensor, slots: int, at_once: Callable[[Tensor, Tensor, int], Matches], most: int
) -> Matches:
    """One set of any number of queries, by matching parts of at most ``most``, and then the matched ones of all parts.

    at_once(logits, boxes, sets): Matches of at most ``slots`` targets, a quarter of ``most`` or fewer.
    Nothing is lost. Let a part's own cheapest matching be P, and a cheapest matching of all queries M. For each query
    of the part that is in M but not in P there is one of P, not in M, with which it can be exchanged between the two,
    and neither gets dearer: sets of queries by the cost of their matching are a valuated matroid (Dress and Wenzel,
    1992). So there is a cheapest matching of all queries with none but those of the parts' matchings.
    """
    queries = logits.shape[2]
    parts = -(-queries // most)
    rest = queries % parts  # parts are equal, and what is left over is matched at the end
    whole = queries - rest
    first = at_once(logits[:, :, :whole], boxes[:, :, :whole], parts)
    few = max(parts * slots + rest, 1)
    kept = F.pad(first.target >= 0, (0, rest), value=True)
    # Those kept, in their order, then as many others as make their number that of the fullest case.
    index = kept.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[..., :few]
    logits, boxes = (x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (logits, boxes))
    last = at_once(logits, boxes, 1) if few <= most else match_in_rounds(logits, boxes, slots, at_once, most)
    query = index.to(torch.int32)[:, :, None].gather(3, last.query.clamp(min=0).long())
    query = torch.where(last.query < 0, -1, query)
    return Matches(query, invert(query, queries), first.finite & last.finite)


def _self_test(device_type: str) -> float:
    logits, boxes, targets = make_case("tiny", device_type)
    weights = CostWeights()
    given = torch.ops.dndetr.match(logits, boxes, targets.labels, targets.boxes, targets.counts, list(weights), 1, True)
    expected = match_reference(logits, boxes, targets, weights, 1, "reference")
    return float(sum((a.squeeze() != b.squeeze()).sum() for a, b in zip(given, expected, strict=True)))


def _cpp_obstacle(device_type: str) -> str | None:
    return _backend.extension_obstacle("match") if device_type == "cpu" else "it works on CPU tensors"


def _cuda_obstacle(device_type: str) -> str | None:
    return _backend.cuda_obstacle("match_cuda") if device_type == "cuda" else "it works on CUDA tensors"


_backend.register(
    "match",
    _backend.Backend("cpp", ("cpu",), _cpp_obstacle, _self_test, tolerance=0.0),
    _backend.Backend("cuda", ("cuda",), _cuda_obstacle, _self_test, tolerance=0.0),
)
