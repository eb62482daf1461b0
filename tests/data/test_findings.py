"""What is found in the columns of a data set: each finding where it is, and none where it is not."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from splits import read_split

from dndetr.data.image import read_image
from dndetr.data.records import Records, make_objects
from dndetr.data.review.boxes import box_findings, same_boxes
from dndetr.data.review.classes import class_findings
from dndetr.data.review.findings import Finding, Place
from dndetr.data.review.fingerprints import fingerprint
from dndetr.data.review.pictures import picture_findings
from dndetr.data.training import evaluation_transform
from dndetr.presets import preset_named

CLASSES = ((3, "dog"), (7, "cat"), (9, "cow"))
FAR_APART = [(20.0 * at, 10.0 * at, 30.0, 40.0) for at in range(6)]


def split(image, label, boxes, name="train", sizes=((240, 320), (240, 320)), classes=CLASSES, **options) -> Records:
    """Images 0.jpg, 1.jpg and so on with ids from 100 on; annotations have ids from 1 on."""
    names, ids = [f"{at}.jpg" for at in range(len(sizes))], 100 + np.arange(len(sizes))
    objects = make_objects(image, label, boxes)
    folder, file = Path("set") / name, Path("set") / f"{name}.json"
    made = Records(name, Path("set"), file, folder, list(classes), names, ids, np.array(sizes), objects, numbered=True)
    return replace(made, **options)


def counts(name="train", classes=CLASSES, **objects) -> Records:
    """A split with so many objects of each class by name."""
    label = [place for place, (_, called) in enumerate(classes) for _ in range(objects.get(called.strip(), 0))]
    return split([0] * len(label), label, [(0, 0, 9, 9)] * len(label), name=name, classes=classes)


def of_boxes(records: Records, preset: str = "small", **images) -> dict[str, Finding]:
    config = preset_named(preset)
    config = replace(config, images=replace(config.images, **images))
    return {finding.kind: finding for finding in box_findings(records, evaluation_transform(config), config)}


def of_classes(*splits: Records) -> dict[str, Finding]:
    return {finding.kind: finding for finding in class_findings(splits)}


def test_ordinary_data_gives_no_findings():
    label = [0, 1, 2] * 10
    boxes = [(at, at, 30 + at, 40) for at in range(30)]
    train, val = (split([0] * 15 + [1] * 15, label, boxes, name=name) for name in ("train", "val"))
    assert of_boxes(train) == of_boxes(val, "dn-detr-r50") == of_classes(train, val) == {}


def test_doubled_boxes_are_told_apart_from_those_of_two_classes():
    boxes = [*FAR_APART[:3], (0, 0.4, 30, 40), (0, 0, 30, 40), FAR_APART[1], FAR_APART[2]]
    found = of_boxes(split([0, 0, 0, 0, 0, 0, 1], [0, 1, 2, 0, 0, 2, 2], boxes))
    assert set(found) == {"doubled box", "box of two classes"}
    doubled = found["doubled box"]
    # Three equal boxes are two too many; an equal box in another image is none.
    assert [place.objects for (place,) in doubled.cases] == [(0, 3), (0, 4)]
    assert doubled.message.startswith("2 boxes lie on another of the same class")
    assert doubled.line().endswith("image 100 (0.jpg) annotations 1, 4; image 100 (0.jpg) annotations 1, 5")
    (pair,) = found["box of two classes"].cases
    assert pair[0].as_json() == {"split": "train", "file": "0.jpg", "image_id": 100, "annotation_ids": [2, 6]}
    assert "1 box lies on another of a different class" in found["box of two classes"].line()


def test_boxes_that_only_overlap_are_not_doubled():
    assert of_boxes(split([0, 0], [0, 0], [(0, 0, 100, 100), (0, 6, 100, 100)])) == {}


def test_pairs_of_equal_boxes_are_those_of_every_pair_compared():
    rng = np.random.default_rng(0)
    image = np.sort(rng.integers(0, 20, 400))
    low = rng.integers(0, 3, (400, 2)) + rng.uniform(0, 0.2, (400, 2))
    boxes = np.concatenate((low, low + rng.integers(8, 10, (400, 2))), axis=1)
    size = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    shared = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    shared = shared.clip(0).prod(axis=2)
    iou = shared / (size[:, None] + size[None] - shared + 1e-6)
    wanted = np.argwhere(np.triu((iou >= 0.95) & (image[:, None] == image), k=1))
    assert len(wanted) > 20
    assert sorted(np.stack(same_boxes(image, boxes), axis=1).tolist()) == wanted.tolist()


def test_tiny_boxes_are_measured_as_the_model_sees_them():
    boxes = [(10, 10, 7, 50), (10, 80, 50, 7.9), (100, 10, 8.1, 8.1), *[(10, 10, 60 + at, 60) for at in range(5)]]
    records = split([0, 1, 0, *range(2, 7)], [0] * 8, boxes, sizes=[(480, 640)] * 7)
    tiny = of_boxes(records)["tiny box"]
    assert tiny.severity == "warning" and "2 boxes of 8 (25.0%) under 4 pixels" in tiny.message
    assert [(place.image, place.objects) for (place,) in tiny.cases] == [(0, (0,)), (1, (2,))]
    assert "--preset small" in tiny.message and "--images.canvas" in tiny.message
    assert "tiny box" not in of_boxes(records, canvas=(480, 640))
    assert "tiny box" not in of_boxes(records, "dn-detr-r50")
    official = of_boxes(records, "dn-detr-r50", eval_size=240, max_size=320)["tiny box"]
    assert "--images.eval-size" in official.message


def test_a_small_share_of_tiny_boxes_is_a_note():
    boxes = [(10, 10, 2, 2), *[(at, at, 60, 60) for at in range(0, 150)]]
    tiny = of_boxes(split([0] * 76 + [1] * 75, [0] * 151, boxes))["tiny box"]
    assert tiny.severity == "note" and "1 box of 151 (0.7%)" in tiny.message


def test_images_out_of_shape_are_told_for_one_canvas_alone():
    records = split([], [], [], sizes=((240, 320), (100, 300), (320, 240)))
    stretched = of_boxes(records)["stretched image"]
    assert stretched.severity == "note" and [place.image for (place,) in stretched.cases] == [1]
    assert "1 image of 3" in stretched.message and "240x320" in stretched.message
    assert of_boxes(records, "dn-detr-r50") == {}


@pytest.mark.parametrize(
    ("name", "objects", "wanted"),
    [
        ("train", 100, []),
        ("train", 101, [("warning", "100 queries")]),
        ("val", 101, [("warning", "100 queries"), ("note", "evaluation keeps 100 detections")]),
        ("train", 513, [("warning", "100 queries"), ("warning", "training keeps the 512 largest")]),
    ],
)
def test_crowded_images(name, objects, wanted):
    records = split([1] * objects, [0] * objects, [(at % 280, at // 280 * 40, 30, 30) for at in range(objects)], name)
    config = preset_named("small")
    every = box_findings(records, evaluation_transform(config), config)
    found = [finding for finding in every if finding.kind == "crowded image"]
    assert [finding.severity for finding in found] == [severity for severity, _ in wanted]
    for finding, (_, text) in zip(found, wanted, strict=True):
        assert text in finding.message and f"up to {objects:,}" in finding.message
        assert finding.line().endswith(": image 101 (1.jpg)")


def test_classes_that_only_one_split_has():
    found = of_classes(counts(dog=20, cat=20), counts("val", dog=5, cow=5), counts("test", dog=1, cat=1))
    assert set(found) == {"class not in train", "class not in val"}
    unlearnt, unscored = found["class not in train"], found["class not in val"]
    assert (unlearnt.severity, unlearnt.split, list(unlearnt.classes)) == ("warning", "val", [(9, "cow")])
    assert (unscored.severity, unscored.split, list(unscored.classes)) == ("note", "val", [(7, "cat")])
    assert unlearnt.line().startswith("warning: val: 1 of 3 classes") and unlearnt.line().endswith(": cow")


def test_classes_without_any_object_and_splits_without_training():
    unused = of_classes(counts(dog=20, cat=20), counts("val", dog=5, cat=5))["class without objects"]
    assert (unused.severity, list(unused.classes), unused.split) == ("note", [(9, "cow")], "train and val")
    assert of_classes(counts("val", dog=5)) == of_classes() == {}


def test_a_split_may_list_its_classes_in_another_way():
    val = counts("val", classes=((9, "cow"), (3, "dog")), cow=3, dog=4)
    assert set(of_classes(counts(dog=20, cow=20, cat=20), val)) == {"class not in val"}


@pytest.mark.parametrize(
    ("dog", "cat", "cow", "wanted"),
    [
        (95, 10, 10, {}),
        (100, 10, 10, {"imbalance": "note"}),
        (1000, 10, 50, {"imbalance": "warning"}),
        (95, 10, 9, {"few objects": "warning"}),
        (9, 9, 9, {"few objects": "warning"}),
    ],
)
def test_rare_classes(dog, cat, cow, wanted):
    found = of_classes(counts(dog=dog, cat=cat, cow=cow))
    assert {kind: finding.severity for kind, finding in found.items()} == wanted
    if "imbalance" in found:
        assert f"{dog / 10:.0f} times as many objects of dog ({dog:,}) as of cat (10)" in found["imbalance"].message
    if cow < 10:
        assert (9, "cow") in found["few objects"].classes


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("cat", "Cat ", True),
        ("traffic light", "traffic_light", True),
        ("cat", "cats", True),
        ("cat", "cow", False),
        ("C", "C++", False),
        ("bus", "buses", False),
    ],
)
def test_names_that_look_alike(one, other, alike):
    classes = ((3, one), (7, other))
    objects = split([0] * 20, [0, 1] * 10, [(0, 0, 9, 9)] * 20, classes=classes)
    found = of_classes(objects)
    assert set(found) == ({"classes alike"} if alike else set())
    if alike:
        assert repr(one) in found["classes alike"].message and "(id 7)" in found["classes alike"].message


def test_pictures_in_two_splits_and_twice_in_one():
    train, val = (split([], [], [], name=name, sizes=[(9, 9)] * 4) for name in ("train", "val"))
    a, b, c, d, e = (noise(seed) for seed in range(5))
    shared, twice = picture_findings([(train, {0: a, 1: b, 2: b, 3: c}), (val, {0: d, 1: e, 2: a, 3: b})])
    assert (shared.severity, shared.split) == ("warning", "train and val") and "2 pictures in both" in shared.message
    first, second = (" = ".join(f"{place.records.name} {place.image}" for place in case) for case in shared.cases)
    assert (first, second) == ("train 0 = val 2", "train 1 = train 2 = val 3")
    assert "train image 100 (0.jpg) = val image 102 (2.jpg); train image 101 (1.jpg) = " in shared.line()
    assert (twice.severity, twice.split) == ("note", "train") and "1 picture more than once" in twice.message
    assert twice.line().endswith(": image 101 (1.jpg) = image 102 (2.jpg)")
    assert list(picture_findings([(train, {0: a, 1: b}), (val, {0: c, 3: d})])) == []
    assert list(picture_findings([(train, {0: a, 1: b}), (val, {})])) == []


def noise(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return fingerprint(Image.fromarray(pixels).resize((64, 64)))


def test_pictures_that_were_compressed_or_resized_anew_look_alike(real_data):
    train = read_split(real_data("coco_tiny"), "train").take(range(12))
    val = replace(train, name="val")
    pictures = [read_image(train.path(index)) for index in range(len(train))]
    kept, other = dict(enumerate(map(fingerprint, pictures))), {}
    for index, picture in enumerate(pictures[:6]):
        changed = io.BytesIO()
        small = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4), Image.Resampling.LANCZOS)
        (small if index % 2 else picture).save(changed, "JPEG", quality=60)
        other[11 - index] = fingerprint(read_image(changed))
    (found,) = picture_findings([(train, kept), (val, other)])
    assert (found.severity, found.kind, found.split) == ("note", "picture alike", "train and val")
    pairs = sorted((one.image, another.image) for one, another in found.cases)
    assert pairs == [(index, 11 - index) for index in range(6)]


def test_frames_of_one_scene_are_not_all_searched():
    train, val = (split([], [], [], name=name, sizes=[(9, 9)] * 600) for name in ("train", "val"))
    frames = [
        bytes([at % 256, at // 256, 7, 7, 7, 7, 7, side]) + bytes(range(64)) for side in (0, 1) for at in range(600)
    ]
    (found,) = picture_findings([(train, dict(enumerate(frames[:600]))), (val, dict(enumerate(frames[600:])))])
    assert "128 pictures or more almost the same" in found.message and len(found.cases) == 128


def test_flat_pictures_look_like_nothing():
    train, val = (split([], [], [], name=name, sizes=[(9, 9)]) for name in ("train", "val"))
    grey = [{0: fingerprint(Image.new("RGB", (9, 9), (level,) * 3))} for level in (100, 101)]
    assert list(picture_findings([(train, grey[0]), (val, grey[1])])) == []


def test_a_line_names_the_first_and_counts_the_others_and_json_has_all():
    records = split([0] * 5, [0] * 5, [(0, 0, 9, 9)] * 5, sizes=[(9, 9)] * 8)
    cases = [(Place(records, at, (0, 1, 2, 3, 4) if at == 0 else ()),) for at in range(8)]
    finding = Finding("note", "kind", "train", "a message", cases)
    line = finding.line()
    assert line.startswith(
        "note: train: a message: image 100 (0.jpg) annotations 1, 2, 3 and 2 more; image 101 (1.jpg); "
    )
    assert line.endswith("image 104 (4.jpg); and 3 more")
    told = finding.as_json()
    assert len(told["cases"]) == 8 and told["cases"][0][0]["annotation_ids"] == [1, 2, 3, 4, 5]
    many = [(at, f"class{at}") for at in range(20)]
    assert Finding("note", "kind", "train", "a message", classes=many).line().endswith("class11 and 8 more")


def test_objects_without_ids_of_their_own_are_counted_within_their_image():
    records = split([0, 0, 1, 1, 1], [0] * 5, [(0, 0, 9, 9)] * 5, numbered=False)
    place = Place(records, 1, (2, 4))
    assert str(place) == "1.jpg objects 1, 3"
    assert place.as_json() == {"split": "train", "file": "1.jpg", "objects": [1, 3]}
