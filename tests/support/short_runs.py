"""Runs of a few steps, and a small COCO-format folder, for tests that need a trained model."""

import contextlib
import json
import os
import shlex
import signal
import sys
from pathlib import Path
from unittest import mock

import goldens
import numpy as np
import pytest
from PIL import Image

from dndetr import train
from dndetr.runs.console import Console
from dndetr.runs.listener import Listener

# Of runs whose detector is not what is tested: a fraction of the time of the preset's own size.
SMALL = shlex.split(
    "--images.canvas 64 64 --model.width 32 --model.hidden 64 --model.decoder-layers 2 --model.queries 8"
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
_SIZES = ((90, 140), (140, 90), (100, 100), (64, 180), (120, 90), (33, 61))


def without_pictures():
    """Runs of training within draw nothing."""
    return mock.patch("dndetr.training.listeners.Pictures", Listener)


def environment() -> dict:
    """That of programs that import this package and the tests' support, one thread each."""
    tests = str(goldens.ROOT / "tests" / "support")
    return {**os.environ, "PYTHONPATH": f"{goldens.ROOT}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}


def short_run(folder: Path, *flags: str, pictures: bool = False) -> Path:
    """A run of two steps; its weights predict nonsense, but a nonsense of their own for every image."""
    few = ["--epochs", "1", "--batch-size", "4", "--train-images", "8", "--val-images", "6", "--quiet"]
    with contextlib.nullcontext() if pictures else without_pictures():
        return train.run([*few, "--output", str(folder), *flags])


def write_pictures(folder: Path, classes=((3, "cell"), (7, "dust"), (12, "hair"))) -> Path:
    """A COCO-format folder: 8 training and 6 validation images of different sizes, one grey, one turned by its EXIF."""
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", 8), ("val", 6)):
        (folder / split).mkdir()
        images, annotations = [], []
        for number in range(count):
            height, width = _SIZES[number % len(_SIZES)]
            small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
            exif = Image.Exif()
            if number == 1:
                picture = picture.convert("L")
            if number == 4:
                picture, exif[0x0112] = picture.transpose(Image.Transpose.ROTATE_90), 6
            picture.save(folder / split / f"{number}.jpg", quality=95, exif=exif)
            images.append({"id": 10 + number, "file_name": f"{number}.jpg", "width": width, "height": height})
            for _ in range(3):
                x, y = rng.random(2) * (width / 2, height / 2)
                w, h = rng.uniform(0.2, 0.45, 2) * (width, height)
                place = len(annotations)
                about = {"id": place + 1, "image_id": 10 + number, "category_id": classes[place % len(classes)][0]}
                annotations.append(about | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
        categories = [{"id": number, "name": name} for number, name in classes]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    return folder


@contextlib.contextmanager
def stopped_after(step: int):
    """Runs of training within are told to end after so many of their steps, and end with that signal's status."""
    step_ended = Console.step_ended

    def show_and_signal(self, done, *arguments):
        step_ended(self, done, *arguments)
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(Console, "step_ended", show_and_signal), pytest.raises(SystemExit) as end:
        yield
    assert end.value.code == 128 + signal.SIGTERM
