"""Text in pictures: Pillow's own font for ASCII, matplotlib's DejaVu Sans for others; and no formulas."""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont


def font(size: int, text: str) -> ImageFont.FreeTypeFont:
    """A font of so many pixels that can write ``text``, as far as DejaVu can: not Chinese, Japanese and Korean."""
    return _load(size, text.isascii())


def plain(text: str) -> str:
    """``text`` as matplotlib is to be given it: a pair of dollars, in a name or a path, begins no formula."""
    return text.replace("$", r"\$")


@lru_cache
def _load(size: int, ascii: bool) -> ImageFont.FreeTypeFont:
    if ascii:
        return ImageFont.load_default(size)
    # The folder is asked for without importing matplotlib, which takes a while.
    folder = Path(find_spec("matplotlib").origin).parent
    return ImageFont.truetype(folder / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)
