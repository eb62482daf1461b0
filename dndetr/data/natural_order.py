"""The order in which people expect numbered files."""

import re

_NUMBER = re.compile("[0-9]+")


def natural_key(name: str) -> tuple[str, str]:
    """To sort names by: digits count as numbers, so that img2 comes before img10."""
    return _NUMBER.sub(_sortable, name), name


def _sortable(number: re.Match) -> str:
    """Texts that sort as the numbers do: the longer, the larger; all before any letter, as where the name ends."""
    digits = number[0].lstrip("0")
    return f"\0{chr(len(digits))}{digits}"
