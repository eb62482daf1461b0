"""Ground truth and detections made up: small ones with all that is awkward, and large ones."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dndetr.scoring.results import Results
from dndetr.scoring.truth import Truth

_SIDES = (0.0, 8.0, 16.0, 32.0, 64.0, 96.0, 128.0)  # with areas at COCO's borders, and none
_AREAS = (0.0, 500.0, 32.0**2, 96.0**2, np.nextafter(32.0**2, 0), np.nextafter(96.0**2, 1e9), 1e10, 2e10)


def awkward_scene(seed: int) -> tuple[Truth, Results]:
    """A few images: crowds, ties, classes and images with nothing, boxes twice and without area, huge ids, crowds of
    more than 100 detections of one image and class; each of these in some of the seeds."""
    rng = np.random.default_rng(seed)
    images = np.sort(rng.choice(1000, rng.integers(1, 12), replace=False)) + rng.choice([0, 2**60])
    category_ids = np.sort(rng.choice(200, rng.integers(1, 6), replace=False)) + rng.choice([0, 2**54])
    objects, detections = (0 if rng.random() < 0.1 else int(rng.integers(1, most)) for most in (30, 60))

    boxes = _boxes(rng, objects)
    image, label = (
        rng.integers(0, rng.integers(1, len(images) + 1), objects),
        rng.integers(0, len(category_ids), objects),
    )
    label %= rng.integers(1, len(category_ids) + 1)
    areas = np.where(rng.random(objects) < 0.7, boxes[:, 2] * boxes[:, 3], rng.choice(_AREAS, objects))
    crowd = rng.random(objects) < rng.choice([0, 0.2, 0.6])
    if objects and rng.random() < 0.3:
        boxes[rng.integers(0, objects, objects // 3)] = boxes[0]

    found_image, found_label = rng.integers(0, len(images), detections), rng.integers(0, len(category_ids), detections)
    found = _boxes(rng, detections)
    if objects:
        near, like = rng.random(detections) < 0.7, rng.integers(0, objects, detections)
        moved = np.abs(boxes[like] * (1 + rng.normal(0, rng.choice([0, 0.02, 0.1, 0.3]), (detections, 4))))
        found[near], found_image[near], found_label[near] = moved[near], image[like][near], label[like][near]
    if detections and rng.random() < 0.3:
        many = np.append(np.arange(detections), np.zeros(rng.integers(90, 260), int))
        found, found_image, found_label = found[many], found_image[many], found_label[many]
        found[detections:] *= np.abs(1 + rng.normal(0, 0.2, (len(many) - detections, 4)))
    scores = rng.random(len(found)).round(rng.choice([0, 1, 2, 6]))  # few digits make ties

    classes = [(number, f"class {number}") for number in category_ids.tolist()]
    truth = Truth(images, classes, images[image], category_ids[label], boxes, areas, crowd)
    return truth, Results(images[found_image], category_ids[found_label], found, scores)


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    sides = rng.choice(_SIDES, (count, 2)) if rng.random() < 0.5 else rng.uniform(1, 200, (count, 2))
    return np.concatenate((rng.uniform(0, 100, (count, 2)), sides), axis=1).round(rng.choice([0, 3]))


def large_scene(images: int, detections: int, classes: int, objects: int = 15, seed: int = 0) -> tuple[Truth, Results]:
    """So many detections and objects in every image, classes as uneven as in real data (the k-th has 1 / k)."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, classes + 1)
    shares /= shares.sum()

    def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
        corners, sides = rng.uniform(0, 500, (count, 2)), rng.uniform(4, 200, (count, 2))
        return rng.choice(classes, count, p=shares), np.concatenate((corners, sides), axis=1)

    image, found_image = np.repeat(np.arange(images), objects), np.repeat(np.arange(images), detections)
    label, boxes = rows(len(image))
    found_label, found = rows(len(found_image))
    scores = rng.random(len(found)) ** 3
    # One detection near each object; four in five have its class.
    place = image * detections + np.tile(rng.permutation(detections)[:objects], images)
    found[place] = boxes * (1 + rng.normal(0, 0.06, boxes.shape))
    found_label[place] = np.where(rng.random(len(place)) < 0.8, label, found_label[place])
    scores[place] = rng.random(len(place))
    names = [(number, f"class {number}") for number in range(classes)]
    areas, crowd = boxes[:, 2] * boxes[:, 3], rng.random(len(boxes)) < 0.02
    truth = Truth(np.arange(images), names, image, label, boxes, areas, crowd)
    return truth, Results(found_image, found_label, found.round(3), scores.round(6))


def whole_evaluation(truth: Truth, results: Results, cocoeval: type[COCOeval] = COCOeval) -> COCOeval:
    """pycocotools (or something of its interface) on all classes and images at once, as its documentation has it."""
    images, categories = (
        {number: place for place, number in enumerate(sorted(ids), start=1)}
        for ids in (truth.images.tolist(), dict(truth.classes))
    )
    about = {"images": [{"id": n} for n in images.values()], "categories": [{"id": n} for n in categories.values()]}
    columns = (column.tolist() for column in (truth.boxes_xywh, truth.areas, truth.crowd))
    ids = zip(truth.image_ids.tolist(), truth.category_ids.tolist(), strict=True)
    objects = [
        {"image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": int(crowd)}
        for (image, category), box, area, crowd in zip(ids, *columns, strict=True)
    ]
    found = [row | {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0} for row in results]
    sets = [COCO(), COCO()]
    for one, rows in zip(sets, (objects, found), strict=True):
        entries = [
            row | {"id": n, "image_id": images[row["image_id"]], "category_id": categories[row["category_id"]]}
            for n, row in enumerate(rows, start=1)
        ]
        one.dataset = about | {"annotations": entries}
    with contextlib.redirect_stdout(io.StringIO()):
        for one in sets:
            one.createIndex()
        referee = cocoeval(*sets, "bbox")
        referee.evaluate()
        referee.accumulate()
        referee.summarize()
    return referee
