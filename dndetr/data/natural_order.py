"""The order in which people expect numbered files."""

import re

_NUMBERS = re.compile("([0-9]+)")


def natural_key(name: str) -> tuple:
    """To sort names by: digits count as numbers, so that img2 comes before img10."""
    parts = _NUMBERS.split(name)
    parts[1::2] = map(int, parts[1::2])
    return parts, name
