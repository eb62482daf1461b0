"""Small COCO-format folders made on the spot, and commands on broken ones."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from broken_sets import forked_commands
from PIL import Image


def document(images=((40, 60), (50, 30)), boxes=((5.0, 6.0, 20.0, 10.0),), categories=((7, "cat"), (3, "dog"))) -> dict:
    """An annotation document: images as (height, width) with ids from 11, each box in every image, class by turns."""
    entries = [
        {"image_id": 11 + i, "bbox": list(box), "category_id": categories[b % len(categories)][0]}
        for i in range(len(images))
        for b, box in enumerate(boxes)
    ]
    return {
        "images": [{"id": 11 + i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(images)],
        "annotations": [{"id": 100 + i, **entry} for i, entry in enumerate(entries)],
        "categories": [{"id": number, "name": name} for number, name in categories],
    }


def write(root: Path, content: dict, split: str = "train") -> Path:
    """Writes a document and noise pictures of its sizes as a COCO-format folder."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    rng = np.random.default_rng(0)
    for image in content["images"]:
        pixels = rng.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / split / image["file_name"])
    return root


@pytest.fixture
def real_data():
    """The folder of a real data set by name, from ``DNDETR_SHARED`` (default ../shared); skips where it is absent."""

    def find(name: str) -> Path:
        shared = os.environ.get("DNDETR_SHARED", Path(__file__).resolve().parents[3] / "shared")
        folder = Path(shared) / "data" / name
        if not folder.is_dir():
            pytest.skip(f"no data at {folder} (set DNDETR_SHARED)")
        return folder

    return find


@pytest.fixture
def make_document():
    return document


@pytest.fixture
def make_folder(tmp_path):
    """Writes a document as a folder: ``make_folder(document, split="train")`` -> its path."""
    return lambda content, split="train": write(tmp_path / "set", content, split)


@pytest.fixture(scope="session")
def command():
    """``command(folder, module, *arguments)`` runs ``python -m module`` in a folder -> status, stdout, stderr."""
    with forked_commands() as run:
        yield run


@pytest.fixture
def broken(good_set, tmp_path):
    """A copy of the module's ``good_set`` to break, and an empty folder to work in."""
    shutil.copytree(good_set, tmp_path / "set")
    (tmp_path / "work").mkdir()
    return tmp_path / "set", tmp_path / "work"
