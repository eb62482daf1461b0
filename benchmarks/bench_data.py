"""Preparing training batches: images as bytes against float images, in turn in one process, on one thread.

``pytest benchmarks/bench_data.py -s --results FILE``. Processor time of an image, medians over epochs: "float images"
are the same pictures by Pillow alone, each normalised by one matrix product and put on a canvas of float32; "decoding"
is what a JPEG takes of either. ``bench_shown`` is what a model's side pays: images made of bytes, against the copy that
brings float images into the layout of convolutions.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dndetr.data.collate import canvas_bucket, collate
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.sample import Sample
from dndetr.data.shapes import ShapesDataset
from dndetr.data.source import open_source
from dndetr.data.transforms import FixedTraining, OfficialEvaluation, OfficialTraining
from dndetr.ops import normalise
from dndetr.ops.resize import resize_reference

IMAGES, BATCH, EPOCHS = 24, 4, 9
SIZE = (480, 640)
KINDS = {"official": OfficialTraining(), "800": OfficialEvaluation(), "240x320": FixedTraining(), "shapes": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """JPEGs of COCO's usual size, smooth with some grain, seven objects in each."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "annotations").mkdir()
    (root / "train").mkdir()
    rng = np.random.default_rng(0)
    height, width = SIZE
    images = [{"id": n, "file_name": f"{n}.jpg", "width": width, "height": height} for n in range(IMAGES)]
    for image in images:
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((width, height))
        grained = np.asarray(coarse) + rng.normal(0, 6, (height, width, 3))
        Image.fromarray(grained.clip(0, 255).astype(np.uint8)).save(root / "train" / image["file_name"], quality=92)
    boxes = [[20 + 60 * n, 30 + 40 * n, 90, 80] for n in range(7)]
    objects = [
        {"id": 7 * image + n, "image_id": image, "category_id": 1, "bbox": box}
        for image in range(IMAGES)
        for n, box in enumerate(boxes)
    ]
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]}
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return root


def float_image(pixels: np.ndarray, colours: Tensor) -> Tensor:
    """uint8 [h, w, 3] -> float32 [3, h, w]."""
    columns = torch.from_numpy(pixels.copy()).view(-1, 3).float().T
    return torch.addmm(colours[:, 3:], colours[:, :3], columns).view(3, *pixels.shape[:2])


def on_a_canvas(images: Sequence[Tensor]) -> Tensor:
    """float32 [3, h, w] each -> [B, 3, H, W]."""
    sizes = [tuple(image.shape[1:]) for image in images]
    canvas = torch.zeros(len(images), 3, *canvas_bucket(sizes, 64))
    for place, image, (height, width) in zip(canvas, images, sizes, strict=True):
        place[:, :height, :width] = image
    return canvas


def as_bytes(samples: Sequence[Sample]) -> Tensor:
    return collate(samples).pixels


def as_floats(samples: Sequence[Sample]) -> Tensor:
    collate([Sample(sample.pixels[:1, :1], *list(vars(sample).values())[1:]) for sample in samples])  # the targets
    return on_a_canvas([float_image(sample.pixels, sample.colours) for sample in samples])


def processor_time(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


@pytest.mark.parametrize("kind", KINDS)
def bench_data(record, monkeypatch, folder, kind):
    from dndetr.data import transforms

    dataset = ShapesDataset("train", IMAGES)
    if KINDS[kind] is not None:
        dataset = FolderDataset(open_source(folder).read("train"), KINDS[kind], cache_bytes=0)
    ours, found = transforms.resize, {}

    def read(epoch: int, put: Callable[[Sequence[Sample]], Tensor]) -> None:
        for first in range(0, IMAGES, BATCH):
            batch = put([dataset.sample(index, epoch) for index in range(first, first + BATCH)])
            found[put.__name__] = found.get(put.__name__, 0) + batch.nbytes

    ways = {"ours": (ours, as_bytes), "float images": (resize_reference, as_floats)}
    times = {name: [] for name in (*ways, "decoding")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for epoch in range(EPOCHS):
        for name, (resized, put) in ways.items():
            monkeypatch.setattr(transforms, "resize", resized)
            times[name].append(processor_time(lambda epoch=epoch, put=put: read(epoch, put)) / IMAGES)
        if KINDS[kind] is not None:
            times["decoding"].append(processor_time(lambda: [dataset.picture(n) for n in range(IMAGES)]) / IMAGES)
    torch.set_num_threads(threads)
    median = {name: statistics.median(values[1:]) for name, values in times.items() if values}
    title = f"preparing an image, {kind}"
    record(title, median, bytes={name: count // (EPOCHS * IMAGES) for name, count in found.items()})
    print(f"\n{title}: " + ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in median.items()), end="")
    print(f": {median['ours'] / median['float images']:.2f} of float images", end="")


@pytest.mark.parametrize(("images", "height", "width"), [(2, 800, 1066), (8, 128, 128)])
def bench_shown(record, images, height, width):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, height, width, 3), generator=draw, dtype=torch.uint8)
    colours, sizes = torch.randn(images, 3, 4, generator=draw), torch.tensor([[height, width]]).repeat(images, 1)
    floats = normalise(pixels, colours, sizes).contiguous()
    run = {
        "ours": lambda: normalise(pixels, colours, sizes),
        "layout of float images": lambda: floats.contiguous(memory_format=torch.channels_last),
        "reference": lambda: normalise(pixels, colours, sizes, backend="reference"),
    }
    times = {name: [] for name in run}
    for _ in range(30):
        for name, function in run.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    title = f"images of bytes, {images} of {height}x{width}"
    record(title, median)
    print(f"\n{title}: " + ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in median.items()), end="")
