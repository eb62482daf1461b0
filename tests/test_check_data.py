"""``python -m dndetr.check_data DIR``."""

import io
import json
import os
import re
import shutil
from functools import partial

import pytest
from goldens import SHARED
from PIL import Image
from rich.cells import cell_len
from rich.console import Console
from yolo_sets import YAML, write_yolo

from dndetr import check_data
from dndetr.shapes import write_shapes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_shapes(tmp_path / "set", train=5, val=3)
    return tmp_path / "set"


def test_a_sound_folder_is_counted_and_drawn(folder, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert check_data.main([str(folder), "--output", str(sheet)]) == 0
    out, error = capsys.readouterr()
    document = json.loads((folder / "annotations" / "instances_train.json").read_text())
    objects = len(document["annotations"])
    assert f"train: 5 images, {objects} objects of 6 classes" in out and "val: 3 images" in out
    first = document["categories"][0]
    count = sum(entry["category_id"] == first["id"] for entry in document["annotations"])
    assert any(line.split()[:3] == [str(first["id"]), first["name"], str(count)] for line in out.splitlines())
    assert "8 images drawn" in out and out.endswith("no problems\n") and error == ""
    with Image.open(sheet) as picture:
        assert min(picture.size) > 500 and len(picture.convert("RGB").getcolors(1 << 24)) > 1000


def test_shapes_of_batches_are_told_for_training_on_a_gpu(folder, capsys):
    assert check_data.main([str(folder), "--batch-size", "2", "16"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("batches of ")]
    # All shapes are 128x128, but for crops; five images make few batches.
    assert len(lines) == 2 and lines[1] == "batches of 16: more than the 5 training images"
    told = r"batches of 2 \(dn-detr-r50\): \d+ shapes? of batches \(heights .* to \d+, room for [\d, ]+ objects\): "
    assert re.fullmatch(told + r"\d\.\d% more pixels, \d+\.\d% of the steps replay a CUDA graph", lines[0])
    assert check_data.main([str(folder), "--preset", "small"]) == 0
    assert "batches of small: one canvas of 240x320\n" in capsys.readouterr().out
    assert check_data.main([str(folder), "--splits", "val"]) == 0
    assert "batches of" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "huge"], "--preset huge: choose one"),
        (["--batch-size", "0"], "1 or more"),
        (["--images.canvas", "64", "64"], "--images.canvas 64 64: give none with --preset dn-detr-r50"),
        (["--preset", "small", "--images.canvas", "0", "64"], "--images.canvas (0, 64): give height and width"),
        (["--json", "none/findings.json"], "none/findings.json cannot be made"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_decoded(folder, capsys, flags, message):
    assert check_data.main([str(folder), *flags]) == 1
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and not out


def test_all_problems_are_listed_and_the_rest_is_still_drawn(folder, tmp_path, capsys):
    names = sorted(path.name for path in (folder / "train").iterdir())
    for name in names[:2]:
        (folder / "train" / name).write_text("hello")
    path = folder / "annotations" / "instances_val.json"
    document = json.loads(path.read_text())
    for entry in document["annotations"][:2]:
        entry["bbox"] = None
    document["images"][1]["file_name"] = "../x.png"
    path.write_text(json.dumps(document))
    (folder / "val" / document["images"][2]["file_name"]).unlink()
    assert check_data.main([str(folder), "--output", str(tmp_path / "sheet.png")]) == 1
    out, error = capsys.readouterr()
    listed = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert len(listed) == 6
    assert sum("not an image" in line for line in listed) == 2 and sum("has no bbox" in line for line in listed) == 2
    assert sum("leads out" in line for line in listed) == 1 and sum("is missing" in line for line in listed) == 1
    assert error.startswith(f"error: {folder}: 6 problems (") and error.count("\n") == 1
    assert "3 images drawn" in out


def document(folder, split):
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def test_the_same_picture_in_two_splits_is_found_again_and_again(folder, tmp_path, capsys):
    train, val = (document(folder, split)["images"] for split in ("train", "val"))
    for source, (split, image) in zip(train, (("val", val[1]), ("train", train[4])), strict=False):
        with Image.open(folder / "train" / source["file_name"]) as picture:
            # The same pixels in another file.
            picture.save(folder / split / image["file_name"], format="PNG", compress_level=1, dpi=(72, 72))
    told = (
        f"warning: train and val: 1 picture in both, .*: train image {train[0]['id']} .* = val image {val[1]['id']} .*"
    )
    twice = f"note: train: 1 picture more than once, .*: image {train[1]['id']} .* = image {train[4]['id']} .*"
    for _ in range(2):  # the second time nothing is decoded
        assert check_data.main([str(folder)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sum(bool(re.fullmatch(told, line)) for line in lines) == 1
        assert sum(bool(re.fullmatch(twice, line)) for line in lines) == 1
    assert check_data.main([str(folder), "--splits", "val"]) == 0
    assert "pixel by pixel" not in capsys.readouterr().out


def test_findings_are_counted_and_written_in_full(folder, tmp_path, capsys):
    path = folder / "annotations" / "instances_train.json"
    content = document(folder, "train")
    entries = content["annotations"]
    repeats = [entry | {"id": 10**6 + entry["id"]} for entry in entries[:7]]
    content["annotations"] = [*entries, *repeats]
    path.write_text(json.dumps(content))
    report, sheet = tmp_path / "findings.json", tmp_path / "sheet.png"
    assert check_data.main([str(folder), "--json", str(report), "--output", str(sheet)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (doubled,) = (line for line in lines if line.startswith("warning: train: 7 boxes lie on another of the same class"))
    assert doubled.endswith("; and 2 more") and lines[-1] == "no problems"
    written = json.loads(report.read_text())
    kinds = [finding["severity"] for finding in written["findings"]]
    warnings, notes = kinds.count("warning"), kinds.count("note")
    assert lines[-2].startswith(f"training would start; {warnings} warning") and warnings >= 1
    assert ("note" in lines[-2]) == bool(notes) and kinds == sorted(kinds, reverse=True)
    assert written["verdict"] == "training would start"
    assert written["splits"]["train"]["objects"] == len(entries) + 7
    (found,) = (finding for finding in written["findings"] if finding["kind"] == "doubled box")
    pairs = sorted(place["annotation_ids"] for case in found["cases"] for place in case)
    assert pairs == sorted([entry["id"], 10**6 + entry["id"]] for entry in entries[:7])
    assert sheet.is_file()


def test_the_verdict_says_what_training_would_stop_at(folder, tmp_path, capsys):
    shutil.copytree(folder / "val", folder / "test")
    shutil.copy(folder / "annotations" / "instances_val.json", folder / "annotations" / "instances_test.json")
    first = document(folder, "val")["images"][0]["file_name"]
    (folder / "test" / first).write_text("hello")
    report = tmp_path / "findings.json"
    assert check_data.main([str(folder), "--json", str(report)]) == 1  # training does not read test
    assert "\ntraining would start; " in capsys.readouterr().out
    (problem,) = (one for one in json.loads(report.read_text())["findings"] if one["severity"] == "error")
    assert problem["cases"][0][0]["file"] == first and problem["kind"] == "unreadable file"
    (folder / "val" / first).write_text("hello")
    assert check_data.main([str(folder)]) == 1
    stops = r"training would stop, unless with --images.skip-unreadable: \S+/instances_val.json: .* not an image .*"
    assert re.search(stops, capsys.readouterr().out)
    (folder / "val" / first).unlink()
    assert check_data.main([str(folder)]) == 1
    assert re.search(r"training would stop: \S+/instances_val.json: .* is missing", capsys.readouterr().out)
    assert check_data.main([str(folder), "--splits", "train"]) == 0
    assert "nothing here would stop training; val not checked" in capsys.readouterr().out


def test_boxes_are_tiny_on_the_canvas_that_is_asked_for(folder, capsys):
    for preset in ("small", "tiny"):
        for flags, tiny in (([], False), (["--images.canvas", "20", "20"], True)):
            assert check_data.main([str(folder), "--preset", preset, *flags]) == 0
            assert ("under 4 pixels wide or high" in capsys.readouterr().out) == tiny


def test_a_set_that_cannot_be_divided_is_told_of_once(folder, capsys):
    (folder / "annotations" / "instances_val.json").unlink()
    path = folder / "annotations" / "instances_train.json"
    content = document(folder, "train")
    assert check_data.main([str(folder), "--val-share", "0.4"]) == 0
    out = capsys.readouterr().out
    assert "train: 3 images" in out and "val: 2 images" in out and "training would start" in out
    content["annotations"][0]["bbox"] = None
    path.write_text(json.dumps(content))
    assert check_data.main([str(folder), "--val-share", "0.4"]) == 1
    out, error = capsys.readouterr()
    assert "1 problem (box 1)" in error and "pixel by pixel" not in out


def test_classes_of_another_data_set_are_not_compared(folder, capsys):
    path = folder / "annotations" / "instances_val.json"
    content = document(folder, "val")
    for category in content["categories"]:
        category["id"] += 100
    for entry in content["annotations"]:
        entry["category_id"] += 100
    path.write_text(json.dumps(content))
    assert check_data.main([str(folder)]) == 1
    out, error = capsys.readouterr()
    assert "6 problems (classes 6)" in error
    assert "without objects here" not in out and "training would stop: " in out


@pytest.mark.parametrize("name", ["a[/x]b", "[red]"])
def test_a_folder_named_like_markup_is_shown_as_it_is(name, monkeypatch):
    screen = io.StringIO()
    terminal = partial(Console, file=screen, force_terminal=True, width=120)
    monkeypatch.setattr("rich.console.Console", lambda **_: terminal())
    with check_data._progress(f"decoding {name}", 3) as advance:
        advance(3)
    assert f"decoding {name}" in screen.getvalue()


def test_classes_named_like_markup_or_wide_ones_stand_in_the_table(folder, capsys):
    path = folder / "annotations" / "instances_train.json"
    document = json.loads(path.read_text())
    for category, name in zip(document["categories"], ("[red]x[/red]", "猫犬", "猫犬", "$a$ %s"), strict=False):
        category["name"] = name
    path.write_text(json.dumps(document))
    assert check_data.main([str(folder), "--splits", "train"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(place for place, line in enumerate(lines) if line.split()[:2] == ["id", "class"])
    rows = lines[start : start + 7]
    assert [row.split()[1] for row in rows[1:4]] == ["[red]x[/red]", "猫犬", "猫犬"] and "$a$ %s" in rows[4]
    assert {cell_len(row) for row in rows} == {cell_len(rows[0])}


def test_turned_pictures_are_counted(folder, capsys):
    document = json.loads((folder / "annotations" / "instances_train.json").read_text())
    tags = Image.Exif()
    tags[0x0112] = 8
    for image in document["images"][:2]:
        Image.new("RGB", (image["width"], image["height"])).save(folder / "train" / image["file_name"], exif=tags)
    assert check_data.main([str(folder)]) == 0
    remark = "2 images turned upright by EXIF data, though width and height do not say whether boxes are: look at some"
    assert f"  {remark}\n" in capsys.readouterr().out


def test_what_a_split_lacks_is_said_and_a_test_split_may_be_absent(folder, capsys):
    (folder / "annotations" / "instances_val.json").unlink()
    assert check_data.main([str(folder)]) == 1
    out, error = capsys.readouterr()
    assert out.count("problem: ") == 1 and "no 'val' split" in out and "1 problem (split 1)" in error
    assert check_data.main([str(folder), "--splits", "train"]) == 0
    assert check_data.main([str(folder), "--splits", "test"]) == 1


@pytest.mark.parametrize(
    ("name", "objects", "findings"),
    [
        ("bccd", "2,805", {("note", "imbalance", "train")}),
        (
            "coco_tiny",
            "577",
            {
                ("warning", "few objects", "train"),
                ("warning", "class not in train", "val"),
                ("note", "class not in val", "val"),
                ("note", "imbalance", "train"),
                ("note", "class without objects", "train and val"),
            },
        ),
    ],
)
def test_real_data_is_sound(name, objects, findings, tmp_path, monkeypatch, capsys):
    data = SHARED / "data" / name
    if not data.is_dir():
        pytest.skip(f"no data at {data} (set DNDETR_SHARED)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert check_data.main([str(data), "--json", str(tmp_path / "findings.json")]) == 0
    out = capsys.readouterr().out
    assert f"{objects} objects" in out
    remark = "1 box without area left out" if name == "bccd" else "6 crowd regions left out of training"
    assert remark in out
    written = json.loads((tmp_path / "findings.json").read_text())["findings"]
    assert {(finding["severity"], finding["kind"], finding["split"]) for finding in written} == findings


def test_findings_on_files_whose_names_are_no_text(folder, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    shutil.move(folder, odd)
    shutil.rmtree(os.path.join(odd, "val"))
    assert check_data.main([odd, "--json", str(tmp_path / "findings.json")]) == 1
    findings = json.loads((tmp_path / "findings.json").read_text())["findings"]
    assert any(odd in finding["message"] for finding in findings)


def test_a_test_split_that_is_named_and_not_there_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_yolo(tmp_path / "set")
    (root / "data.yaml").write_text(YAML + "test: ../test/images\n")
    assert check_data.main([str(root)]) == 0
    out = capsys.readouterr().out
    assert "warning: test: " in out and "test is '../test/images', and there is no" in out and "no problems" in out
    assert check_data.main([str(root), "--splits", "train", "test"]) == 1
