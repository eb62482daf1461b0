"""A contact sheet of annotated images, to see whether boxes and classes are where they should be."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .boxes import draw_boxes
from .sheets import lay_out, save_png

_CELL = 360  # pixels
_ACROSS = 4


def draw_samples(
    path: str | Path,
    samples: Sequence[tuple[Image.Image, list, list[int], str]],
    class_names: Sequence[str],
    title: str,
) -> None:
    """Images with their boxes; samples: (picture, boxes_xyxy [n, 4] in its pixels, labels [n], caption)."""
    blocks = []
    for picture, boxes_xyxy, labels, caption in samples:
        drawn = draw_boxes(picture, boxes_xyxy, labels, None, class_names, scale=_CELL / max(picture.size))
        blocks.append([(drawn, caption)])
    save_png(path, lay_out(blocks, min(_ACROSS, len(blocks)), _CELL, title, "boxes as training sees them", class_names))
