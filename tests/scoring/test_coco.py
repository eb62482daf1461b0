"""Post-processing, the COCO results format, and the referee on data whose score is known."""

import contextlib
import copy
import io
import json
import os
import random
import time
from pathlib import Path

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dndetr.batch import Batch, Targets
from dndetr.files import write_json_atomic, write_json_rows
from dndetr.scoring.coco import (
    STATISTICS,
    Detections,
    Evaluation,
    coco_evaluate,
    coco_results,
    detect,
    postprocess,
)

SHARED = Path(os.environ.get("DNDETR_SHARED", Path(__file__).resolve().parents[3] / "shared"))
CLASSES = [(7, "circle"), (3, "star"), (12, "ring")]


def coco(objects: dict[int, list[tuple]], size: tuple[int, int] = (128, 128)) -> dict:
    """A COCO dict with nothing but what the format needs; objects: image id -> (category id, x, y, w, h)."""
    return {
        "images": [
            {"id": image, "file_name": f"{image}.png", "height": size[0], "width": size[1]} for image in objects
        ],
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "bbox": list(box)}
            for number, (image, category, *box) in enumerate(
                (image, *entry) for image, entries in objects.items() for entry in entries
            )
        ],
        "categories": [{"id": number, "name": name} for number, name in CLASSES],
    }


TRUTH = coco({5: [(7, 10, 10, 20, 20), (3, 50, 50, 40, 30)], 6: [(7, 0, 0, 100, 100)], 9: []})


def perfect(truth: dict, score: float = 0.9) -> list[dict]:
    keys = ("image_id", "category_id", "bbox")
    return [{key: annotation[key] for key in keys} | {"score": score} for annotation in truth["annotations"]]


# ---- postprocess


def test_postprocess_picks_pairs_and_scales_by_the_original_size():
    logits = torch.tensor([[[2.0, -3.0], [1.0, 3.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.0, 0.25, 0.5, 0.5]]])
    scores, labels, boxes_xyxy = postprocess(logits, boxes, torch.tensor([[100, 200]]), keep=3)
    torch.testing.assert_close(scores, torch.tensor([[3.0, 2.0, 1.0]]).sigmoid())
    assert labels.tolist() == [[1, 0, 0]] and labels.dtype == torch.int64
    # The second query comes twice, and its box is not clipped at the border.
    torch.testing.assert_close(boxes_xyxy[0], torch.tensor([[-50.0, 0, 50, 50], [80, 30, 120, 70], [-50, 0, 50, 50]]))


def test_postprocess_keeps_what_there_is_and_raises_precision():
    detections = postprocess(torch.zeros(2, 3, 4, dtype=torch.bfloat16), torch.rand(2, 3, 4), torch.ones(2, 2), keep=99)
    assert detections.scores.shape == (2, 12) and detections.scores.dtype == torch.float32
    assert detections.boxes_xyxy.shape == (2, 12, 4)


# ---- results format


def test_results_map_labels_back_and_are_small(tmp_path: Path):
    detections = Detections(
        torch.tensor([[0.123456789]]), torch.tensor([[2]]), torch.tensor([[[1.23456, 2.0, 11.23456, 32.5]]])
    )
    results = coco_results(detections, [42], CLASSES)
    assert results == [{"image_id": 42, "category_id": 12, "bbox": [1.235, 2.0, 10.0, 30.5], "score": 0.123457}]
    write_json_rows(tmp_path / "detections_val.json", results)
    text = (tmp_path / "detections_val.json").read_text()
    assert json.loads(text) == results and len(text) < 90


def test_numbers_that_are_not_finite_are_refused_with_the_image():
    boxes = torch.zeros(2, 1, 4)
    boxes[1, 0, 2] = float("nan")
    with pytest.raises(ValueError, match=r"NaN.*\[43\].*diverged"):
        coco_results(Detections(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64), boxes), [42, 43], CLASSES)


# ---- the referee


def test_perfect_detections_score_one_and_unmeasured_numbers_are_none():
    before = copy.deepcopy(TRUTH)
    metrics = coco_evaluate(TRUTH, perfect(TRUTH))
    assert before == TRUTH, "the caller's dict was changed"
    assert metrics["AP"] == pytest.approx(1) and metrics["AR100"] == pytest.approx(1)
    assert metrics["APl"] == pytest.approx(1) and metrics["APs"] == pytest.approx(1)
    assert metrics["classes"] == {"circle": pytest.approx(1), "star": pytest.approx(1), "ring": None}
    assert list(metrics) == [*STATISTICS, "classes"]
    small = coco_evaluate(coco({1: [(7, 10, 10, 20, 20)]}), [])
    assert small["AP"] == 0 and small["APl"] is None
    json.dumps(metrics, allow_nan=False)


def test_wrong_class_and_missed_object_cost_what_they_should():
    results = perfect(TRUTH)
    results[1]["category_id"] = 12  # the only star, called a ring
    metrics = coco_evaluate(TRUTH, results)
    assert metrics["classes"] == {"circle": pytest.approx(1), "star": 0, "ring": None}
    assert metrics["AP"] == pytest.approx(0.5)


def test_shifted_boxes_pass_at_fifty_only():
    results = perfect(TRUTH)
    for result in results:
        result["bbox"] = [result["bbox"][0] + result["bbox"][2] * 0.2, *result["bbox"][1:]]  # IoU 2/3
    metrics = coco_evaluate(TRUTH, results)
    assert metrics["AP50"] == pytest.approx(1) and metrics["AP75"] == 0
    assert metrics["AP"] == pytest.approx(0.4)


@pytest.mark.parametrize("objects", [{5: [(7, 1, 1, 5, 5)]}, {5: []}], ids=["with objects", "without objects"])
def test_no_detections_at_all(objects: dict):
    metrics = coco_evaluate(coco(objects), [])
    assert metrics["AP"] == (0 if objects[5] else None)


def test_images_limit_the_score():
    results = [result for result in perfect(TRUTH) if result["image_id"] == 5]
    assert coco_evaluate(TRUTH, results, image_ids=[5, 9])["AP"] == pytest.approx(1)
    assert coco_evaluate(TRUTH, results)["AP"] < 0.8


def test_crowds_are_ignored_and_duplicate_names_stay_apart():
    truth = coco({1: [(7, 0, 0, 50, 50), (7, 60, 60, 40, 40)]})
    truth["annotations"][1]["iscrowd"] = 1
    truth["categories"][1]["name"] = "circle"
    metrics = coco_evaluate(truth, perfect(truth)[:1])
    assert metrics["AR100"] == pytest.approx(1)
    assert metrics["classes"] == {"circle (id 3)": None, "circle (id 7)": pytest.approx(1), "ring": None}


def test_unknown_images_are_an_error():
    with pytest.raises(ValueError, match=r"ids \[77\]"):
        coco_evaluate(TRUTH, [{"image_id": 77, "category_id": 7, "bbox": [0, 0, 1, 1], "score": 1.0}])


def test_nothing_is_printed(capfd: pytest.CaptureFixture):
    coco_evaluate(TRUTH, perfect(TRUTH))
    assert capfd.readouterr() == ("", "")


def noisy(truth: dict, seed: int = 0) -> list[dict]:
    """Detections of mixed quality: jittered, some doubled, some of the wrong class, all scores different."""
    generator = torch.Generator().manual_seed(seed)
    categories = [category["id"] for category in truth["categories"]]
    results = []
    for annotation in [*truth["annotations"], *truth["annotations"]]:
        jitter = (torch.randn(4, generator=generator) * 0.08).tolist()
        x, y, w, h = annotation["bbox"]
        box = [x + jitter[0] * w, y + jitter[1] * h, w * (1 + jitter[2]), h * (1 + jitter[3])]
        draw = torch.rand(2, generator=generator).tolist()
        category = annotation["category_id"] if draw[0] < 0.8 else categories[len(results) % len(categories)]
        results.append({"image_id": annotation["image_id"], "category_id": category, "bbox": box, "score": draw[1]})
    return results


def test_agrees_with_pycocotools_on_files(tmp_path: Path):
    source = SHARED / "data" / "bccd" / "annotations" / "instances_val.json"
    if not source.exists():
        pytest.skip(f"no data at {source} (set DNDETR_SHARED)")
    truth = json.loads(source.read_text())
    results = noisy(truth)
    write_json_atomic(tmp_path / "results.json", results)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(str(source))
        referee = COCOeval(reference, reference.loadRes(str(tmp_path / "results.json")), "bbox")
        referee.evaluate()
        referee.accumulate()
        referee.summarize()
    metrics = coco_evaluate(truth, results)
    assert 0.05 < metrics["AP"] < 0.9
    assert [metrics[name] for name in STATISTICS] == pytest.approx(list(referee.stats), abs=1e-12)


# ---- evaluate


def batches(truth: dict, size: int) -> list[Batch]:
    """What a loader gives: fixed batch size, the last batch filled up with the first image."""
    ids = [image["id"] for image in truth["images"]]
    ids += ids[:1] * (-len(ids) % size)
    empty = Targets(torch.zeros(size, 1).long(), torch.zeros(size, 1, 4), torch.zeros(size, dtype=torch.int32))
    sizes = torch.full((size, 2), 128)
    return [
        Batch(
            torch.zeros(size, 8, 8, 3, dtype=torch.uint8),
            torch.zeros(size, 3, 4),
            sizes,
            empty,
            sizes,
            torch.tensor(ids[start : start + size]),
        )
        for start in range(0, len(ids), size)
    ]


def oracle(truth: dict, queries: int):
    """A model that knows the answers: exact boxes at logit 4, everything else at -4."""
    labels = {category_id: label for label, (category_id, _) in enumerate(CLASSES)}

    def predict(batch: Batch):
        logits = torch.full((len(batch.ids), queries, len(CLASSES)), -4.0)
        boxes = torch.full((len(batch.ids), queries, 4), 0.5)
        for row, image_id in enumerate(batch.ids.tolist()):
            mine = [annotation for annotation in truth["annotations"] if annotation["image_id"] == image_id]
            for query, annotation in enumerate(mine):
                x, y, w, h = annotation["bbox"]
                logits[row, query, labels[annotation["category_id"]]] = 4
                boxes[row, query] = torch.tensor([x + w / 2, y + h / 2, w, h]) / 128
        return logits, boxes

    return predict


def evaluate(predict, batches, truth, classes, keep):
    """As training evaluates: what is detected, scored on the images it was looked for in."""
    results, image_ids = detect(predict, batches, classes, keep)
    return Evaluation(coco_evaluate(truth, results, image_ids), results, image_ids)


def test_evaluate_counts_every_image_once_and_its_results_give_its_score():
    evaluation = evaluate(oracle(TRUTH, 4), batches(TRUTH, 2), TRUTH, CLASSES, keep=5)
    assert evaluation.image_ids == [5, 6, 9]
    assert len(evaluation.results) == 3 * 5
    assert evaluation.metrics["AP"] == pytest.approx(1)
    assert coco_evaluate(TRUTH, evaluation.results, evaluation.image_ids) == evaluation.metrics


def test_two_hundred_images_cost_well_below_a_second():
    generator = torch.Generator().manual_seed(0)
    truth = coco(
        {
            image: [
                (CLASSES[slot % 3][0], *(torch.rand(2, generator=generator) * 90).tolist(), 25.0, 25.0)
                for slot in range(5)
            ]
            for image in range(1, 201)
        }
    )
    predict = oracle(truth, 30)
    outputs = {batch.ids[0].item(): predict(batch) for batch in batches(truth, 50)}
    start = time.process_time()
    evaluation = evaluate(lambda batch: outputs[batch.ids[0].item()], batches(truth, 50), truth, CLASSES, keep=30)
    assert evaluation.metrics["AP"] > 0.99
    assert time.process_time() - start < 2.0  # 0.5 s when nothing else runs


# ---- the faster twin


@pytest.mark.parametrize("name", ["coco_tiny", "bccd"])
def test_fast_evaluation_agrees_with_the_referee_on_real_data(name):
    pytest.importorskip("hotcoco")
    path = SHARED / "data" / name / "annotations" / "instances_val.json"
    if not path.is_file():
        pytest.skip(f"no data at {path} (set DNDETR_SHARED)")
    truth = json.loads(path.read_text())
    draw = random.Random(0)
    results = []
    for entry in truth["annotations"] * 3:
        x, y, width, height = entry["bbox"]
        box = [x + draw.gauss(0, 0.1) * width, y + draw.gauss(0, 0.1) * height, width * draw.uniform(0.8, 1.3), height]
        category = entry["category_id"] if draw.random() < 0.8 else draw.choice(truth["categories"])["id"]
        about = {"image_id": entry["image_id"], "category_id": category}
        results.append(about | {"bbox": [round(n, 3) for n in box], "score": round(draw.random(), 2)})  # many ties
    some = [image["id"] for image in truth["images"]][::2]
    chosen = [result for result in results if result["image_id"] in set(some)]
    for given, image_ids in ((results, None), (chosen, some), ([], None)):
        slow, fast = coco_evaluate(truth, given, image_ids), coco_evaluate(truth, given, image_ids, fast=True)
        assert 0.1 < slow["AP"] < 0.9 or not given
        assert slow == fast, "to the last digit"


# ---- ids


def renamed(truth: dict, results: list[dict], image_id, category_id, annotation_id) -> tuple[dict, list[dict]]:
    """The same data under other ids, each made from the old one."""
    truth = {
        "images": [image | {"id": image_id(image["id"])} for image in truth["images"]],
        "categories": [category | {"id": category_id(category["id"])} for category in truth["categories"]],
        "annotations": [entry | {"id": annotation_id(entry["id"])} for entry in truth["annotations"]],
    }
    for entries in (truth["annotations"], results := [dict(result) for result in results]):
        for entry in entries:
            entry["image_id"], entry["category_id"] = image_id(entry["image_id"]), category_id(entry["category_id"])
    return truth, results


OTHER_IDS = {
    "beyond doubles": lambda number: 2**53 + number,
    "the largest": lambda number: 2**63 - 100 + number,
    "negative": lambda number: number - 1000,
    "the smallest": lambda number: 1 - 2**63 + number,
    "texts": lambda number: f"{number:03}",
}


@pytest.mark.parametrize("fast", [False, True], ids=["pycocotools", "hotcoco"])
@pytest.mark.parametrize("of", ["image", "category", "annotation"])
@pytest.mark.parametrize("kind", OTHER_IDS)
def test_ids_of_any_size_are_scored_alike(kind: str, of: str, fast: bool):
    if fast:
        pytest.importorskip("hotcoco")
    results = noisy(TRUTH)
    expected = coco_evaluate(TRUTH, results, [5, 6])
    assert 0 < expected["AP"] < 1
    change = {f"{name}_id": OTHER_IDS[kind] if name == of else int for name in ("image", "category", "annotation")}
    truth, changed = renamed(TRUTH, results, **change)
    before = copy.deepcopy((truth, changed))
    found = coco_evaluate(truth, changed, map(change["image_id"], [5, 6]), fast)
    assert found.pop("classes") == pytest.approx(expected.pop("classes"), abs=1e-12)
    assert found == pytest.approx(expected, abs=1e-12)
    assert (truth, changed) == before, "outputs keep the data's ids"


def test_classes_of_one_name_are_told_apart_by_the_data_s_ids():
    categories = [{"id": 2**60 + number, "name": "cell"} for number in range(2)]
    boxes = [(2**60 + number, 10, 10, 30, 30) for number in range(2)]
    truth = coco({1: boxes}) | {"categories": categories}
    assert [*coco_evaluate(truth, perfect(truth))["classes"]] == [f"cell (id {2**60 + number})" for number in range(2)]
