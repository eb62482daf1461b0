"""The order in which people expect numbered files."""

import re


def natural_key(name: str) -> tuple:
    """To sort names by: digits count as numbers, so that img2 comes before img10."""
    parts = re.split(r"([0-9]+)", name)
    return tuple(int(part) if place % 2 else part for place, part in enumerate(parts)), name
