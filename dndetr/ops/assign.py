"""Exact minimum-cost assignment of targets to queries, a batch of problems at once.

Every problem m has a cost matrix [N, T] of which the first ``counts[m]`` columns are real; the result names the query
of each real target so that the sum of costs is the smallest possible and no query is named twice. With more targets
than queries, the best N targets are matched. Not differentiable.

A cost that is not finite counts as worse than every finite one (max + |max| + 1 of its problem), so that a broken
prediction neither raises nor hangs. Sums are taken in float64, where those of float32 costs rarely round.

Where several assignments are equally good the answer is still always the same one, on every device, with any padding,
in any batch and on any number of threads: targets in their order claim their cheapest query (the lowest of them), and
those whose query is claimed already search for the shortest way to a query without a target, of equally short ones that
to the lowest query. (scipy may pick another optimum. With more targets than queries the two change places.)

The C++ and CUDA paths (csrc/match/assign.h) so settle nearly all of a DETR batch with one look at each cost. The
reference calls scipy problem by problem; for CUDA tensors it copies to the host and waits.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from . import _backend


def assign_reference(cost: Tensor, counts: Tensor) -> Tensor:
    """The assignment by scipy, one problem after the other: the specification."""
    from scipy.optimize import linear_sum_assignment  # slow to import, and rarely needed

    matrices = cost.detach().cpu().double().numpy()
    query = np.full((matrices.shape[0], matrices.shape[2]), -1, dtype=np.int32)
    for matrix, count, found in zip(matrices, counts.tolist(), query, strict=True):
        real = _finite(matrix[:, : max(count, 0)])
        queries, targets = linear_sum_assignment(real)
        found[targets] = queries
    return torch.from_numpy(query).to(cost.device)


def _finite(matrix: np.ndarray) -> np.ndarray:
    sound = np.abs(matrix) <= 1e150  # larger ones could overflow in sums; a NaN compares false
    if sound.all():
        return matrix
    largest = matrix[sound].max(initial=-np.inf)
    return np.where(sound, matrix, largest + abs(largest) + 1 if sound.any() else 1.0)


# The backend travels through the op, so that also scipy's answer is one opaque node for tracing and fake tensors.
torch.library.define("dndetr::assign", "(Tensor cost, Tensor counts, str backend, bool exact) -> Tensor")


def _assign(cost, counts, backend, exact):
    if backend == "reference":
        return assign_reference(cost, counts)
    query = cost.new_empty((cost.shape[0], cost.shape[2]), dtype=torch.int32)
    counts = counts.contiguous()
    module = _backend.compiled()
    is_double = cost.dtype == torch.float64
    problems = (cost.data_ptr(), is_double, tuple(cost.shape), cost.stride(), counts.data_ptr(), query.data_ptr())
    if backend == "cpp":
        module.assign(*problems, torch.get_num_threads())
    else:
        stream = _backend.cuda_stream(cost)
        room = workspace(module, cost, *cost.shape, cost.dtype, stream)
        module.assign_cuda(*problems, exact, room.data_ptr(), stream)
    return query


torch.library.impl("dndetr::assign", ("cpu", "cuda"), _assign)


def workspace(module, like: Tensor, problems: int, queries: int, slots: int, dtype: torch.dtype, stream) -> Tensor:
    """Memory on the GPU for the costs of problems that exceed a block's shared memory; empty if none can."""
    each = module.match_workspace(queries, slots, dtype == torch.float64, stream)
    return like.new_empty(problems * each, dtype=dtype)


@torch.library.register_fake("dndetr::assign")
def _assign_fake(cost, counts, backend, exact):
    return cost.new_empty((cost.shape[0], cost.shape[2]), dtype=torch.int32)


@torch.no_grad()
def assign(cost: Tensor, counts: Tensor, backend: str | None = None, exact: bool = True) -> Tensor:
    """The query that each target gets in the cheapest assignment.

    cost [M, N, T] float32 or float64 at any strides (target-major memory is read fastest); counts [M] int32, the real
    targets -> [M, T] int32, -1 where padded or, with more targets than queries, unmatched.
    exact: sums of costs in float64. Without it the GPU takes sums of float32 costs in float32, which is faster where
    float64 is slow, and optimal up to rounding. The GPU takes at most 2048 queries and targets.
    """
    if cost.ndim != 3 or cost.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"assign: cost must be [M, N, T] in float32 or float64, got {list(cost.shape)} {cost.dtype}")
    if counts.shape != cost.shape[:1] or counts.dtype != torch.int32 or counts.device != cost.device:
        raise ValueError(
            f"assign: counts must be [{cost.shape[0]}] int32 on {cost.device}, "
            f"got {list(counts.shape)} {counts.dtype} on {counts.device}"
        )
    name, _ = _backend.choose("assign", backend, cost.device.type)
    return torch.ops.dndetr.assign(cost, counts, name, exact)


# name: (M, N, T, counts or None for random ones)
CASES = {
    "tiny": (3, 6, 4, (3, 0, 4)),
    "small": (48, 30, 8, None),
    "coco": (96, 300, 32, None),
    "crowded": (12, 300, 128, None),
    "more-targets": (4, 5, 16, (16, 3, 9, 5)),
    "no-targets": (2, 7, 8, (0, 0)),
    "no-queries": (2, 0, 8, (3, 0)),
}


def make_case(name: str, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """(cost, counts) of a case."""
    problems, queries, slots, counts = CASES[name]
    draw = torch.Generator().manual_seed(seed)
    cost = torch.randn(problems, queries, slots, generator=draw)
    counts = torch.randint(slots + 1, (problems,), generator=draw) if counts is None else torch.tensor(counts)
    return cost.to(device), counts.to(device, torch.int32)


def _self_test(backend: str, device_type: str) -> float:
    cost, counts = make_case("tiny", device_type)
    given = torch.ops.dndetr.assign(cost, counts, backend, True)
    return float((given != assign_reference(cost, counts)).sum())  # random costs: the optimum is unique


def _cpp_obstacle(device_type: str) -> str | None:
    return _backend.extension_obstacle("assign") if device_type == "cpu" else "it works on CPU tensors"


def _cuda_obstacle(device_type: str) -> str | None:
    return _backend.cuda_obstacle("assign_cuda") if device_type == "cuda" else "it works on CUDA tensors"


_backend.register(
    "assign",
    _backend.Backend("cpp", ("cpu",), _cpp_obstacle, partial(_self_test, "cpp"), tolerance=0.0),
    _backend.Backend("cuda", ("cuda",), _cuda_obstacle, partial(_self_test, "cuda"), tolerance=0.0),
)
