"""What denoising does, in one picture: noised boxes on their way back, and the numbers behind them."""

import io
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..analysis.reconstruction import Example, Reconstruction, measure_reconstruction
from ..data.sample import IMAGENET, normalisation
from ..files import write_json_atomic
from ..runs.run_log import read_rows
from .boxes import INK as TAG
from .boxes import WHITE, BoxCanvas, class_colour
from .charts import AMBER, BLUE, CORAL, DASHED, DPI, GREEN, INK, figure, finish, png
from .curves import draw_denoising_log
from .fonts import short
from .sheets import FLIPPED, TAG_LETTERS, batch_images, centre, lay_out, pixels_of, save_png

if TYPE_CHECKING:
    import torch

    from ..batch import Batch
    from ..config import Config

_CELL = 300
_ACROSS = 2


def write_denoising(
    folder: Path,
    infer: Callable,
    batches: Iterable["Batch"],
    names: Sequence[str],
    config: "Config",
    device: "torch.device",
) -> dict | None:
    """Measure what the weights restore; write it as ``denoising.json`` and draw it, with the log, as ``denoising.png``.

    infer, batches: as for ``measure_reconstruction``; names: of the classes, in label order -> the report, or None
    where there is nothing to measure: no denoising in ``config``, no objects.
    """
    noise = config.denoising
    if noise.groups == 0:
        return None
    reconstruction = measure_reconstruction(infer, batches, len(names), noise.label_noise, device)
    if reconstruction is None:
        return None
    write_json_atomic(folder / "denoising.json", reconstruction.report)
    rows = read_rows(folder / "metrics.jsonl")
    colours = normalisation(config.images)
    draw_denoising(folder / "denoising.png", reconstruction, rows, names, noise.box_noise, colours=colours)
    return reconstruction.report


def draw_denoising(
    path: str | Path,
    reconstruction: Reconstruction,
    rows: Sequence[dict],
    class_names: Sequence[str],
    box_noise: float,
    title: str = "Denoising",
    colours: "torch.Tensor" = IMAGENET,
) -> None:
    """Draw a Reconstruction and the denoising numbers of a log's rows as one PNG.

    Images are those that ``colours`` normalised. Each is shown at the training's noise (the level next to
    ``box_noise``) and at the highest level. Thin white: ground truth; dashed: noised box in the colour of the class it
    claims; from its centre a line to where each decoder layer moves it; solid: box and class after the last layer.
    """
    levels = reconstruction.report["levels"]
    near = min(range(len(levels)), key=lambda index: abs(levels[index] - box_noise))
    shown = [near] if near == len(levels) - 1 else [near, len(levels) - 1]
    examples = reconstruction.examples
    names = short(class_names, TAG_LETTERS)
    blocks = [[_restored(example, level, levels[level], names, colours) for level in shown] for example in examples]
    note = (
        "thin white: ground truth    dashed: noised box, in the colour of the class it claims    "
        "line: its way through the layers    "
        "solid: restored    tag: flipped > restored"
    )
    sheet = lay_out(blocks, _ACROSS, _CELL, title, note, class_names)
    panel = _panel(reconstruction.report, rows, box_noise, max(sheet.width, 1200))
    page = Image.new("RGB", (panel.width, sheet.height + panel.height), "white")
    page.paste(sheet.resize((panel.width, sheet.height)) if sheet.width > panel.width else sheet, (0, 0))
    page.paste(panel, (0, sheet.height))
    save_png(path, page)


def _restored(
    example: Example, level: int, noise: float, class_names: Sequence[str], colours: "torch.Tensor"
) -> tuple[Image.Image, str]:
    """One image at one noise level, and its caption."""
    (picture,) = batch_images(example.image[None], example.boxes.new_tensor([example.size]).long(), colours)
    canvas = BoxCanvas(picture, _CELL / max(picture.size))
    true, claimed = example.labels.tolist(), example.noised_labels[level].tolist()
    found = example.restored_labels[level].tolist()
    start = pixels_of(example.noised_boxes[level], picture)
    ways = [pixels_of(layer, picture) for layer in example.restored_boxes[:, level]]
    for box in pixels_of(example.boxes, picture):
        canvas.outline(box, WHITE, width=1, shadow=True)
    for slot, box in enumerate(start):
        canvas.outline(box, class_colour(claimed[slot]), width=1, dashed=True)
        colour = class_colour(found[slot])
        stops = [centre(box), *(centre(way[slot]) for way in ways)]
        for here, there in pairwise(stops):
            canvas.arrow(here, there, colour)
        canvas.outline(ways[-1][slot], colour)
    flips = [slot for slot in range(len(true)) if claimed[slot] != true[slot]]
    tags = [(ways[-1][slot], f"{class_names[claimed[slot]]} > {class_names[found[slot]]}", FLIPPED) for slot in flips]
    canvas.tag_all(tags, crowd=len(true), background=TAG)
    corrected = sum(found[slot] == true[slot] for slot in flips)
    return canvas.image, f"box noise {noise:g}: {corrected} of {len(flips)} flipped labels corrected"


def _panel(report: dict, rows: Sequence[dict], box_noise: float, width: int) -> Image.Image:
    """Three charts: error by noise level, labels by noise level, and what the log says."""
    page = figure((width / DPI, 3.6))
    error, label, share = page.subplots(1, 3)
    levels = report["levels"]
    error.plot(levels, report["noised_error"], color=CORAL, linestyle=DASHED, marker="o", markersize=3, label="noised")
    layers = report["error"]
    for index, values in enumerate(layers):
        alpha = 0.25 + 0.75 * (index + 1) / len(layers)
        error.plot(levels, values, color=BLUE, alpha=alpha, marker="o", markersize=3, label=f"after layer {index + 1}")
    error.set_ylim(bottom=0)
    for name, colour, text in (
        ("kept_correct", GREEN, "label was right"),
        ("flipped_corrected", AMBER, "label was flipped"),
    ):
        known = [(level, value) for level, value in zip(levels, report[name], strict=True) if value is not None]
        if known:
            label.plot(*zip(*known, strict=True), color=colour, marker="o", markersize=3, label=text)
    label.set_ylim(0, 1.02)
    for axes in (error, label):
        axes.axvline(box_noise, color=INK, linewidth=0.8, linestyle=":", label="largest in training")
    finish(error, "Error of the boxes, 1 - IoU", "box noise", whole=False)
    finish(label, "Share of right classes", "box noise", whole=False)
    draw_denoising_log(share, rows)
    return Image.open(io.BytesIO(png(page))).convert("RGB")
