"""``python score_at_scale.py WHAT IMAGES DETECTIONS CLASSES``: scores a large scene -> seconds and peak memory in MiB.

WHAT: pycocotools, hotcoco, measures (calibration and confusion) or file (detections as JSON), class by class and from
columns; whole-pycocotools, whole-hotcoco, whole-faster-coco-eval: all classes at once, as they do it themselves; scene:
nothing. Several, with commas, are done one after the other. Seconds are of the clock and of processors.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scenes import large_scene, whole_evaluation

from dndetr.files import write_json_rows
from dndetr.scoring.calibration import calibration_error
from dndetr.scoring.coco import coco_evaluate
from dndetr.scoring.confusion import confusion_matrix
from dndetr.scoring.results import Results
from dndetr.scoring.truth import Truth


def score(what: str, truth: Truth, results: Results) -> float | None:
    """What is asked for -> AP, where it is measured."""
    if what in ("pycocotools", "hotcoco"):
        return coco_evaluate(truth, results, fast=what == "hotcoco")["AP"]
    if what == "whole-pycocotools":
        return float(whole_evaluation(truth, results).stats[0])
    if what == "whole-faster-coco-eval":
        from faster_coco_eval import COCOeval_faster

        return float(whole_evaluation(truth, results, COCOeval_faster).stats[0])
    if what == "whole-hotcoco":
        return _whole_hotcoco(truth, results)
    if what == "measures":
        calibration_error(truth, results)
        confusion_matrix(truth, results, [number for number, _ in truth.classes])
    elif what == "file":
        with tempfile.TemporaryDirectory() as folder:
            write_json_rows(Path(folder) / "detections.json", results)
    elif what != "scene":
        raise ValueError(what)
    return None


def _whole_hotcoco(truth: Truth, results: Results) -> float:
    import hotcoco

    images = [{"id": number} for number in truth.images.tolist()]
    categories = [{"id": number, "name": name} for number, name in truth.classes]
    columns = {"boxes": truth.boxes_xywh, "area": truth.areas, "iscrowd": truth.crowd}
    ids = {"image_ids": truth.image_ids, "category_ids": truth.category_ids}
    objects = hotcoco.COCO.from_arrays(images, categories, **ids, **columns)
    found = np.column_stack((results.image_ids, results.boxes_xywh, results.scores, results.category_ids))
    evaluation = hotcoco.COCOeval(objects, objects.load_res(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


if __name__ == "__main__":
    scene = large_scene(*map(int, sys.argv[2:5]))
    for what in sys.argv[1].split(","):
        started, busy = time.perf_counter(), time.process_time()
        AP = score(what, *scene)
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps({"what": what, "AP": AP, "seconds": round(seconds, 2), "busy": round(busy, 2), "MiB": peak}))
