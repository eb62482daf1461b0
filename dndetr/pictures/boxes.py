"""One image with boxes on it: class colours, solid and dashed outlines, labels that keep out of each other's way."""

import colorsys
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw

from .fonts import font

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
INK: Colour = (24, 26, 32)

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
    for row in reversed(order):  # the best label first: it gets the best place
        name = class_names[labels[row]] if labels[row] < len(class_names) else str(labels[row])
        text = name if scores is None else f"{name} {float(scores[row]):.2f}"
        canvas.tag(boxes[row], text, class_colour(labels[row]))
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

    def tag(self, box: Sequence[float], text: str, colour: Colour, *, background: Colour | None = None) -> None:
        """A label at the first place around the box that is inside the picture and hides the least.

        background: dark tag with a coloured text instead of a coloured tag.
        """
        x0, y0, x1, y1 = self._place(box)
        letters = font(self._letters, text)
        _, top, _, bottom = letters.getbbox("Ag")
        pad = max(2, round((bottom - top) * 0.22))
        width = letters.getlength(text) + 2 * pad
        height = bottom - top + 2 * pad
        edge = self._width
        places = [
            (x0, y0 - height), (x0, y1 + 1), (x1 - width + 1, y0 - height), (x1 - width + 1, y1 + 1), (x1 + edge, y0),
            (x0 - width, y0), (x1 + edge, y1 - height), (x0 - width, y1 - height), (x0, y0), (x1 - width, y1 - height),
        ]  # fmt: skip
        areas = [self._inside(x, y, width, height) for x, y in places]
        # A tag hidden by another is lost, one over a box is only untidy, one pushed off its box is misread.
        costs = [
            10 * sum(_overlap(area, other) for other in self._tags)
            + sum(_overlap(area, other) for other in self._boxes) * 0.5
            + (abs(area[0] - x) + abs(area[1] - y)) * height * 0.5
            + rank * 0.01 * width * height
            for rank, (area, (x, y)) in enumerate(zip(areas, places, strict=True))
        ]
        area = areas[costs.index(min(costs))]
        self._tags.append(area)
        luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        ink = colour if background else (INK if luminance > 140 else WHITE)
        self._draw.rounded_rectangle(area, radius=pad, fill=(*(background or colour), 235))
        self._draw.text((area[0] + pad, area[1] + pad - top), text, font=letters, fill=ink)

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

    def _inside(self, x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
        x = max(0, min(x, self.image.width - 1 - width))
        y = max(0, min(y, self.image.height - 1 - height))
        return x, y, x + width, y + height


def _numbers(box) -> list[float]:
    return [float(value) for value in box]


def _dashes(start: int, stop: int, dash: int, gap: int) -> Iterable[tuple[int, int]]:
    return ((at, min(at + dash, stop)) for at in range(start, stop, dash + gap))


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
