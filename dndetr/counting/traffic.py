"""Bytes that an operation reads and writes, each number once, if nothing of it is in a cache."""

from collections.abc import Iterable, Iterator
from math import prod

from torch import Tensor
from torch._ops import OpOverload

from .kernels import name_of

# Results of these have the shape or kind of an input whose numbers nobody reads.
_LIKE = {
    "zeros_like",
    "ones_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "fill_",
    "zero_",
    "_foreach_zero_",
}
# In-place operations that do not read what they change.
_OVERWRITING = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
# These read of their first argument as much as they return.
_GATHERING = {"index", "gather", "index_select", "embedding"}
# In-place operations that touch of what they change only as much as their last argument has; sums read it, too.
_SCATTERING = {"scatter_", "scatter_add_", "index_put_", "index_add_", "index_copy_"}
# Written twice: filled or copied first, then changed.
_TWICE = {
    "embedding_dense_backward",
    "index_add",
    "index_fill",
    "index_put",
    "masked_fill",
    "scatter",
    "scatter_add",
    "slice_scatter",
}
# Declared as changed, but only where a loss was scaled: the gradients.
_READ_ONLY = {"_fused_adamw_": "grads"}
# Zeros into which the gradient is copied.
_INTO_ZEROS = {"select_backward", "slice_backward", "diagonal_backward"}


def touched(tensor: Tensor) -> int:
    """Bytes of a tensor's own numbers: those that are repeated by a stride of zero are there once."""
    sides = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return prod(sides) * tensor.element_size()


def tensors_in(value) -> Iterator[Tensor]:
    """Those of an argument or a result, in lists, too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)


def _distinct(tensors: Iterable[Tensor]) -> dict[tuple, Tensor]:
    """Views of the same numbers once."""
    return {(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): t for t in tensors}


def total(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, views of the same numbers once."""
    return sum(map(touched, _distinct(tensors).values()))


def traffic(operation: OpOverload, args: tuple, kwargs: dict, result) -> int:
    """Bytes read and written by a dispatched operation that does something."""
    name = name_of(operation)
    given, changed, overwriting = [], [], name in _OVERWRITING
    for place, argument in enumerate(operation._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        written = written and argument.name != _READ_ONLY.get(name)
        overwriting |= argument.is_out
        (changed if written else given).extend(tensors_in(value))
    made = () if changed else tensors_in(result)
    written = total(changed) + total(made)
    if name in _LIKE:
        return written
    if name in _GATHERING:
        return 2 * written + total(given[1:])
    if name in _SCATTERING:
        return total(given) + (2 if "add" in name else 1) * total(given[-1:])
    if name in _INTO_ZEROS:
        return written + 2 * total(given)
    if changed and not overwriting:
        written *= 2
    if name in _TWICE:
        written += total(tensors_in(result))
    return total(given) + written
