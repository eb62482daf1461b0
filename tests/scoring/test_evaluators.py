"""Class by class as all at once, to the last digit; hotcoco as pycocotools; what scoring at scale needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scenes import awkward_scene, whole_evaluation

from dndetr.scoring.coco import STATISTICS, coco_evaluate, coco_scores, metrics_of
from dndetr.scoring.results import Results

ROOT = Path(__file__).resolve().parents[2]
EVALUATORS = ["pycocotools", "hotcoco"]


def is_fast(evaluator: str) -> bool:
    return pytest.importorskip("hotcoco") is not None if evaluator == "hotcoco" else False


def compare(seeds: range, fast: bool) -> int:
    """Each scene against pycocotools on all of it -> how many had something to find, and something found."""
    told = 0
    for seed in seeds:
        truth, results = awkward_scene(seed)
        whole, scores = whole_evaluation(truth, results), coco_scores(truth, results, fast=fast)
        assert np.array_equal(scores.precision, whole.eval["precision"]), seed
        assert np.array_equal(scores.recall, whole.eval["recall"]), seed
        metrics = metrics_of(scores)
        assert [metrics[name] for name in STATISTICS] == [None if n == -1 else n for n in whole.stats], seed
        told += bool(metrics["AP"])
    return told


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_class_by_class_is_the_whole_to_the_last_digit(evaluator):
    assert compare(range(60), is_fast(evaluator)) > 30


@pytest.mark.slow
@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_class_by_class_is_the_whole_on_many_scenes(evaluator):
    assert compare(range(60, 600), is_fast(evaluator)) > 300


def test_scenes_have_all_that_is_awkward():
    scenes = [awkward_scene(seed) for seed in range(60)]
    truths, found = zip(*scenes, strict=True)
    assert any(truth.crowd.any() for truth in truths) and any((truth.boxes_xywh[:, 2:] == 0).any() for truth in truths)
    assert any(len(results) and len(np.unique(results.scores)) < len(results) / 2 for results in found)
    assert any(not len(truth.image_ids) for truth in truths) and any(not len(results) for results in found)
    assert any(set(truth.images.tolist()) - set(truth.image_ids.tolist()) for truth in truths)
    assert any(truth.images.max() > 2**53 for truth in truths)
    assert any(np.isin(truth.areas, (32**2, 96**2)).any() for truth in truths)
    assert any((np.unique(np.stack(r.columns[:2]), axis=1, return_counts=True)[1] > 100).any() for r in found)


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("factor", [1e-200, 1e-99, 1e99, 1e160])
def test_areas_beyond_the_range_of_doubles(evaluator, factor):
    """pycocotools matches boxes whose IoU is not a number; so does whoever stands in for it."""
    for seed in range(12):
        truth, results = awkward_scene(seed)
        truth = truth._replace(boxes_xywh=truth.boxes_xywh * factor)
        results = Results(*results.columns[:2], results.boxes_xywh * factor, results.scores)
        whole = whole_evaluation(truth, results).eval
        assert np.array_equal(coco_scores(truth, results, fast=is_fast(evaluator)).precision, whole["precision"])


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_some_images_score_as_if_there_were_no_others(evaluator):
    fast = is_fast(evaluator)
    told = 0
    for seed in range(20):
        truth, results = awkward_scene(seed)
        some = truth.images[::2]
        mine, its = np.isin(truth.image_ids, some), np.isin(results.image_ids, some)
        alone = truth._replace(images=some, **{name: getattr(truth, name)[mine] for name in truth._fields[2:]})
        whole = whole_evaluation(alone, results.where(its))
        scores = coco_scores(truth, results, image_ids=some.tolist(), fast=fast)
        assert np.array_equal(scores.precision, whole.eval["precision"])
        told += bool(metrics_of(scores)["AP"])
    assert told > 5


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_numbers_that_are_not_finite_are_refused_with_the_image(evaluator):
    truth, results = awkward_scene(0)
    spoilt = [results.scores.copy(), results.boxes_xywh.copy()]
    spoilt[0][0], spoilt[1][0, 2] = np.nan, np.inf
    told = rf"^results with numbers that are not finite.*image ids \[{results.image_ids[0]}\]$"
    for scores, boxes in ((spoilt[0], results.boxes_xywh), (results.scores, spoilt[1])):
        with pytest.raises(ValueError, match=told):
            coco_evaluate(truth, Results(*results.columns[:2], boxes, scores), fast=is_fast(evaluator))


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_nothing_is_printed(evaluator, capfd):
    for seed in range(10):
        coco_evaluate(*awkward_scene(seed), fast=is_fast(evaluator))
    assert capfd.readouterr() == ("", "")


# ---- at scale


def measured(what: str, images: int) -> dict:
    """A process of its own that scores such a scene, of 100 detections an image and 365 classes."""
    pytest.importorskip("hotcoco")
    script = ROOT / "tests" / "support" / "score_at_scale.py"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, script, what, str(images), "100", "365"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# Of the 8,000: the scene itself is 100 MiB, and torch 230.
@pytest.mark.slow
@pytest.mark.parametrize(("images", "most"), [(8_000, 600), (80_000, 4096)])
@pytest.mark.parametrize("what", ["hotcoco", "measures", "file"])
def test_objects365_is_scored_in_little_memory(what, images, most):
    assert measured(what, images)["MiB"] < most
