"""Text in pictures: Pillow's font for ASCII, matplotlib's DejaVu Sans for others; names that fit, and no formulas."""

import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

_told: set[str] = set()  # characters that the font lacks, of which the user knows


def font(size: int, text: str) -> ImageFont.FreeTypeFont:
    """A font of so many pixels that can write ``drawable(text)``."""
    return _load(size, text.isascii())


def drawable(text: str) -> str:
    r"""``text`` with escapes, such as \u732b, for controls and for what DejaVu lacks: Chinese, Japanese, Korean.

    A line on stderr says, once, which these are.
    """
    if text.isascii() and text.isprintable():
        return text
    controls = {letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")}
    lacking = {letter for letter in text if ord(letter) not in _letters()} - controls
    if new := lacking - _told:
        _told.update(new)
        shown = "".join(sorted(new))
        print(
            f"note: the font of the pictures lacks {shown}; they show codes such as {_code(shown[0])}", file=sys.stderr
        )
    return "".join(_code(letter) if letter in controls | lacking else letter for letter in text)


def plain(text: str) -> str:
    """``text`` as matplotlib is to be given it: drawable, and a pair of dollars begins no formula."""
    return drawable(text).replace("$", r"\$")


def short(names: Sequence[str], most: int) -> list[str]:
    """Different names, drawable, cut to so many letters and still different: by their ends, or else by numbers."""
    drawable("".join(names))  # so that one line tells what all of them lack
    whole = [drawable(name) for name in names]
    cut = [name if len(name) <= most else f"{name[: most - 3]}..." for name in whole]
    for end in (lambda place: whole[place][-(most // 3) :], lambda place: f" {place + 1}"):
        seen = Counter(cut)
        for place, name in enumerate(whole):
            if seen[cut[place]] > 1 and len(name) > most:
                cut[place] = f"{name[: most - 3 - len(end(place))]}...{end(place)}"
    return cut


def _code(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


@lru_cache
def _letters() -> frozenset[int]:
    """What DejaVu Sans can write."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_dejavu())).get_charmap())


@lru_cache
def _load(size: int, ascii: bool) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size) if ascii else ImageFont.truetype(_dejavu(), size)


def _dejavu() -> Path:
    # The folder is asked for without importing matplotlib, which takes a while.
    return Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
