"""What annotations of any format may hold: sides and boxes that can be, names that can be shown, files inside."""

import os
import unicodedata

LONGEST_SIDE = 100_000  # pixels
MOST_PIXELS = 178_956_970  # beyond it Pillow refuses to decode, since such a file may be a decompression bomb
FARTHEST = 1e9  # pixels


def is_plain(text: str) -> bool:
    """Whether a name can be written to a terminal, a file and a picture without doing anything to them."""
    # isprintable is quicker, and says no to some that can be shown.
    return text.isprintable() or not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def leads_out(name: str) -> bool:
    """Whether the name of a file, relative to a folder, is that of one outside."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir


def too_many_pixels(height: int, width: int) -> str | None:
    """What to say of an image whose sides are possible, and whose area is not."""
    if height * width <= MOST_PIXELS:
        return None
    return f"is {width}x{height} pixels, more than the {MOST_PIXELS:,} that are read; cut it into tiles"
