"""The order in which people list files: img2 before img10."""

import re

_DIGITS = re.compile("([0-9]+)")


def natural_key(name: str) -> tuple:
    """What to sort names by: their digits count as numbers, and names that differ only in leading zeros as they are."""
    parts = _DIGITS.split(name)
    return (*(int(part) if place % 2 else part for place, part in enumerate(parts)), name)
