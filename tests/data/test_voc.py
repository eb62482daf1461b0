"""What is read of a Pascal VOC folder, and that it is the same as from COCO."""

import json
import shutil

import numpy as np
import pytest
from broken_sets import FLAGS
from PIL import Image
from splits import read_split
from voc_files import CAT, DOG, SPLITS, annotation_xml, object_xml, put, write_voc

from dndetr import evaluate
from dndetr import train as training
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.transforms import Unresized

TIMES = {"seconds", "images_per_second", "data_wait"}  # of a row of metrics.jsonl


@pytest.fixture
def home(tmp_path):
    return write_voc(tmp_path / "set", SPLITS)


def only_problem(records):
    (problem,) = records.problems
    return records.of(problem)


def test_corners_count_from_one_and_belong_to_the_box(home):
    records = read_split(home, "train")
    assert records.problems == [] and records.remarks == []
    assert records.classes == [(1, "cat"), (2, "dog")]
    assert (records.names, records.ids.tolist()) == (["b.jpg", "a.jpg"], [1, 2])  # in the order of the list
    assert records.objects.boxes.tolist() == [[10, 5, 20, 10], [0, 0, 64, 48], [10, 5, 20, 10]]
    assert records.objects.image.tolist() == [0, 0, 1] and records.objects.label.tolist() == [1, 0, 1]
    assert records.objects.areas.tolist() == [200, 64 * 48, 200]
    assert (records.file, records.folder) == (home / "ImageSets/Main/train.txt", home / "JPEGImages")
    sample = FolderDataset(records, Unresized())[0]
    assert sample.boxes_xyxy.tolist() == [[10, 5, 30, 15], [0, 0, 64, 48]]


def test_classes_are_those_of_all_splits(home):
    put(home, "c", object_xml("ant", (1, 1, 5, 5)))
    assert read_split(home, "train").classes == read_split(home, "val").classes == [(1, "ant"), (2, "cat"), (3, "dog")]


def test_fractions_and_padding_are_read(home):
    text = object_xml(" dog\n", (1.5, 2.25, 10, 20)).replace("<xmax>10</xmax>", "<xmax> 10.75\n</xmax>")
    put(home, "a", text)
    records = read_split(home, "train")
    assert records.objects.boxes[-1].tolist() == [0.5, 1.25, 10.25, 18.75]
    assert records.classes[-1] == (2, "dog")


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>", "<size><width/></size>"])
def test_sizes_that_are_not_said_are_those_of_the_files(home, size):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 64)).save(home / "JPEGImages/a.jpg", exif=exif)
    text = annotation_xml("a.jpg", (1, 1), object_xml(*DOG))
    begin, end = text.index("<size>"), text.index("</size>") + len("</size>")
    (home / "Annotations/a.xml").write_text(text[:begin] + size + text[end:])
    records = read_split(home, "train")
    assert records.sizes.tolist() == [[48, 64], [48, 64]]
    assert FolderDataset(records, Unresized())[1].pixels.shape == (48, 64, 3)


def test_a_size_may_be_written_as_a_fraction(home):
    put(home, "a", "", size=("48.0", "64.0"))
    assert read_split(home, "train").sizes.tolist() == [[48, 64], [48, 64]]


def test_difficult_objects_are_crowds(home):
    hard = object_xml(*CAT, more="\t\t<difficult>1</difficult>\n")
    put(home, "a", object_xml(*DOG, more="<difficult>0</difficult><occluded>1</occluded>") + hard)
    records = read_split(home, "train")
    assert records.objects.crowd.tolist() == [False, False, False, True]
    assert records.remarks == ["1 difficult object taken as crowd regions"]
    assert len(FolderDataset(records, Unresized())[1].labels) == 1


def test_parts_of_an_object_are_none(home):
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    put(home, "a", object_xml(*DOG, more=part))
    records = read_split(home, "train")
    assert records.objects.boxes[-1].tolist() == [10, 5, 20, 10]
    assert records.classes == [(1, "cat"), (2, "dog")]


POINTS = {
    "numbered": "<x1>5</x1><y1>9</y1><x2>20</x2><y2>4</y2><x3>8</x3><y3>30.5</y3>",
    "points": "<pt><x>5</x><y>9</y></pt><pt><x>20</x><y>4</y></pt><pt><x>8</x><y>30.5</y></pt>",
}


@pytest.mark.parametrize("points", POINTS.values(), ids=POINTS)
def test_a_polygon_has_the_box_around_it(home, points):
    put(home, "a", f"<object><name>dog</name><polygon>{points}</polygon></object>")
    assert read_split(home, "train").objects.boxes[-1].tolist() == [4, 3, 16, 27.5]
    put(home, "a", object_xml(*DOG, more=f"<polygon>{points}</polygon>"))
    assert read_split(home, "train").objects.boxes[-1].tolist() == [10, 5, 20, 10]


def test_boxes_that_seem_to_count_from_zero_are_remarked_on(home):
    put(home, "a", object_xml("dog", (0, 0, 10, 20)))
    (remark,) = read_split(home, "train").remarks
    assert remark.startswith("1 box begins below 1, where Pascal VOC counts from")
    assert FolderDataset(read_split(home, "train"), Unresized())[1].boxes_xyxy.tolist() == [[0, 0, 10, 20]]


@pytest.mark.parametrize(
    ("name", "text", "classes"),
    [
        ("classes.txt", "dog\ncat\nwolf\n", ["dog", "cat", "wolf"]),
        ("labels.txt", "\ufeffdog\r\ncat\r\n\r\n", ["dog", "cat"]),
        ("predefined_classes.txt", "dog\ncat", ["dog", "cat"]),
        (
            "labelmap.txt",
            "# label:color_rgb:parts:actions\nbackground:0,0,0::\ndog:1,2,3:head,tail:\ncat:4,5,6::\n",
            ["dog", "cat"],
        ),
    ],
)
def test_a_list_of_classes_gives_order_and_all_of_them(home, name, text, classes):
    (home / name).write_bytes(text.encode())
    for split in ("train", "val"):
        assert read_split(home, split).classes == [*enumerate(classes, 1)]
    assert read_split(home, "train").objects.label.tolist() == [0, 1, 0]
    (home / name).write_text("cat\n")
    problems = read_split(home, "train").problems
    assert len(problems) == 2 and all("is not in the list of classes" in problem.message for problem in problems)


def test_an_image_without_objects_is_background(home):
    put(home, "a", "")
    dataset = FolderDataset(read_split(home, "train"), Unresized())
    assert dataset.counts == [2, 0] and dataset.remarks == ["1 image without objects"]


def test_lines_are_those_of_the_elements(home):
    good = object_xml(*DOG)
    put(home, "a", good + object_xml("dog", (9, 9, 3, 20)) + good)
    text = (home / "Annotations/a.xml").read_text()
    line = text[: text.index("<xmin>9")].count("\n")  # that of <bndbox>, one above
    assert only_problem(read_split(home, "train")) == (
        f"{home / 'Annotations/a.xml'}:{line}: object 2 ('dog') has xmax below xmin; correct or remove it"
    )


def test_what_is_wrong_with_one_split_does_not_keep_another(home):
    put(home, "c", "<object/>")
    assert read_split(home, "train").problems == []
    assert len(read_split(home, "val").problems) == 1
    assert read_split(home, "val").names == ["c.jpg"]


def write_as_voc(coco, home):
    """A COCO-format folder as a Pascal VOC one, whose corners are whole, and without its boxes of no area."""
    for split in ("train", "val"):
        document = json.loads((coco / "annotations" / f"instances_{split}.json").read_text())
        names = {entry["id"]: entry["name"] for entry in document["categories"]}
        objects = {entry["id"]: [] for entry in document["images"]}
        for entry in document["annotations"]:
            x, y, width, height = entry["bbox"]
            objects[entry["image_id"]].append((names[entry["category_id"]], (x + 1, y + 1, x + width, y + height)))
        images = {entry["file_name"].rpartition(".")[0]: objects[entry["id"]] for entry in document["images"]}
        shutil.copytree(coco / split, home / "JPEGImages", dirs_exist_ok=True)
        write_voc(home, {split: images}, size=(480, 640))


@pytest.fixture
def cells(real_data, tmp_path):
    """A real data set in COCO's format and in Pascal VOC's, both without what the latter cannot express."""
    shutil.copytree(real_data("bccd"), tmp_path / "coco")
    for path in (tmp_path / "coco/annotations").iterdir():
        document = json.loads(path.read_text())
        document["annotations"] = [entry for entry in document["annotations"] if min(entry["bbox"][2:]) > 0]
        path.write_text(json.dumps(document))
    write_as_voc(tmp_path / "coco", tmp_path / "voc")
    return tmp_path / "coco", tmp_path / "voc"


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_data_are_the_same_as_in_coco(cells, split):
    coco, voc = (FolderDataset(read_split(folder, split), Unresized()) for folder in cells)
    assert voc.classes == coco.classes and voc.remarks == coco.remarks
    assert voc.records.names == coco.records.names and voc.sizes == coco.sizes
    for mine, theirs in zip(voc.records.objects[:-1], coco.records.objects[:-1], strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.slow
def test_training_is_the_same_as_on_coco(cells, tmp_path, monkeypatch, no_pictures, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows, scores = [], []
    for data in cells:
        run = training.run([*FLAGS, "--max-steps-per-epoch", "3", "--data", str(data), "--output", f"{data}-run"])
        written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows.append([{key: row[key] for key in row.keys() - TIMES} for row in written])
        capsys.readouterr()
        assert evaluate.main([str(run), "--data", str(data)]) == 0
        scores.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("AP")])
    assert rows[0] == rows[1] and {"train", "eval", "end"} <= {row["event"] for row in rows[0]}
    assert scores[0] == scores[1] and scores[0]
