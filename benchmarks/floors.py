"""What a step's products and convolutions cost at least: their operations, at the rate that large ones reach."""

from collections.abc import Callable

import ceilings
import torch
from torch.utils.flop_counter import FlopCounterMode


def _linear_pointwise(a: torch.Size, b: torch.Size, *_, out_shape=None, **__) -> int:
    """Operations of oneDNN's a [..., K] b^T [K, N], which torch's counter does not know."""
    return 2 * a.numel() * b[0]


def operations(function: Callable[[], object]) -> dict[str, int]:
    """Floating-point operations of a call, apart for products and convolutions. Ops of ours count as none."""
    # Where torch was built without oneDNN there is nothing to count.
    known = {}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        known[torch.ops.mkldnn._linear_pointwise] = _linear_pointwise
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        function()
    counted = {"products": 0, "convolutions": 0}
    for operation, count in counter.get_flop_counts()["Global"].items():
        counted["convolutions" if "conv" in str(operation) else "products"] += count
    return counted


def floor(counted: dict[str, int], rates: dict[str, float]) -> float:
    """Seconds that ``operations`` take at the rates of ``ceilings.products``."""
    return sum(count / rates[kind] for kind, count in counted.items())


def floating_point_floor(function: Callable[[], object], device: str = "cpu") -> float:
    """Seconds that a call's products and convolutions take at the rates measured for large ones, now."""
    counted = operations(function)
    rates = ceilings.products(device)
    if device != "cpu":  # one unit computes both there, and convolutions never reach what products do
        rates = {kind: rates["products"] for kind in counted}
    return floor(counted, rates)
