"""COCO-format folders with objects of one's choice, and what is in folders."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

BOXES = [
    [5, 6, 20, 10],
    [0.1, 0.7, 63.9, 47.3],
    [1 / 3, 2 / 7, 10.123456789, 5e-3],
    [-3.5, -2, 20, 12],
    [60, 40, 9, 20],
]


def write_set(root: Path, names, objects, classes=((7, "cat"), (3, "dog")), split="train", size=(48, 64)) -> Path:
    """A COCO-format folder; objects: (image, category id, box, more fields) for each."""
    images = [
        {"id": 1000 - 7 * place, "file_name": name, "height": size[0], "width": size[1]}
        for place, name in enumerate(names)
    ]
    annotations = [
        {"id": 50 - place, "image_id": 1000 - 7 * image, "category_id": category, "bbox": box}
        | {"area": box[2] * box[3], "iscrowd": 0}
        | more
        for place, (image, category, box, more) in enumerate(objects)
    ]
    categories = [{"id": number, "name": name} for number, name in sorted(classes)]
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    rng = np.random.default_rng(len(split))
    for name in names:
        path = root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return root


def write_small(root: Path) -> Path:
    """Three training images, in no order, one in a folder and one without objects; two validation images."""
    objects = [(2 * (place % 2), (3, 7)[place % 2], box, {}) for place, box in enumerate(BOXES)]
    write_set(root, ["img10.png", "deep/img2.png", "img1.png"], objects)
    return write_set(root, ["a.png", "b.png"], [(1, 3, [1, 2, 3, 4], {"area": 7.5})], split="val")


def document(root: Path, split: str = "train") -> dict:
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def tree(root: Path) -> dict:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
