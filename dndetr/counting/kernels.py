"""How many kernels of a GPU an operation of torch's launches; those of our ops are in ``own_ops``."""

from collections.abc import Sequence

from torch import Tensor
from torch._ops import OpOverload

# Memory, or a tensor's description, and nothing that runs; views are known by their schema.
_NOTHING = {
    "_assert_async",
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "detach",
    "device",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "promote_types",
    "resize_",
}

# Operations of several kernels, and which those are. Reductions, gathers, pointwise operations and copies are one.
_SEVERAL = {
    "embedding_dense_backward": 2,  # zeros, sums of up to 3072 rows; more of them are sorted first
    "index_fill": 2,  # a copy, what is written into it
    "index_add": 2,
    "index_put": 2,
    "masked_fill": 2,
    "scatter": 2,
    "scatter_add": 2,
    "slice_scatter": 2,
    "select_backward": 2,  # zeros, a copy into them
    "slice_backward": 2,
    "diagonal_backward": 2,
    "max_pool2d_with_indices_backward": 2,  # zeros, sums
    "native_layer_norm_backward": 2,  # of the input, of weight and bias
    "native_group_norm": 3,  # moments; scale and shift of each image; their application
    "native_group_norm_backward": 5,
    "sort": 2,  # numbers of places, a sort of rows that fit into a block
    "topk": 16,  # of long rows: four passes of three kernels over digits, gather, sort of what was found
}

_MOST_INPUTS = 128  # of one launch of ``cat``

# torch's multi_tensor_apply: tensors of one launch by the number of lists, blocks of one launch, elements of a block.
_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_BLOCKS, _CHUNK = 320, 65536
_CLEANED = 1  # what joins the parts of each tensor's norm


def is_nothing(operation: OpOverload) -> bool:
    """Whether no kernel runs: views, and memory that nobody writes to yet."""
    return operation.is_view or name_of(operation) in _NOTHING


def name_of(operation: OpOverload) -> str:
    """Without namespace and overload."""
    return operation.overloadpacket.__name__


def launches(operation: OpOverload, args: tuple, kwargs: dict) -> int:
    """Kernels of a dispatched operation of torch's that does something."""
    name = name_of(operation)
    if name.startswith(("_foreach_", "_fused_")):
        lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
        if name.startswith("_fused_"):  # the steps are read beside the others
            return multi_tensor_launches(lists[0], depth=4)
        # What is not in place writes a list of its own.
        depth = len(lists) + (not name.endswith("_") and name != "_foreach_norm")
        return multi_tensor_launches(lists[0], depth) + (name == "_foreach_norm") * _CLEANED
    if name == "convolution":
        return 1 + (args[2] is not None)  # the bias is added by a kernel of its own
    if name == "convolution_backward":
        return sum(args[-1])
    if name in ("cat", "stack"):
        return -(-len(args[0]) // _MOST_INPUTS)
    return _SEVERAL.get(name, 1)


def multi_tensor_launches(tensors: Sequence[Tensor], depth: int) -> int:
    """Launches that torch's multi_tensor_apply takes for ``depth`` lists of tensors like these."""
    launched = blocks = held = 0
    sizes = [tensor.numel() for tensor in tensors if tensor.numel()]
    for place, size in enumerate(sizes):
        held += 1
        chunks = -(-size // _CHUNK)
        for chunk in range(chunks):
            blocks += 1
            last_chunk = chunk + 1 == chunks
            full = (held == _TENSORS[depth] and last_chunk) or blocks == _BLOCKS
            if full or (place + 1 == len(sizes) and last_chunk):
                launched += 1
                # A tensor of which something is left goes on in the next launch.
                blocks, held = 0, 0 if last_chunk else 1
    return launched
