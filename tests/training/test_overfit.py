"""--overfit N: the same images for training and evaluation, every epoch, and a verdict at the end."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from short_runs import write_pictures

from dndetr import train
from dndetr.config import Config
from dndetr.data.shapes import ShapesDataset
from dndetr.data.subset import Subset
from dndetr.data.training import TrainingData
from dndetr.training.overfit import verdict
from dndetr.training.trainer import Trainer


def images_of(batches) -> dict[int, torch.Tensor]:
    return {number: image for batch in batches for number, image in zip(batch.ids.tolist(), batch.pixels, strict=True)}


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


@pytest.mark.parametrize("source", ["shapes", "pictures"])
def test_training_and_evaluation_see_the_same_few_images(source, pictures):
    data = source if source == "shapes" else str(pictures)
    config = train.parse(["--overfit", "3", "--preset", "tiny", "--data", data])
    assert config.batch_size == 3 and not config.images.augment
    data = TrainingData(config)
    assert data.images == {"train": 3, "val": 3} and data.steps_per_epoch == 50
    first, later = images_of(data.training(0)), images_of(data.training(5))
    scored = images_of(data.validation())
    assert len(first) == 3 and first.keys() == later.keys() == scored.keys()
    for number, image in scored.items():
        torch.testing.assert_close(first[number], image)
        torch.testing.assert_close(later[number], image)
    assert {image["id"] for image in data.ground_truth["images"]} == first.keys()
    assert {entry["image_id"] for entry in data.ground_truth["annotations"]} == first.keys()
    assert sum(data.class_counts["val"]) == len(data.ground_truth["annotations"])


def test_images_without_objects_are_passed_over(pictures):
    path = pictures / "annotations" / "instances_train.json"
    document = json.loads(path.read_text())
    empty = document["images"][0]["id"]
    document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] != empty]
    path.write_text(json.dumps(document))
    config = train.parse(["--overfit", "7", "--preset", "small", "--data", str(pictures)])
    assert empty not in images_of(TrainingData(config).validation())
    with pytest.raises(ValueError, match="--overfit 8: only 7 training images have objects"):
        TrainingData(train.parse(["--overfit", "8", "--preset", "small", "--data", str(pictures)]))


def test_flags_go_before_what_overfitting_chooses():
    chosen, own = train.parse(["--overfit=4"]), train.parse(["--overfit", "4", "--epochs", "3", "--batch-size", "2"])
    assert chosen.overfit == 4 and (own.epochs, own.batch_size) == (3, 2) and chosen.epochs != 3
    with pytest.raises(ValueError, match="--overfit 0: give 1 or more"):
        train.parse(["--overfit", "0"])
    assert (
        Config().overfit is None and train.parse([]).images.augment == train.parse(["--preset", "tiny"]).images.augment
    )


@pytest.mark.parametrize(("ap", "status"), [(0.93, 0), (0.41, 1), (None, 1)])
def test_the_verdict_is_the_exit_status(ap, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "fit", lambda self, folder, listeners, restart: {"AP": ap})
    assert train.main(["--overfit", "4", "--train-images", "8", "--output", str(tmp_path / "run")]) == status
    out, error = capsys.readouterr()
    if status == 0:
        assert "--overfit 4 passed: AP 0.930 on the 4 images it was trained on" in out and error == ""
    else:
        assert error.startswith("error: --overfit 4 did not pass: ") and error.count("\n") == 1
        assert "first_batch.png" in error and "check_data" not in error
    assert "check_data my_data" in verdict(0.1, 4, "my_data")[1]


def test_a_few_images_are_a_data_set():
    few = Subset(ShapesDataset("train", 9), 2, repeats=3)
    assert len(few) == len(few.sizes) == len(few.counts) == 6
    assert [few.sample(index, epoch=9).image_id for index in range(6)] == [0, 1, 0, 1, 0, 1]
    assert np.array_equal(few.sample(0, epoch=9).pixels, few.sample(2).pixels)


def test_images_with_tiny_objects_come_last(pictures):
    path = pictures / "annotations" / "instances_train.json"
    document = json.loads(path.read_text())
    tiny = document["images"][0]["id"]
    document["annotations"][0]["bbox"][2:] = [1.0, 1.0]
    path.write_text(json.dumps(document))
    config = train.parse(["--overfit", "7", "--preset", "small", "--data", str(pictures)])
    assert document["annotations"][0]["image_id"] == tiny not in images_of(TrainingData(config).validation())
    assert tiny in images_of(TrainingData(replace(config, overfit=8)).validation())
