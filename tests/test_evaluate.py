"""The evaluate command: the run's own numbers again, classes by name, a new folder each time."""

import argparse
import errno
import json
import os
import shutil
import warnings
from pathlib import Path

import detectors
import numpy as np
import pytest
import torch
from official_files import official, randomised
from PIL import Image
from rich.cells import cell_len
from short_runs import short_run, write_pictures

from dndetr import evaluate
from dndetr.config import Config, ImagesConfig
from dndetr.data.classes import match_classes
from dndetr.detector import Detector, load
from dndetr.presets import PRESETS
from dndetr.runs.run_log import read_rows
from dndetr.scoring.confusion import confusion_matrix

FILES = {"metrics.json", "detections_val.json", "precision_recall.png", "confusion.png"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return short_run(folder, "--data", str(pictures), "--images.canvas", "96", "128")


def changed(pictures: Path, folder: Path, change) -> Path:
    """A copy of the data whose validation JSON went through ``change``."""
    shutil.copytree(pictures, folder)
    path = folder / "annotations" / "instances_val.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return folder


def read(path: Path):
    return json.loads(path.read_text())


def test_a_run_scores_what_it_scored_in_training(run, tmp_path, capsys):
    assert evaluate.main([str(run), "--output", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert read(tmp_path / "out" / "detections_val.json") == read(run / "detections_val.json")
    (logged,) = (row for row in read_rows(run / "metrics.jsonl") if row["event"] == "eval")
    metrics = read(tmp_path / "out" / "metrics.json")
    error = metrics.pop("calibration")
    assert metrics == {name: logged[name] for name in metrics} and len(metrics) == 13
    assert error is None or 0 <= error <= 1
    out = capsys.readouterr().out
    assert all(name in out for name in (*metrics["classes"], "AP50", "ARl", "calibration", str(tmp_path / "out")))
    for name in ("precision_recall.png", "confusion.png"):
        assert min(Image.open(tmp_path / "out" / name).size) > 300


def test_built_in_shapes_without_data(tmp_path):
    run = short_run(tmp_path / "run")
    assert evaluate.main([str(run)]) == 0
    assert read(tmp_path / "run-val-1" / "detections_val.json") == read(run / "detections_val.json")
    assert evaluate.main([str(run / "best.pt"), "--split", "train"]) == 0
    assert len({row["image_id"] for row in read(tmp_path / "run-best-train-1" / "detections_train.json")}) == 8


def test_results_lie_beside_the_run_and_are_never_overwritten(run, capsys):
    assert evaluate.main([str(run)]) == evaluate.main([str(run)]) == 0
    first, second = run.parent / "run-val-1", run.parent / "run-val-2"
    assert read(first / "metrics.json") == read(second / "metrics.json")
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert evaluate.main([str(run), "--output", str(first)]) == 1
    assert "never overwritten" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in first.iterdir()}


def test_other_category_ids_with_the_same_names(run, pictures, tmp_path):
    new = {3: 40, 7: 3, 12: 2**40}

    def renumber(document):
        for category in document["categories"]:
            category["id"] = new[category["id"]]
        for annotation in document["annotations"]:
            annotation["category_id"] = new[annotation["category_id"]]

    data = changed(pictures, tmp_path / "data", renumber)
    assert evaluate.main([str(run), "--data", str(data), "--output", str(tmp_path / "out")]) == 0
    expected = read(run / "detections_val.json")
    for result in expected:
        result["category_id"] = new[result["category_id"]]
    assert read(tmp_path / "out" / "detections_val.json") == expected


def test_classes_that_share_a_name_stay_apart_everywhere(tmp_path, capsys):
    data = write_pictures(tmp_path / "data", ((3, "person"), (7, "person"), (9, ""), (12, "person (id 3)"), (40, "猫")))
    names = ["person (id 3)", "person (id 7)", "(id 9)", "person (id 3) (id 12)", "猫"]
    # With focal loss the best detections after two steps are of all classes.
    focal = ["--loss.kind", "focal", "--loss.label", "2"]
    run = short_run(tmp_path / "run", "--data", str(data), "--images.canvas", "96", "128", *focal, pictures=True)
    (logged,) = (row for row in read_rows(run / "metrics.jsonl") if row["event"] == "eval")
    capsys.readouterr()
    assert evaluate.main([str(run), "--output", str(tmp_path / "out")]) == 0
    assert list(read(tmp_path / "out" / "metrics.json")["classes"]) == list(logged["classes"]) == names
    told, error = capsys.readouterr()
    _, *rows = told[told.index("class ") :].splitlines()[:6]
    assert [row.split("  ")[0] for row in rows] == names
    assert {cell_len(row) for row in rows} == {cell_len(rows[0])}  # columns stand below each other
    assert "Glyph" not in error
    detector = load(run)
    (found,) = detector.predict(data / "val" / "0.jpg", threshold=0.0)
    assert found.names == [names[label] for label in found.labels] and set(found.names) == set(names)
    ids = (3, 7, 9, 12, 40)
    assert detector.named_classes == [{"id": n, "name": name} for n, name in zip(ids, names, strict=True)]


def test_some_of_the_classes_and_one_without_objects(run, pictures, tmp_path):
    def keep_dust(document):
        document["categories"] = [{"id": 0, "name": "everything"}, {"id": 7, "name": "dust"}]
        document["annotations"] = [entry for entry in document["annotations"] if entry["category_id"] == 7]

    data = changed(pictures, tmp_path / "data", keep_dust)
    assert evaluate.main([str(run), "--data", str(data), "--output", str(tmp_path / "out")]) == 0
    results = read(tmp_path / "out" / "detections_val.json")
    assert {result["category_id"] for result in results} == {7}
    metrics = read(tmp_path / "out" / "metrics.json")
    assert metrics["classes"] == {"everything": None, "dust": metrics["AP"]}


def test_a_class_that_was_not_trained_is_an_error(run, pictures, tmp_path, capsys):
    data = changed(pictures, tmp_path / "data", lambda document: document["categories"][1].update(name="sand"))
    assert evaluate.main([str(run), "--data", str(data), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "not trained on 'sand' (id 7); its classes are cell, dust, hair" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--split", "test"], "no 'test' split"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--workers", "-1"], "--workers -1: give 0 or more"),
        (["--threshold", "nan"], "--threshold nan: give a score from 0 to 1"),
        (["--threshold", "5"], "--threshold 5.0: give a score from 0 to 1"),
        (["--preset", "huge"], "--preset huge: choose one of"),
        (["--preset", "small"], "--preset needs data"),
        (["--data", "shapes"], "not trained on 'circle' (id 1)"),
    ],
    ids=["data", "split", "batch", "workers", "threshold", "high", "preset", "no-data", "other-classes"],
)
def test_mistakes_are_one_plain_line_and_leave_nothing(run, flags, message, capsys):
    before = set(run.parent.iterdir())
    assert evaluate.main([str(run), *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert set(run.parent.iterdir()) == before


def test_a_failed_evaluation_leaves_no_folder(run, pictures, tmp_path, capsys):
    data = changed(pictures, tmp_path / "data", lambda document: None)
    (data / "val" / "2.jpg").write_bytes((data / "val" / "2.jpg").read_bytes()[:300])
    assert evaluate.main([str(run), "--data", str(data), "--output", str(tmp_path / "out")]) == 1
    assert "2.jpg" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_a_full_disk_leaves_no_half_results(run, tmp_path, monkeypatch, capsys, there):
    out, synced = tmp_path / "out", os.fsync

    def full(descriptor):
        if (out / "precision_recall.png").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    monkeypatch.setattr("dndetr.files.os.fsync", full)
    if there:
        out.mkdir()
    assert evaluate.main([str(run), "--output", str(out)]) == 1
    assert capsys.readouterr().err == f"error: cannot write {out}/confusion.png: No space left on device\n"
    assert out.exists() == there and not any(tmp_path.glob("out/*"))


def test_images_that_training_skipped_are_skipped(pictures, tmp_path, capsys):
    data = changed(pictures, tmp_path / "data", lambda document: None)
    (data / "val" / "2.jpg").write_bytes((data / "val" / "2.jpg").read_bytes()[:300])
    flags = ["--data", str(data), "--images.canvas", "96", "128", "--images.skip-unreadable"]
    run = short_run(tmp_path / "run", *flags)
    capsys.readouterr()
    assert evaluate.main([str(run), "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert told.startswith("warning: val: 1 of 6 images cannot be read and are skipped; the first: image 12: ")
    results = read(tmp_path / "out" / "detections_val.json")
    assert results == read(run / "detections_val.json") and len({row["image_id"] for row in results}) == 5
    assert evaluate.main([str(run), "--data", str(pictures), "--output", str(tmp_path / "whole")]) == 0
    assert capsys.readouterr().err == ""


def test_unreadable_images_are_skipped_on_request(run, pictures, tmp_path, capsys):
    data = changed(pictures, tmp_path / "data", lambda document: None)
    (data / "val" / "2.jpg").write_text("hello")
    arguments = [str(run), "--data", str(data), "--output", str(tmp_path / "out")]
    assert evaluate.main(arguments) == 1
    assert capsys.readouterr().err.startswith("error: image 12: ")
    assert evaluate.main([*arguments, "--skip-unreadable"]) == 0
    assert capsys.readouterr().err.startswith("warning: val: 1 of 6 images cannot be read and are skipped")
    assert len({row["image_id"] for row in read(tmp_path / "out" / "detections_val.json")}) == 5


def test_all_objects_of_a_crowded_image_count(run, pictures, tmp_path):
    def crowd(document):
        document["annotations"] += [document["annotations"][0] | {"id": 100 + number} for number in range(600)]

    data = changed(pictures, tmp_path / "data", crowd)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*largest are kept")
        assert evaluate.main([str(run), "--data", str(data), "--output", str(tmp_path / "out")]) == 0


def test_weights_alone_with_a_preset(tmp_path, capsys):
    run = short_run(tmp_path / "run", "--val-images", "200")  # as the preset: batches decide the order of equal scores
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({"model": saved["ema"], "classes": saved["classes"]}, tmp_path / "weights.pt")
    assert evaluate.main([str(tmp_path / "weights.pt")]) == 1
    assert "--preset with one of tiny" in capsys.readouterr().err
    assert evaluate.main([str(tmp_path / "weights.pt"), "--preset", "tiny", "--output", str(tmp_path / "out")]) == 0
    results = read(tmp_path / "out" / "detections_val.json")
    assert results == read(run / "detections_val.json")


def test_an_official_file_with_a_preset(tmp_path, monkeypatch, capsys):
    images = ImagesConfig(recipe="fixed", canvas=(96, 128))
    preset = Config(preset="official", model=detectors.CONFIGS["dn-detr"], images=images, precision="float32")
    monkeypatch.setitem(PRESETS, "official", lambda: preset)
    theirs = randomised("dn-detr", 91)
    file = tmp_path / "official.pth"
    torch.save({"model": official(theirs, "dn-detr"), "args": argparse.Namespace(lr=1e-4)}, file)
    data = write_pictures(tmp_path / "data", ((18, "dog"), (90, "toothbrush")))
    flags = ["--data", str(data), "--output", str(tmp_path / "out")]
    assert evaluate.main([str(file), *flags]) == 1
    assert "official.pth holds no configuration and classes" in capsys.readouterr().err
    assert evaluate.main([str(file), *flags, "--preset", "official"]) == 0
    whole = Detector(theirs, preset, [(number, str(number)) for number in range(91)], precision="float32")
    whole.model.decoder.class_embed.bias.data[[n for n in range(91) if n not in (18, 90)]] = -1e4
    results = read(tmp_path / "out" / "detections_val.json")
    (found,) = whole.predict(data / "val" / "0.jpg", threshold=1e-6)
    expected = [result for result in results if result["image_id"] == 10]
    assert [str(result["category_id"]) for result in expected] == found.names and len(expected) == 24
    assert [result["score"] for result in expected] == pytest.approx(found.scores.tolist(), abs=1e-5)


def test_classes_are_matched_by_name_and_by_id_where_names_repeat():
    trained = [(1, "a"), (2, "b"), (3, "b"), (4, "c")]
    assert match_classes([(9, "c"), (3, "b"), (2, "b"), (1, "x"), (7, "b")], trained) == [3, 2, 1, None, None]


def test_the_confusion_matrix_counts_by_hand():
    def box(image_id, category_id, x, **more):
        return {"image_id": image_id, "category_id": category_id, "bbox": [x, 0, 10, 10], **more}

    truth = {
        "annotations": [
            box(1, 5, 0), box(1, 5, 20), box(1, 8, 40), box(1, 8, 60),
            box(2, 5, 0), box(2, 8, 200, iscrowd=1),
        ]
    }  # fmt: skip
    results = [
        box(1, 5, 0, score=0.9),  # found
        box(1, 8, 20, score=0.9),  # found as the other class
        box(1, 8, 41, score=0.9),  # less overlap than the next, but of the right class
        box(1, 5, 40, score=0.9),  # then this one has nothing left
        box(1, 8, 60, score=0.4),  # below the threshold: missed
        box(2, 5, 6, score=0.9),  # too little overlap: missed, and a detection of nothing
        box(2, 8, 200, score=0.9),  # in a crowd: counts for nothing
        box(3, 8, 0, score=0.9),  # an image without objects
    ]
    expected = [[1, 1, 1], [0, 1, 1], [2, 1, 0]]
    assert confusion_matrix(truth, results, [5, 8]).tolist() == expected
    assert np.array_equal(confusion_matrix({"annotations": []}, [], [5, 8]), np.zeros((3, 3)))
