"""One image with boxes on it: class colours, solid and dashed outlines, labels that keep out of each other's way."""

import colorsys
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .fonts import drawable, font, short

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
INK: Colour = (24, 26, 32)

_CROWD = 100  # boxes up to which every one is tagged; COCO's fullest image has 93
_COVERED = 0.25  # of a crowded picture, by its tags: more of them hide what they name

# Bright enough for dark photographs, saturated enough for light ones, neighbours far apart in hue.
_PALETTE: tuple[Colour, ...] = (
    (255, 92, 77), (45, 156, 255), (255, 190, 38), (38, 194, 129), (190, 110, 255), (255, 128, 196),
    (22, 197, 214), (255, 139, 38), (160, 205, 45), (122, 134, 255), (214, 73, 122), (176, 136, 92),
)  # fmt: skip


def class_colour(label: int) -> Colour:
    """The colour of a class, the same in every picture: a fixed palette, then hues by the golden ratio."""
    if label < len(_PALETTE):
        return _PALETTE[label]
    hue = (label * 0.618034) % 1
    red, green, blue = colorsys.hls_to_rgb(hue, 0.58 + 0.1 * (label % 3 - 1), 0.75)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    image: Image.Image,
    boxes_xyxy: Iterable[Sequence[float]],
    labels: Sequence[int],
    scores: Sequence[float] | None = None,
    class_names: Sequence[str] = (),
    *,
    scale: float | None = None,
    truth_xyxy: Iterable[Sequence[float]] = (),
) -> Image.Image:
    """A copy of ``image`` with a box and a tag ("name 0.87") for each detection, best scores on top.

    Of more than 100 boxes only the best, or without scores the largest, have a tag, and a line in the picture says so.

    boxes_xyxy, truth_xyxy [n, 4] in pixels of ``image`` (lists, arrays or tensors); labels [n] in [0, K); scores [n];
    class_names: names in label order; truth_xyxy: boxes drawn as thin white lines underneath; scale: enlargement of the
    picture (default: small images grow to 480 pixels, so that tags can be read) -> RGB image.
    """
    if scale is None:
        scale = max(1.0, 480 / max(image.size))
    canvas = BoxCanvas(image, scale)
    for box in truth_xyxy:
        canvas.outline(_numbers(box), WHITE, width=1, shadow=True)
    boxes = [_numbers(box) for box in boxes_xyxy]
    labels = [int(label) for label in labels]
    order = range(len(boxes)) if scores is None else sorted(range(len(boxes)), key=lambda row: float(scores[row]))
    for row in order:
        canvas.outline(boxes[row], class_colour(labels[row]))
    names, tags = short(class_names, 40), []
    for row in reversed(order):
        name = names[labels[row]] if labels[row] < len(names) else str(labels[row])
        text = name if scores is None else f"{name} {float(scores[row]):.2f}"
        tags.append((boxes[row], text, class_colour(labels[row])))
    canvas.tag_all(tags, crowd=len(boxes), ranked=scores is not None)
    return canvas.image


class BoxCanvas:
    """An enlarged copy of an image to draw on; boxes are given in pixels of the original."""

    def __init__(self, image: Image.Image, scale: float):
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        resampling = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS
        self.image = image.convert("RGB").resize(size, resampling)
        self._scale = (size[0] / image.width, size[1] / image.height)
        self._draw = ImageDraw.Draw(self.image, "RGBA")
        side = max(size)
        self._width = max(2, round(side / 400))
        self._letters = max(11, min(28, round(side / 40)))  # their height
        self._boxes: list[tuple] = []
        self._tags: list[tuple] = []

    def outline(
        self, box: Sequence[float], colour: Colour, *, width: int | None = None, dashed: bool = False, shadow=False
    ) -> None:
        """One box; a shadow keeps a thin light line visible on a light ground."""
        x0, y0, x1, y1 = self._place(box)
        width = width or self._width
        if shadow:
            self._draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(0, 0, 0, 110), width=width + 2)
        if not dashed:
            self._draw.rectangle((x0, y0, x1, y1), outline=(*colour, 255), width=width)
            self._boxes.append((x0, y0, x1, y1))
            return
        for a, b, fixed, horizontal in (
            (x0, x1, y0, True),
            (x0, x1, y1, True),
            (y0, y1, x0, False),
            (y0, y1, x1, False),
        ):
            for start, stop in _dashes(a, b, dash=5 * width, gap=3 * width):
                line = (start, fixed, stop, fixed) if horizontal else (fixed, start, fixed, stop)
                self._draw.line(line, fill=(*colour, 255), width=width)

    def tag_all(
        self,
        tags: Sequence[tuple[Sequence[float], str, Colour]],
        *,
        crowd: int,
        ranked: bool = False,
        background: Colour | None = None,
    ) -> None:
        """Labels (box, text, colour), the first at the best places; crowd: the number of boxes in the picture.

        In a crowd only as many are drawn as leave the picture visible, and a line says how many: the first where labels
        are ranked, else those of the largest boxes.
        """
        room, drawn = float("inf"), 0
        if crowd > _CROWD:
            room = _COVERED * self.image.width * self.image.height
            tags = tags if ranked else sorted(tags, key=lambda tag: _area(tag[0]), reverse=True)
        for box, text, colour in tags:
            if room <= 0 or drawn == _CROWD:
                break
            room -= _area(self.tag(box, text, colour, background=background))
            drawn += 1
        if drawn < len(tags):
            text = f"tags: {drawn} {'best' if ranked else 'largest'} of {len(tags):,}"
            width, height = self._tag_size(text)
            self._draw_tag(self._inside(0, self.image.height, width, height), text, WHITE, INK)

    def tag(
        self, box: Sequence[float], text: str, colour: Colour, *, background: Colour | None = None
    ) -> tuple[float, float, float, float]:
        """A label at the first place around the box that is inside the picture and hides the least -> its area.

        background: dark tag with a coloured text instead of a coloured tag.
        """
        x0, y0, x1, y1 = self._place(box)
        text = drawable(text)
        width, height = self._tag_size(text)
        edge = self._width
        places = [
            (x0, y0 - height), (x0, y1 + 1), (x1 - width + 1, y0 - height), (x1 - width + 1, y1 + 1), (x1 + edge, y0),
            (x0 - width, y0), (x1 + edge, y1 - height), (x0 - width, y1 - height), (x0, y0), (x1 - width, y1 - height),
        ]  # fmt: skip
        areas = [self._inside(x, y, width, height) for x, y in places]
        # A tag hidden by another is lost, one over a box is only untidy, one pushed off its box is misread.
        moved = [abs(area[0] - x) + abs(area[1] - y) for area, (x, y) in zip(areas, places, strict=True)]
        costs = (
            10 * _overlaps(areas, self._tags)
            + _overlaps(areas, self._boxes) * 0.5
            + np.array(moved) * height * 0.5
            + np.arange(len(places)) * 0.01 * width * height
        )
        area = areas[int(costs.argmin())]
        self._tags.append(area)
        luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        ink = colour if background else (INK if luminance > 140 else WHITE)
        self._draw_tag(area, text, ink, background or colour)
        return area

    def arrow(self, start: Sequence[float], stop: Sequence[float], colour: Colour) -> None:
        """A thin line with a dot at its end, from point to point in pixels of the original."""
        (x0, y0), (x1, y1) = ((x * self._scale[0], y * self._scale[1]) for x, y in (start, stop))
        self._draw.line((x0, y0, x1, y1), fill=(*colour, 220), width=1)
        radius = self._width
        self._draw.ellipse((x1 - radius, y1 - radius, x1 + radius, y1 + radius), fill=(*colour, 255))

    def _place(self, box: Sequence[float]) -> tuple[int, int, int, int]:
        """Canvas pixels of a box, kept so near the picture that a wild prediction costs no drawing time."""
        w, h = self.image.size
        x0, x1 = sorted(min(max(value * self._scale[0], -4.0), w + 3.0) for value in (box[0], box[2]))
        y0, y1 = sorted(min(max(value * self._scale[1], -4.0), h + 3.0) for value in (box[1], box[3]))
        return round(x0), round(y0), round(x1), round(y1)

    def _tag_size(self, text: str) -> tuple[float, float]:
        """Width and height of a tag."""
        letters, top, bottom, pad = self._lettering(text)
        return letters.getlength(text) + 2 * pad, bottom - top + 2 * pad

    def _draw_tag(self, area: Sequence[float], text: str, ink: Colour, ground: Colour) -> None:
        letters, top, _, pad = self._lettering(text)
        self._draw.rounded_rectangle(area, radius=pad, fill=(*ground, 235))
        self._draw.text((area[0] + pad, area[1] + pad - top), text, font=letters, fill=ink)

    def _lettering(self, text: str) -> tuple[ImageFont.FreeTypeFont, float, float, int]:
        """Font, top and bottom of its letters, and the room around them."""
        letters = font(self._letters, text)
        _, top, _, bottom = letters.getbbox("Ag")
        return letters, top, bottom, max(2, round((bottom - top) * 0.22))

    def _inside(self, x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
        x = max(0, min(x, self.image.width - 1 - width))
        y = max(0, min(y, self.image.height - 1 - height))
        return x, y, x + width, y + height


def _numbers(box) -> list[float]:
    return [float(value) for value in box]


def _dashes(start: int, stop: int, dash: int, gap: int) -> Iterable[tuple[int, int]]:
    return ((at, min(at + dash, stop)) for at in range(start, stop, dash + gap))


def _area(box: Sequence[float]) -> float:
    return abs((box[2] - box[0]) * (box[3] - box[1]))


def _overlaps(areas: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> np.ndarray:
    """Of each area, the sum of what others hide of it."""
    a, b = (np.array(boxes, np.float64).reshape(-1, 4) for boxes in (areas, others))
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    return (high - low).clip(0).prod(-1).sum(1)
