"""What a setting must be, and what is said where it is not."""

import math
from dataclasses import fields
from typing import Any


def demand(condition: bool, flag: str, value: Any, wanted: str) -> None:
    """ValueError that names the flag, what it was given, and what it takes; NaN meets no condition."""
    if not condition:
        raise ValueError(f"--{flag} {value}: give {wanted}")


def demand_val_share(share: float | None) -> None:
    """ValueError for what is no share of the images that leaves some on both sides."""
    demand(share is None or 0 < share < 1, "val-share", share, "a share between 0 and 1, such as 0.2")


def demand_counts(config: Any, prefix: str, *names: str) -> None:
    """The same for fields of ``config`` that count something, where they are not None; prefix: of their flags."""
    for name in names:
        value = getattr(config, name)
        demand(value is None or value >= 1, prefix + name.replace("_", "-"), value, "1 or more")


def demand_finite(config: Any, prefix: str) -> None:
    """The same for all numbers of ``config``."""
    for f in fields(config):
        value = getattr(config, f.name)
        numbers = [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, float)]
        demand(all(map(math.isfinite, numbers)), prefix + f.name.replace("_", "-"), value, "finite numbers")
