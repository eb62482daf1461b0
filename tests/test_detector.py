"""A trained detector from Python: the run's own detections again, whatever the images come as."""

import json
from pathlib import Path

import detectors
import numpy as np
import pytest
import torch
from callers import every_caller
from PIL import Image, ImageOps
from short_runs import short_run, write_pictures

import dndetr
from dndetr.config import to_dict
from dndetr.data.errors import DataError
from dndetr.models.build import build_model
from dndetr.models.weights.official import COCO_CLASSES
from dndetr.presets import tiny
from dndetr.runs.checkpoint import load_checkpoint, save_checkpoint
from dndetr.shapes import write_shapes

RECIPES = {
    "fixed": ["--images.canvas", "96", "128"],
    "official": ["--images.recipe", "official", "--images.eval-size", "96", "--images.max-size", "160",
                 "--images.sizes", "64", "96"],
    "original": ["--images.recipe", "original", "--batch-size", "2"],
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "fixed"
    return short_run(folder, "--data", str(pictures), *RECIPES["fixed"], "--precision", "float32")


@pytest.fixture(scope="module")
def detector(run):
    return dndetr.load(run)


def assert_the_runs_detections(found, run: Path, image_ids, classes):
    by_image = {image_id: [] for image_id in image_ids}
    for result in json.loads((run / "detections_val.json").read_text()):
        by_image[result["image_id"]].append(result)
    for prediction, image_id in zip(found, image_ids, strict=True):
        expected = by_image[image_id]
        assert [classes[label][0] for label in prediction.labels.tolist()] == [r["category_id"] for r in expected]
        assert prediction.names == [dict(classes)[r["category_id"]] for r in expected]
        np.testing.assert_allclose(prediction.scores, [r["score"] for r in expected], atol=1e-5)
        boxes = np.array([r["bbox"] for r in expected])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(prediction.boxes_xyxy, boxes, atol=2e-2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_predict_repeats_the_runs_evaluation(recipe, pictures, tmp_path):
    run = short_run(tmp_path / "run", "--data", str(pictures), *RECIPES[recipe], "--precision", "float32")
    detector = dndetr.load(run)
    files = [pictures / "val" / f"{number}.jpg" for number in range(6)]
    found = detector.predict(files, threshold=0)
    assert_the_runs_detections(found, run, range(10, 16), detector.classes)


def test_predict_repeats_the_evaluation_on_shapes(tmp_path):
    run = short_run(tmp_path / "run", "--precision", "float32")
    write_shapes(tmp_path / "shapes", 1, 6)
    detector = dndetr.load(run)
    found = detector.predict(sorted((tmp_path / "shapes" / "val").iterdir()), threshold=0)
    assert_the_runs_detections(found, run, range(6), detector.classes)


def test_every_kind_of_image_gives_the_same(detector, pictures):
    picture = Image.open(pictures / "val" / "0.jpg").convert("RGB")
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    images = [pictures / "val" / "0.jpg", str(pictures / "val" / "0.jpg"), picture, array, tensor, tensor / 255]
    first, *others = detector.predict(images, threshold=0, batch_size=1)
    assert len(first.scores) == 90
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert one == two if isinstance(one, list) else torch.equal(one, two)


@every_caller
def test_what_is_found_does_not_depend_on_what_the_caller_has_set(detector, run, pictures, caller):
    file = pictures / "val" / "3.jpg"
    [expected] = detector.predict(file, threshold=0)
    with caller():
        loaded = dndetr.load(run)
        found = [*detector.predict(file, threshold=0), *loaded.predict(file, threshold=0)]
    for prediction in found:
        assert torch.equal(prediction.boxes_xyxy, expected.boxes_xyxy)
        assert torch.equal(prediction.scores, expected.scores) and torch.equal(prediction.labels, expected.labels)
    assert all(p.dtype == torch.float32 and not p.is_inference() for p in loaded.model.parameters())


def test_device_and_precision_may_be_torchs_own_objects(detector, run):
    for device in ("cpu", torch.device("cpu"), torch.device("cpu", 0)):
        assert dndetr.load(run, device).device == torch.device("cpu")
    again = dndetr.Detector(detector.model, detector.config, detector.classes, torch.device("cpu"), torch.bfloat16)
    assert again.precision == torch.bfloat16
    with pytest.raises(ValueError, match=r"precision torch.int8: give auto, float32 or bfloat16"):
        dndetr.Detector(detector.model, detector.config, detector.classes, precision=torch.int8)


def test_an_image_alone_is_a_list_of_one(detector, pictures):
    alone = detector.predict(pictures / "val" / "3.jpg", threshold=0)
    together = detector.predict([pictures / "val" / f"{number}.jpg" for number in (0, 3)], threshold=0)
    assert len(alone) == 1
    torch.testing.assert_close(alone[0].boxes_xyxy, together[1].boxes_xyxy, atol=1e-2, rtol=1e-4)
    assert detector.predict([]) == []


def test_boxes_follow_the_size_of_the_original(detector, pictures):
    picture = Image.open(pictures / "val" / "0.jpg")
    small, large = detector.predict([picture, picture.resize((560, 360), Image.Resampling.NEAREST)], threshold=0)
    assert (large.boxes_xyxy[:5] / small.boxes_xyxy[:5]).median() == pytest.approx(4, rel=0.05)


def test_files_are_turned_upright_and_pictures_taken_as_they_are(detector, pictures):
    turned = Image.open(pictures / "val" / "4.jpg")
    images = [pictures / "val" / "4.jpg", ImageOps.exif_transpose(turned), turned]
    as_file, upright, as_stored = detector.predict(images, threshold=0, batch_size=1)
    assert torch.equal(as_file.boxes_xyxy, upright.boxes_xyxy)
    assert not torch.equal(as_file.boxes_xyxy, as_stored.boxes_xyxy)


def test_the_threshold_cuts(detector, pictures):
    file = pictures / "val" / "0.jpg"
    (everything,) = detector.predict(file, threshold=0)
    middle = everything.scores.median().item()
    (some,) = detector.predict(file, threshold=middle)
    assert 0 < len(some.scores) < len(everything.scores) and some.scores.min() >= middle
    assert len(some.boxes_xyxy) == len(some.labels) == len(some.names) == len(some.scores)
    assert len(detector.predict(file, threshold=1.01)[0].scores) == 0


def test_the_batch_size_changes_nothing(detector, pictures):
    files = [pictures / "val" / f"{number}.jpg" for number in range(6)]
    for one, two in zip(detector.predict(files, 0, batch_size=1), detector.predict(files, 0), strict=True):
        torch.testing.assert_close(one.scores, two.scores, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="a batch size of 0"):
        detector.predict(files, batch_size=0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5), np.uint8), r"uint8 \[4, 5\]; give uint8 \[height, width, 3\]"),
        (np.zeros((4, 5, 3)), "float64"),
        (np.zeros((0, 5, 3), np.uint8), r"\[0, 5, 3\]"),
        (torch.zeros(4, 5, 3), r"shape \[4, 5, 3\]; give \[3, height, width\]"),
        (torch.zeros(2, 3, 5, 5), r"shape \[2, 3, 5, 5\]"),
        (torch.full((3, 5, 5), 2.0), "values from 2 to 2; give floats in"),
        (torch.full((3, 5, 5), float("nan")), "values from nan"),
        (b"bytes", "is a bytes; give a path"),
    ],
    ids=["grey", "float", "empty", "order", "batch", "range", "nan", "bytes"],
)
def test_what_is_no_image_is_an_error(detector, image, message):
    with pytest.raises(ValueError, match=message):
        detector.predict([image])


def test_unreadable_files_are_named(detector, tmp_path):
    with pytest.raises(DataError, match=r"none.jpg: no such image file"):
        detector.predict(tmp_path / "none.jpg")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"torn.png: "):
        detector.predict(tmp_path / "torn.png")


def test_the_moving_average_is_what_is_loaded(run):
    for name in ("checkpoint.pt", "best.pt"):
        saved = load_checkpoint(run / name)
        loaded = dndetr.load(run / name).model.state_dict()
        assert any(not torch.equal(saved["model"][key], saved["ema"][key]) for key in loaded)
        assert all(torch.equal(loaded[key], saved["ema"][key]) for key in loaded)


def test_without_an_average_the_model_is_loaded(tmp_path):
    config = tiny()
    model = build_model(config.model, 2)
    checkpoint = {"model": model.state_dict(), "ema": None, "config": to_dict(config), "classes": [[1, "a"], [5, "b"]]}
    save_checkpoint(tmp_path / "c.pt", checkpoint)
    detector = dndetr.load(tmp_path / "c.pt")
    assert detector.classes == [(1, "a"), (5, "b")] and detector.names == ["a", "b"]
    assert torch.equal(detector.model.queries.label_enc.weight, model.queries.label_enc.weight)


def test_weights_alone_need_the_name_of_their_model(tmp_path):
    weights = build_model(tiny().model, 80).state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="name the model: --preset"):
        dndetr.load(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="--preset huge: choose one of"):
        dndetr.load(tmp_path / "weights.pt", preset="huge")
    with pytest.raises(ValueError, match=r"weights\.pt has no classes that are known"):
        dndetr.load(tmp_path / "weights.pt", preset="tiny")
    torch.save(build_model(detectors.CONFIGS["dn-detr"], 5).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: its backbone does not fit"):
        dndetr.load(tmp_path / "other.pt", preset="tiny")


def test_weights_with_classes_load_with_a_preset(tmp_path):
    model = build_model(tiny().model, 80)
    classes = [list(entry) for entry in COCO_CLASSES]
    save_checkpoint(tmp_path / "c.pt", {"model": model.state_dict(), "classes": classes})
    detector = dndetr.load(tmp_path / "c.pt", preset="tiny")
    assert detector.classes == list(COCO_CLASSES)
    some = dndetr.load(tmp_path / "c.pt", preset="tiny", classes=[(17, "cat"), (1, "person")])
    expected = model.decoder.class_embed[0].weight[[15, 0]]
    assert torch.equal(some.model.decoder.class_embed[0].weight, expected)


def test_a_run_without_checkpoint_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        dndetr.load(tmp_path)


def test_the_public_names_are_lazy():
    assert dndetr.Detector.__name__ == "Detector"
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = dndetr.lode
