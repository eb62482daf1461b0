"""Exact minimum-cost assignment of targets to queries, a batch of problems at once.

Every problem m has a cost matrix [N, T] of which the first ``counts[m]`` columns are real; the result names the query
of each real target so that the sum of costs is the smallest possible and no query is named twice. With more targets
than queries, the best N targets are matched. Not differentiable.

A cost that is not finite counts as worse than every finite one (max + |max| + 1 of its problem), so that a broken
prediction neither raises nor hangs. Where several assignments are equally good, any of them may be returned, always the
same one: searches end at the lowest free query (scipy may pick another). Sums are taken in float64.

The C++ path (csrc/assign.h) starts from each target's cheapest query, which settles nearly all of a DETR batch, and
finds shortest augmenting paths for the rest. The reference calls scipy problem by problem; for CUDA tensors it copies
to the host and waits.
"""

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
torch.library.define("dndetr::assign", "(Tensor cost, Tensor counts, str backend) -> Tensor")


@torch.library.impl("dndetr::assign", ("cpu", "cuda"))
def _assign(cost, counts, backend):
    if backend == "reference":
        return assign_reference(cost, counts)
    query = cost.new_empty((cost.shape[0], cost.shape[2]), dtype=torch.int32)
    counts = counts.contiguous()
    _backend.compiled().assign(
        cost.data_ptr(),
        cost.dtype == torch.float64,
        tuple(cost.shape),
        cost.stride(),
        counts.data_ptr(),
        query.data_ptr(),
        torch.get_num_threads(),
    )
    return query


@torch.library.register_fake("dndetr::assign")
def _assign_fake(cost, counts, backend):
    return cost.new_empty((cost.shape[0], cost.shape[2]), dtype=torch.int32)


@torch.no_grad()
def assign(cost: Tensor, counts: Tensor, backend: str | None = None) -> Tensor:
    """The query that each target gets in the cheapest assignment.

    cost [M, N, T] float32 or float64 at any strides (target-major memory is read fastest); counts [M] int32, the real
    targets -> [M, T] int32, -1 where padded or, with more targets than queries, unmatched.
    """
    if cost.ndim != 3 or cost.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"assign: cost must be [M, N, T] in float32 or float64, got {list(cost.shape)} {cost.dtype}")
    if counts.shape != cost.shape[:1] or counts.dtype != torch.int32 or counts.device != cost.device:
        raise ValueError(
            f"assign: counts must be [{cost.shape[0]}] int32 on {cost.device}, "
            f"got {list(counts.shape)} {counts.dtype} on {counts.device}"
        )
    name, _ = _backend.choose("assign", backend, cost.device.type)
    return torch.ops.dndetr.assign(cost, counts, name)


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


def _self_test(device_type: str) -> float:
    cost, counts = make_case("tiny", device_type)
    given = torch.ops.dndetr.assign(cost, counts, "cpp")
    return float((given != assign_reference(cost, counts)).sum())  # random costs: the optimum is unique


def _cpp_obstacle(device_type: str) -> str | None:
    return _backend.extension_obstacle("assign") if device_type == "cpu" else "it works on CPU tensors"


_backend.register("assign", _backend.Backend("cpp", ("cpu",), _cpp_obstacle, _self_test, tolerance=0.0))
