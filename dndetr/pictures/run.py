"""The pictures in a run's folder: the first batch with its noise, predictions beside the truth, what is restored."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..batch import Batch
from ..boxes import cxcywh_to_xyxy
from ..data.sample import normalisation
from ..denoising import NoisedQueries
from ..models.dn_detr import Predictions
from ..ops import images_of
from ..runs.listener import Listener, Run
from ..scoring.coco import postprocess
from .curves import draw_curves
from .denoising import write_denoising
from .sheets import batch_images, draw_first_batch, draw_predictions

_PICTURED = 12  # validation images in predictions.png
_THRESHOLD = 0.35  # score from which a prediction is drawn


class Pictures(Listener):
    """Draws ``first_batch.png`` before the first step, and all the others when the last one is done."""

    def run_started(self, run: Run) -> None:
        self._run, self._colours = run, normalisation(run.config.images)

    def first_batch(self, batch: Batch, noised: NoisedQueries | None) -> None:
        draw_training(self._run.folder / "first_batch.png", batch, noised, self._run.names, self._colours)

    def run_ended(self, how: str, reason: str, row: dict) -> None:
        if how != "finished":
            return
        run, folder = self._run, self._run.folder
        draw_validation(folder / "predictions.png", run.infer, run.validation(), run.names, row, self._colours)
        write_denoising(folder, run.infer, run.validation(), run.names, run.config, run.device)
        draw_curves(folder / "metrics.jsonl", folder / "curves.png", f"{run.config.preset} on {run.config.data_name}")


def draw_training(
    path: Path, batch: Batch, noised: NoisedQueries | None, names: Sequence[str], colours: Tensor
) -> None:
    """Ground truth of a training batch, and the noised boxes and labels that the decoder is to restore."""
    targets = batch.targets
    labels, boxes, _ = (None,) * 3 if noised is None else noised.positives(targets)
    truth = (targets.boxes, targets.labels, targets.counts)
    draw_first_batch(path, images_of(batch), batch.sizes, *truth, boxes, labels, names, colours)


def draw_validation(
    path: Path,
    infer: Callable[[Batch], Predictions],
    batches: Iterable[Batch],
    names: Sequence[str],
    metrics: Mapping,
    colours: Tensor,
) -> None:
    """Predictions on the first validation images beside their ground truth; metrics: AP and AP50, for the caption."""
    pictures, detections, truths = [], [], []
    for batch in batches:
        logits, boxes = (layers[-1] for layers in infer(batch)[:2])
        pictures += batch_images(images_of(batch), batch.sizes, colours)
        # In the canvas's own pixels, since that is what is drawn.
        found = postprocess(logits, boxes, batch.sizes.to(boxes.device), keep=50)
        detections += [tuple(field.cpu() for field in one) for one in zip(*found, strict=True)]
        truths += _truths(batch)
        if len(pictures) >= _PICTURED:
            break
    caption = "" if metrics.get("AP") is None else f"AP {metrics['AP']:.3f}   AP50 {metrics['AP50']:.3f}"
    shown = slice(_PICTURED)
    draw_predictions(path, pictures[shown], detections[shown], truths[shown], names, _THRESHOLD, caption=caption)


def _truths(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Labels and boxes in canvas pixels of each image."""
    height, width = batch.sizes.unbind(-1)
    scale = torch.stack((width, height, width, height), dim=-1)
    corners = cxcywh_to_xyxy(batch.targets.boxes) * scale[:, None]
    counts = batch.targets.counts.tolist()
    return [(labels[:n], boxes[:n]) for labels, boxes, n in zip(batch.targets.labels, corners, counts, strict=True)]
