"""Whether the canvases of a run are such that the backbone's maps cover them exactly."""

from ..config import Config
from ..data.shapes import MIN_SIZE


def demand_canvas(config: Config, multiple: int) -> None:
    """ValueError, with what to type, unless all canvases of ``config`` are whole multiples of so many pixels.

    A map of a smaller or a larger region would have its objects elsewhere than their boxes are.
    """
    images = config.images
    needed = f"this backbone needs heights and widths that are multiples of {multiple}"
    if config.data == "shapes":
        if MIN_SIZE % multiple:
            raise ValueError(
                f"--data shapes: these images are {MIN_SIZE}x{MIN_SIZE}, and {needed}: give data of yours, or another "
                "--model.backbone.name or --model.backbone.outputs"
            )
    elif images.recipe == "fixed":
        if any(side % multiple for side in images.canvas):
            height, width = (max(1, round(side / multiple)) * multiple for side in images.canvas)
            given = " ".join(map(str, images.canvas))
            raise ValueError(f"--images.canvas {given}: {needed}: give --images.canvas {height} {width}")
    elif images.multiple % multiple:
        fitting = max(1, images.multiple // multiple) * multiple
        raise ValueError(f"--images.multiple {images.multiple}: {needed}: give --images.multiple {fitting}")
