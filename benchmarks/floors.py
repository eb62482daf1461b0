"""What a step's products and convolutions cost at least: their operations, at the rate that large ones reach."""

from collections.abc import Callable

import ceilings

from dndetr.counting.flops import operations


def floor(counted: dict[str, int], rates: dict[str, float]) -> float:
    """Seconds that ``operations`` take at the rates of ``ceilings.products``."""
    return sum(count / rates[kind] for kind, count in counted.items())


def floating_point_floor(function: Callable[[], object], device: str = "cpu") -> float:
    """Seconds that a call's products and convolutions take at the rates measured for large ones, now."""
    counted = operations(function)
    rates = ceilings.products(device)
    if device != "cpu":  # one unit computes all of them there, and convolutions never reach what products do
        rates = {kind: rates["products"] for kind in counted}
    return floor(counted, rates)
