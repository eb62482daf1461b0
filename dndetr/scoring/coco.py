"""From model outputs to detections, COCO results and average precision, with pycocotools as the referee."""

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from ..batch import Batch
from ..boxes import cxcywh_to_xyxy
from ..data.classes import distinct_names

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
    results: list[dict]
    image_ids: list[int]


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


def coco_results(detections: Detections, image_ids: Sequence[int], classes: Sequence[tuple[int, str]]) -> list[dict]:
    """Detections in COCO's results format: image_id, category_id, bbox xywh in pixels, score.

    image_ids [B]; classes: (category id, name) in label order -> one dict per detection. Boxes are rounded to 1/1000 of
    a pixel and scores to 6 decimals: enough for AP, and a file half as large. ValueError where a number is not finite.
    """
    scores = detections.scores.double().cpu().numpy()
    boxes = detections.boxes_xyxy.double().cpu().numpy()
    finite = np.isfinite(scores).all(axis=1) & np.isfinite(boxes).all(axis=(1, 2))
    if not finite.all():
        bad = [int(image_ids[row]) for row in np.flatnonzero(~finite)[:5]]
        raise ValueError(
            f"the model predicts NaN or infinite scores or boxes (first image ids: {bad}); it has diverged"
        )
    boxes = np.concatenate((boxes[..., :2], boxes[..., 2:] - boxes[..., :2]), axis=-1).round(3).tolist()
    scores = scores.round(6).tolist()
    labels = detections.labels.tolist()
    category_ids = [category_id for category_id, _ in classes]
    return [
        {"image_id": int(image_id), "category_id": category_ids[label], "bbox": box, "score": score}
        for row, image_id in enumerate(image_ids)
        for score, label, box in zip(scores[row], labels[row], boxes[row], strict=True)
    ]


def coco_evaluate(
    ground_truth: dict, results: list[dict], image_ids: Iterable[int] | None = None, fast: bool = False
) -> dict:
    """COCO box metrics by pycocotools, without its prints; at most 100 detections of an image and class count.

    ground_truth: a COCO dict, left untouched (a missing ``area`` is w * h, a missing ``iscrowd`` 0); results: as from
    ``coco_results``; image_ids: the images to score (default: all); fast: by faster-coco-eval, which agrees with it ->
    the twelve numbers of ``STATISTICS`` and ``classes``, the AP of each class by name. In [0, 1]; None where nothing
    could be measured (no such objects).
    """
    return metrics_of(coco_referee(ground_truth, results, image_ids, fast))


def coco_referee(
    ground_truth: dict, results: list[dict], image_ids: Iterable[int] | None = None, fast: bool = False
) -> COCOeval:
    """pycocotools' evaluation (or its faster twin), done, for what ``coco_evaluate`` lacks; arguments as there.

    Images, categories and annotations have numbers of its own in there; a category keeps the data's id as ``data_id``.
    """
    images = _numbered(image["id"] for image in ground_truth["images"])
    categories = _numbered(category["id"] for category in ground_truth["categories"])
    unknown = {result["image_id"] for result in results} - images.keys()
    if unknown:
        raise ValueError(f"results for images that the annotations do not have: ids {sorted(unknown)[:5]}")
    truth = _index(ground_truth, images, categories, ground_truth["annotations"])
    detected = _index(ground_truth, images, categories, results)
    referee = (_fast_evaluation() if fast else COCOeval)(truth, detected, "bbox")
    if image_ids is not None:
        referee.params.imgIds = sorted(images[image_id] for image_id in image_ids if image_id in images)
    with contextlib.redirect_stdout(io.StringIO()):
        referee.evaluate()
        referee.accumulate()
        referee.summarize()
    return referee


def demand_fast_eval() -> None:
    """ModuleNotFoundError that says what to install, where faster-coco-eval is missing."""
    _fast_evaluation()


def _fast_evaluation():
    try:
        from faster_coco_eval import COCOeval_faster
    except ImportError as error:
        raise ModuleNotFoundError('--fast-eval needs faster-coco-eval: pip install -e ".[fast-eval]"') from error
    return COCOeval_faster


def precision_by_class(referee: COCOeval) -> dict[str, np.ndarray]:
    """Precision at IoU 0.5 to 0.95 (rows) and recall 0 to 1 by hundredths, all areas, best 100, by class.

    Names are those of ``distinct_names`` -> [10, 101] each, -1 throughout for classes without objects.
    """
    categories = [referee.cocoGt.cats[number] for number in referee.params.catIds]
    names = distinct_names([(category["data_id"], category["name"]) for category in categories])
    return {name: referee.eval["precision"][:, :, column, 0, -1] for column, name in enumerate(names)}


def metrics_of(referee: COCOeval) -> dict:
    """The result of ``coco_evaluate``."""
    metrics = {name: _measured(value) for name, value in zip(STATISTICS, referee.stats, strict=True)}
    metrics["classes"] = {
        name: _measured(values[values > -1].mean()) if (values > -1).any() else None
        for name, values in precision_by_class(referee).items()
    }
    return metrics


def detect(
    predict: Callable[[Batch], tuple[Tensor, Tensor]],
    batches: Iterable[Batch],
    classes: Sequence[tuple[int, str]],
    keep: int = 100,
) -> tuple[list[dict], list[int]]:
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
        results += coco_results(fresh, [image_ids[row] for row in rows], classes)
    return results, sorted(seen)


def _numbered(ids: Iterable) -> dict:
    """A number of their own for the data's ids, in the same order: referees keep ids as they like, some as doubles."""
    return {one: number for number, one in enumerate(sorted(ids), start=1)}


def _index(ground_truth: dict, images: dict, categories: dict, annotations: Iterable[dict]) -> COCO:
    """A pycocotools data set of objects or detections, all with the fields that it reads and the numbers given.

    Annotations are numbered anew: 0, an id that real files have, means "unmatched" in there.
    """
    coco = COCO()
    known = [entry for entry in annotations if entry["image_id"] in images and entry["category_id"] in categories]
    coco.dataset = {
        "info": {},
        "images": [{"id": number} for number in images.values()],
        "categories": [
            {"id": categories[category["id"]], "name": category["name"], "data_id": category["id"]}
            for category in ground_truth["categories"]
        ],
        "annotations": [
            _completed(entry)
            | {"id": number, "image_id": images[entry["image_id"]], "category_id": categories[entry["category_id"]]}
            for number, entry in enumerate(known, start=1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _completed(annotation: dict) -> dict:
    """The fields that pycocotools reads, ids apart."""
    x, y, width, height = annotation["bbox"]
    area = annotation.get("area")
    return {
        "bbox": [x, y, width, height],
        "area": width * height if area is None else area,
        "iscrowd": int(annotation.get("iscrowd") or 0),
        "score": annotation.get("score"),
    }


def _measured(value: float) -> float | None:
    """pycocotools says -1 where there was nothing to measure."""
    return float(value) if value > -1 else None
