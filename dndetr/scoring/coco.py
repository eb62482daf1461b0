"""From model outputs to detections, and COCO's average precision, with pycocotools as the referee."""

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from ..batch import Batch
from ..boxes import cxcywh_to_xyxy
from ..data.classes import Classes, distinct_names
from ..data.records import Records
from .evaluators import by_hotcoco, by_pycocotools, class_by_class
from .ids import id_array, places_in
from .results import Results
from .truth import Truth

STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class Detections(NamedTuple):
    """Detections of B images, best first.

    scores [B, k] in [0, 1]; labels [B, k] int64 in [0, K); boxes_xyxy [B, k, 4] in pixels of the original image.
    ``[Detections(*one) for one in zip(*detections)]`` takes the batch apart.
    """

    scores: Tensor
    labels: Tensor
    boxes_xyxy: Tensor


class Evaluation(NamedTuple):
    """Metrics of one evaluation (see ``coco_evaluate``), its COCO results, and the ids of the images in it."""

    metrics: dict
    results: Results
    image_ids: list[int]


class Scores(NamedTuple):
    """What pycocotools accumulates, -1 where there was nothing to measure.

    precision [10, 101, K, 4, 3] and recall [10, K, 4, 3]: IoU 0.5 to 0.95, recall 0 to 1, class, area (all, small,
    medium, large), most detections of an image (1, 10, 100); classes: (category id, name), ascending by id.
    """

    precision: np.ndarray
    recall: np.ndarray
    classes: Classes


def postprocess(logits: Tensor, boxes: Tensor, original_sizes: Tensor, keep: int = 100) -> Detections:
    """The ``keep`` most probable (query, class) pairs of each image; no suppression, no clipping, no threshold.

    logits [B, N, K]; boxes [B, N, 4]; original_sizes [B, 2] (height, width) -> Detections with k = min(keep, N * K), on
    the device and in at least float32. One query may be returned with several classes, as in Deformable DETR.
    """
    classes = logits.shape[-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    probabilities = logits.sigmoid().flatten(1)
    scores, index = probabilities.topk(min(keep, probabilities.shape[1]), dim=1)
    query = (index // classes).unsqueeze(-1).expand(-1, -1, 4)
    height, width = original_sizes.to(boxes.dtype).unbind(-1)
    scale = torch.stack((width, height, width, height), dim=-1)
    return Detections(scores, index % classes, cxcywh_to_xyxy(boxes).gather(1, query) * scale[:, None])


def coco_results(detections: Detections, image_ids: Sequence[int], classes: Classes) -> Results:
    """Detections in COCO's results format: image_id, category_id, bbox xywh in pixels, score.

    image_ids [B]; classes: (category id, name) in label order -> B * k rows, image by image. Boxes are rounded to
    1/1000 of a pixel and scores to 6 decimals: enough for AP, and a file half as large. ValueError where a number is
    not finite.
    """
    scores = detections.scores.double().cpu().numpy()
    boxes = detections.boxes_xyxy.double().cpu().numpy()
    finite = np.isfinite(scores).all(axis=1) & np.isfinite(boxes).all(axis=(1, 2))
    if not finite.all():
        bad = [int(image_ids[row]) for row in np.flatnonzero(~finite)[:5]]
        raise ValueError(
            f"the model predicts NaN or infinite scores or boxes (first image ids: {bad}); it has diverged"
        )
    boxes = np.concatenate((boxes[..., :2], boxes[..., 2:] - boxes[..., :2]), axis=-1)
    return Results(
        np.repeat(np.asarray(image_ids, np.int64), scores.shape[1]),
        id_array([category_id for category_id, _ in classes])[detections.labels.cpu().numpy().ravel()],
        boxes.reshape(-1, 4).round(3),
        scores.ravel().round(6),
    )


def coco_evaluate(
    ground_truth: Records | Truth | dict,
    results: Iterable[dict],
    image_ids: Iterable[int] | None = None,
    fast: bool = False,
) -> dict:
    """COCO box metrics by pycocotools, without its prints; at most 100 detections of an image and class count.

    ground_truth: also a COCO dict (see ``Truth.of``); results: a ``Results``, or dictionaries; image_ids: the images to
    score (default: all); fast: by hotcoco, whose numbers are the same -> the twelve numbers of ``STATISTICS`` and
    ``classes``, the AP of each class by name. In [0, 1]; None where nothing could be measured (no such objects).
    ValueError as of ``coco_scores``.
    """
    return metrics_of(coco_scores(ground_truth, results, image_ids, fast))


def coco_scores(
    ground_truth: Records | Truth | dict,
    results: Iterable[dict],
    image_ids: Iterable[int] | None = None,
    fast: bool = False,
) -> Scores:
    """What ``coco_evaluate`` makes its numbers of; arguments as there.

    ValueError for results on images that are unknown, and for boxes or scores that are not finite.
    """
    truth, found = Truth.of(ground_truth), Results.of(results)
    images = np.unique(truth.images)
    if (unknown := places_in(images, found.image_ids) < 0).any():
        ids = np.unique(found.image_ids[unknown])[:5].tolist()
        raise ValueError(f"results for images that the annotations do not have: ids {ids}")
    _demand_finite("results", found.image_ids, found.boxes_xywh, found.scores)
    _demand_finite("annotations", truth.image_ids, truth.boxes_xywh, truth.areas)
    if image_ids is not None:
        images = np.intersect1d(images, id_array([*image_ids]))
    classes = sorted(truth.classes)
    category_ids = id_array([category_id for category_id, _ in classes])
    evaluator = by_hotcoco if fast else by_pycocotools
    return Scores(*class_by_class(truth, found, images, category_ids, evaluator), classes)


def _demand_finite(what: str, image_ids: np.ndarray, boxes: np.ndarray, numbers: np.ndarray) -> None:
    finite = np.isfinite(boxes).all(axis=1) & np.isfinite(numbers)
    if not finite.all():
        ids = np.unique(image_ids[~finite])[:5].tolist()
        raise ValueError(f"{what} with numbers that are not finite, which cannot be scored: image ids {ids}")


def precision_by_class(scores: Scores) -> dict[str, np.ndarray]:
    """Precision at IoU 0.5 to 0.95 (rows) and recall 0 to 1 by hundredths, all areas, best 100, by class.

    Names are those of ``distinct_names`` -> [10, 101] each, -1 throughout for classes without objects.
    """
    names = distinct_names(scores.classes)
    return {name: scores.precision[:, :, column, 0, -1] for column, name in enumerate(names)}


def metrics_of(scores: Scores) -> dict:
    """The result of ``coco_evaluate``."""
    referee = COCOeval(iouType="bbox")
    referee.eval = {"precision": scores.precision, "recall": scores.recall}
    with contextlib.redirect_stdout(io.StringIO()):
        referee.summarize()
    metrics = {name: _measured(value) for name, value in zip(STATISTICS, referee.stats, strict=True)}
    metrics["classes"] = {
        name: _measured(values[values > -1].mean()) if (values > -1).any() else None
        for name, values in precision_by_class(scores).items()
    }
    return metrics


def detect(
    predict: Callable[[Batch], tuple[Tensor, Tensor]],
    batches: Iterable[Batch],
    classes: Classes,
    keep: int = 100,
) -> tuple[Results, list[int]]:
    """COCO results of a model over the images that ``batches`` delivers, and the ids of these, ascending.

    predict: batch -> logits [B, N, K], boxes [B, N, 4]; classes: (category id, name) in label order; keep: detections
    per image. An image that comes twice (a sampler that pads) counts once.
    """
    results, seen = [], set()
    for batch in batches:
        logits, boxes = predict(batch)
        detections = postprocess(logits, boxes, batch.original_sizes.to(boxes.device), keep)
        image_ids = batch.ids.tolist()
        rows = []
        for row, image_id in enumerate(image_ids):
            if image_id not in seen:
                seen.add(image_id)
                rows.append(row)
        fresh = Detections(*(field[rows] for field in detections))
        results.append(coco_results(fresh, [image_ids[row] for row in rows], classes))
    return Results.joined(results), sorted(seen)


def _measured(value: float) -> float | None:
    """pycocotools says -1 where there was nothing to measure."""
    return float(value) if value > -1 else None
