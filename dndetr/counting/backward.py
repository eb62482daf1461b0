"""Backward, node by node: what autograd's engine does, which would look for the device that the gradients are on.

Nodes run in the engine's order, the last made first, and gradients that meet are added. What the engine does besides
is done here as well: gradients take the dtype and shape that a node says it wants, and zeros stand for those that an
autograd function of Python wants and nobody has.
"""

import contextlib
import heapq
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .replaced import replaced


@contextlib.contextmanager
def plain_backward(around: Callable[[object], contextlib.AbstractContextManager]) -> Iterator[None]:
    """Within, ``Tensor.backward`` of a scalar goes node by node, each in ``around(node)``."""
    bare = FunctionCtx.set_materialize_grads

    def remembering(ctx, value: bool) -> None:
        bare(ctx, value)  # which only torch's own engine can read
        ctx.wants_zeros = value

    with (
        replaced(FunctionCtx, "set_materialize_grads", remembering),
        replaced(Tensor, "backward", lambda total: backward(total, around)),
    ):
        yield


@torch.no_grad()
def backward(total: Tensor, around: Callable[[object], contextlib.AbstractContextManager]) -> None:
    """Gradients of a scalar into ``grad`` of the leaves that it depends on."""
    root = total.grad_fn
    waiting = _edges_into(root)
    found: dict[object, list[Tensor | None]] = {root: [None] * _inputs(root)}
    _add(found[root], total.output_nr, root, torch.ones_like(total))
    ready, made = [(-root._sequence_nr(), 0, root)], 1
    while ready:
        *_, node = heapq.heappop(ready)
        with around(node):
            grads = _results(node, found.pop(node))
            for (following, place), grad in zip(_edges(node), grads, strict=True):
                _add(found.setdefault(following, [None] * _inputs(following)), place, following, grad)
        for following, _ in _edges(node):
            waiting[following] -= 1
            if waiting[following] == 0:
                heapq.heappush(ready, (-following._sequence_nr(), made, following))
                made += 1


def _edges(node) -> list[tuple]:
    """Where gradients of a node's inputs go: (node, which of its inputs), none for inputs that need no gradient."""
    return [edge for edge in node.next_functions if edge[0] is not None]


def _edges_into(root) -> dict[object, int]:
    """How many edges lead to each node below the root."""
    counted, left, seen = {}, [root], {root}
    while left:
        for following, _ in _edges(left.pop()):
            counted[following] = counted.get(following, 0) + 1
            if following not in seen:
                seen.add(following)
                left.append(following)
    return counted


def _inputs(node) -> int:
    return len(node._input_metadata)


def _results(node, grads: list[Tensor | None]) -> list[Tensor | None]:
    """What a node makes of its gradients: one for each of ``_edges``."""
    if hasattr(node, "variable"):
        _accumulate(node.variable, grads[0])
        return []
    if not isinstance(node, FunctionCtx):
        results = node(*grads)
        results = results if isinstance(results, tuple) else (results,)
        return [grad for grad, edge in zip(results, node.next_functions, strict=True) if edge[0] is not None]
    if getattr(node, "wants_zeros", True):
        # Of results that cannot be differentiated neither shape nor device is remembered: zeros stand for zeros.
        device = next((grad.device for grad in grads if grad is not None), None)
        grads = [
            torch.zeros(about.shape, dtype=about.dtype, device=device or about.device) if grad is None else grad
            for grad, about in zip(grads, node._input_metadata, strict=True)
        ]
    results = node.apply(*grads)
    results = results if isinstance(results, tuple) else (results,)
    # There is one for every input, and edges for tensors alone.
    return [grad for grad, needed in zip(results, node.needs_input_grad, strict=True) if needed]


def _accumulate(leaf: Tensor, grad: Tensor | None) -> None:
    if grad is None:
        return
    if leaf.grad is not None:
        leaf.grad.add_(grad)
    else:
        # Laid out as the leaf is; where there is one place only, its stride means nothing.
        alike = all(a == b for a, b, size in zip(grad.stride(), leaf.stride(), leaf.shape, strict=True) if size != 1)
        leaf.grad = grad.detach() if alike else torch.empty_like(leaf).copy_(grad)


def _add(grads: list[Tensor | None], place: int, node, grad: Tensor | None) -> None:
    if grad is None:
        return
    about = node._input_metadata[place]
    grad = grad if list(grad.shape) == list(about.shape) else grad.sum_to_size(about.shape)
    grad = grad.to(about.dtype)
    grads[place] = grad if grads[place] is None else grads[place] + grad
