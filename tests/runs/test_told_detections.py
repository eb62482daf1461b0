"""Detections and ground truth as listeners get them: as the dictionaries that they always were, and in columns."""

import json

import pytest
import torch
from short_runs import SMALL

import dndetr
from dndetr import train
from dndetr.data.records import Records

FEW = [*SMALL, "--epochs", "2", "--batch-size", "4", "--train-images", "12", "--val-images", "6", "--quiet"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


class Keeping(dndetr.Listener):
    """Keeps what evaluations find; curious: asks for the ground truth at each of them."""

    def __init__(self, curious: bool = False):
        self.curious, self.results, self.truths = curious, [], []

    def run_started(self, run):
        self.run = run

    def evaluated(self, row, results, best):
        self.results.append(results)
        if self.curious:
            self.truths.append(self.run.ground_truth)


def test_the_ground_truth_is_made_once_and_only_where_it_is_asked_for(monkeypatch):
    made, coco_dict = [], Records.coco_dict
    monkeypatch.setattr(Records, "coco_dict", lambda self: made.append(self) or coco_dict(self))
    train.run(FEW, listeners=[Keeping()])
    assert made == []
    watchers = [Keeping(curious=True), Keeping(curious=True)]
    train.run(FEW, listeners=watchers)
    truths = [truth for watcher in watchers for truth in watcher.truths]
    assert len(truths) == 4 and len(made) == 1 and all(truth is truths[0] for truth in truths)
    assert type(truths[0]) is dict and len(truths[0]["images"]) == 6 and len(truths[0]["annotations"]) > 6
    assert {entry["image_id"] for entry in truths[0]["annotations"]} <= {image["id"] for image in truths[0]["images"]}


def test_detections_are_told_as_rows_and_in_columns():
    watcher = Keeping()
    folder = train.run(FEW, listeners=[watcher])
    results, written = watcher.results[-1], json.loads((folder / "detections_val.json").read_text())
    assert [dict(row) for row in results] == written and results[0] == written[0] and len(results) == len(written) > 0
    assert results.image_ids.tolist() == [row["image_id"] for row in written]
    assert results.category_ids.tolist() == [row["category_id"] for row in written]
    assert results.boxes_xywh.tolist() == [row["bbox"] for row in written]
    assert results.scores.tolist() == [row["score"] for row in written]
