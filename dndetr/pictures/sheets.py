"""Contact sheets: the first training batch with its noised queries, and predictions beside the ground truth."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..boxes import cxcywh_to_xyxy
from ..data.sample import IMAGENET, denormalise
from ..files import write_atomic
from .boxes import INK, WHITE, BoxCanvas, Colour, class_colour, draw_boxes
from .fonts import drawable, font, short

_PAPER: Colour = (250, 250, 248)
_GREY: Colour = (118, 122, 130)
FLIPPED: Colour = (255, 225, 120)
_GAP = 14
_SHOWN_GROUPS = 3
TAG_LETTERS = 24  # of a class name, where two stand in one tag
_LEGEND = 12  # classes; more names would push the pictures off the page


def batch_images(images: Tensor, sizes: Tensor, colours: Tensor = IMAGENET) -> list[Image.Image]:
    """Images [B, 3, H, W] normalised by ``colours``, cut to valid sizes [B, 2] (height, width) -> RGB pictures."""
    return [
        Image.fromarray(denormalise(image[:, :h, :w], colours))
        for image, (h, w) in zip(images, sizes.tolist(), strict=True)
    ]


def draw_first_batch(
    path: str | Path,
    images: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    labels: Tensor,
    counts: Tensor,
    noised_boxes: Tensor | None,
    noised_labels: Tensor | None,
    class_names: Sequence[str],
    colours: Tensor = IMAGENET,
) -> None:
    """Up to 8 images of a batch: ground truth, then what the decoder is fed in the first denoising groups.

    images [B, 3, H, W] normalised by ``colours``; sizes [B, 2] valid (height, width); boxes [B, T, 4], labels
    [B, T], counts [B] ground truth; noised_boxes [B, G, T, 4], noised_labels [B, G, T], or None without denoising. A
    noised box is dashed in the colour of the class it claims, and joined to the centre of its object; a flipped label
    reads "circle > star".
    """
    pictures = batch_images(images[:8], sizes[:8], colours)
    groups = 0 if noised_boxes is None else noised_boxes.shape[1]
    shown = min(groups, _SHOWN_GROUPS)
    cell, names = 300 if shown else 360, short(class_names, TAG_LETTERS)
    blocks = []
    for row, picture in enumerate(pictures):
        count = int(counts[row])
        true = labels[row, :count].tolist()
        truth = pixels_of(boxes[row, :count], picture)
        scale = cell / max(picture.size)
        panels = [(draw_boxes(picture, truth, true, None, class_names, scale=scale), f"{count} objects")]
        for group in range(shown):
            canvas = BoxCanvas(picture, scale)
            for box in truth:
                canvas.outline(box, WHITE, width=1, shadow=True)
            noised = pixels_of(noised_boxes[row, group, :count], picture)
            claimed = noised_labels[row, group, :count].tolist()
            for box, new, label in zip(truth, noised, claimed, strict=True):
                canvas.outline(new, class_colour(label), dashed=True)
                canvas.arrow(centre(box), centre(new), class_colour(label))
            flipped = [slot for slot in range(count) if claimed[slot] != true[slot]]
            tags = [(noised[slot], f"{names[true[slot]]} > {names[claimed[slot]]}", FLIPPED) for slot in flipped]
            canvas.tag_all(tags, crowd=count, background=INK)
            panels.append((canvas.image, f"group {group + 1}: {len(flipped)} of {count} labels flipped"))
        blocks.append(panels)
    title = "First training batch"
    note = "solid: ground truth"
    if shown:
        which = f"{shown} of {groups} denoising groups" if shown < groups else f"{groups} denoising groups"
        note = f"solid: ground truth    dashed: noised queries, in the colour of the class they claim ({which})"
    across = 2 if shown else 4
    save_png(path, lay_out(blocks, across if len(blocks) >= across else len(blocks), cell, title, note, class_names))


def draw_predictions(
    path: str | Path,
    images: Sequence[Image.Image],
    detections: Sequence[tuple],
    truths: Sequence[tuple] | None,
    class_names: Sequence[str],
    threshold: float = 0.5,
    *,
    caption: str = "",
) -> None:
    """Up to 12 images with the predictions above a score, and the ground truth as thin white boxes.

    images: pictures; detections: (scores [k], labels [k], boxes_xyxy [k, 4]) per image, in its pixels; truths: (labels
    [n], boxes_xyxy [n, 4]) per image, or None; caption: shown in the title line, for example "AP 0.79".
    """
    blocks = []
    for row, picture in enumerate(images[:12]):
        scores, labels, boxes = (torch.as_tensor(field) for field in detections[row])
        chosen = scores >= threshold
        truth = [] if truths is None else torch.as_tensor(truths[row][1]).tolist()
        drawn = draw_boxes(
            picture,
            boxes[chosen].tolist(),
            labels[chosen].tolist(),
            scores[chosen].tolist(),
            class_names,
            scale=400 / max(picture.size),
            truth_xyxy=truth,
        )
        text = f"{int(chosen.sum())} predicted"
        blocks.append([(drawn, text if truths is None else f"{text}, {len(truth)} in the ground truth")])
    note = f"predictions with score >= {threshold:g}" + ("" if truths is None else "    thin white: ground truth")
    title = "Predictions" + (f"    {caption}" if caption else "")
    across = min(4, len(blocks)) or 1
    save_png(path, lay_out(blocks, across, 400, title, note, class_names))


def pixels_of(boxes: Tensor, picture: Image.Image) -> list[list[float]]:
    """Normalised cxcywh [n, 4] -> xyxy in pixels of the picture."""
    scale = torch.tensor([picture.width, picture.height] * 2)
    return (cxcywh_to_xyxy(boxes.detach().float().cpu()) * scale).tolist()


def centre(box: Sequence[float]) -> tuple[float, float]:
    """Of a box xyxy, x and y."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def lay_out(
    blocks: list[list[tuple[Image.Image, str]]],
    across: int,
    cell: int,
    title: str,
    note: str,
    class_names: Sequence[str],
) -> Image.Image:
    """Blocks of panels (picture, caption), ``across`` in a row, under a title and the colours of the classes."""
    panels = max((len(block) for block in blocks), default=1)
    rows = [blocks[start : start + across] for start in range(0, len(blocks), across)]
    heights = [max(picture.height for block in row for picture, _ in block) for row in rows]
    block_width = panels * cell + (panels - 1) * _GAP // 2
    width = max(across * block_width + (across - 1) * 2 * _GAP + 2 * _GAP, 720)
    legend = _legend(class_names, width - 2 * _GAP)
    header = 84 + 28 * len(legend)
    page = Image.new("RGB", (width, header + sum(heights) + len(rows) * (26 + _GAP)), _PAPER)
    draw = ImageDraw.Draw(page)
    title, note = drawable(title), drawable(note)
    draw.text((_GAP, 12), title, font=font(26, title), fill=INK)
    draw.text((_GAP, 50), note, font=font(16, note), fill=_GREY)
    for line, entries in enumerate(legend):
        for x, name, colour in entries:
            y = 82 + 28 * line
            draw.rounded_rectangle((_GAP + x, y, _GAP + x + 16, y + 16), radius=4, fill=colour)
            draw.text((_GAP + x + 23, y - 1), name, font=font(16, name), fill=INK)
    y = header
    for row, height in zip(rows, heights, strict=True):
        for column, block in enumerate(row):
            x = _GAP + column * (block_width + 2 * _GAP)
            for picture, caption in block:
                left = x + (cell - picture.width) // 2
                page.paste(picture, (left, y))
                caption = drawable(caption)
                draw.text((left, y + height + 4), caption, font=font(14, caption), fill=_GREY)
                x += cell + _GAP // 2
        y += height + 26 + _GAP
    return page


def _legend(class_names: Sequence[str], width: int) -> list[list[tuple[float, str, Colour]]]:
    """Lines of (x, name, colour) that fit the width; the classes beyond the first are only counted."""
    names = short(class_names, 40)[:_LEGEND]
    entries = [(name, class_colour(label)) for label, name in enumerate(names)]
    if len(class_names) > _LEGEND:
        entries.append((f"and {len(class_names) - _LEGEND} more", _PAPER))
    lines: list[list[tuple[float, str, Colour]]] = [[]]
    x = 0.0
    for name, colour in entries:
        needed = 23 + font(16, name).getlength(name) + 26
        if x and x + needed > width:
            lines.append([])
            x = 0.0
        lines[-1].append((x, name, colour))
        x += needed
    return lines


def save_png(path: str | Path, page: Image.Image) -> None:
    """Write a page atomically."""
    buffer = io.BytesIO()
    page.save(buffer, format="PNG", compress_level=4)  # as small as level 6, in half the time
    write_atomic(path, buffer.getvalue())
