"""``python -m dndetr.check_data DIR``."""

import io
import json
import re
from functools import partial

import pytest
from goldens import SHARED
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

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
    ("flags", "message"), [(["--preset", "huge"], "--preset huge: choose one"), (["--batch-size", "0"], "1 or more")]
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


@pytest.mark.parametrize(("name", "objects"), [("bccd", "2,805"), ("coco_tiny", "577")])
def test_real_data_is_sound(name, objects, tmp_path, monkeypatch, capsys):
    data = SHARED / "data" / name
    if not data.is_dir():
        pytest.skip(f"no data at {data} (set DNDETR_SHARED)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert check_data.main([str(data)]) == 0
    out = capsys.readouterr().out
    assert f"{objects} objects" in out
    remark = "1 box without area left out" if name == "bccd" else "6 crowd regions left out of training"
    assert remark in out
