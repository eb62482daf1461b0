"""Small YOLO data sets made on the spot, and COCO ones written again as YOLO by a writer of the tests' own."""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

YAML = "train: images/train\nval: images/val\nnames: [dog, cat]\n"


def write_yolo(root: Path, yaml: str = YAML, images: str = "images/{split}", labels: str = "labels/{split}") -> Path:
    """Four training and two validation images of 64x48 with two objects each, the last of four without a label file."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        pictures, texts = (root / pattern.format(split=split) for pattern in (images, labels))
        pictures.mkdir(parents=True, exist_ok=True)
        texts.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(pictures / f"{split}_{i}.{'jpg' if i % 2 else 'png'}")
            if i < 3:
                (texts / f"{split}_{i}.txt").write_text("0 0.25 0.25 0.25 0.25\n1 0.625 0.5 0.125 0.5\n")
    (root / "data.yaml").write_text(yaml)
    return root


def coco_as_yolo(source: Path, target: Path, number="{:.6f}") -> Path:
    """A COCO-format folder written as YOLO; number: how shares are written."""
    for split in ("train", "val"):
        document = json.loads((source / "annotations" / f"instances_{split}.json").read_text())
        classes = sorted((category["id"], category["name"]) for category in document["categories"])
        label = {identity: place for place, (identity, _) in enumerate(classes)}
        for kind in ("images", "labels"):
            (target / kind / split).mkdir(parents=True)
        sizes, rows = {}, {}
        for image in document["images"]:
            shutil.copy(source / split / image["file_name"], target / "images" / split)
            sizes[image["id"]], rows[image["id"]] = (image["width"], image["height"]), []
        for entry in document["annotations"]:
            (width, height), (x, y, w, h) = sizes[entry["image_id"]], entry["bbox"]
            shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            if not entry.get("iscrowd"):
                row = [str(label[entry["category_id"]]), *map(number.format, shares)]
                rows[entry["image_id"]].append(" ".join(row))
        for image in document["images"]:
            text = "\n".join(rows[image["id"]])
            (target / "labels" / split / f"{Path(image['file_name']).stem}.txt").write_text(text)
    names = "".join(f"  {place}: {name}\n" for place, (_, name) in enumerate(classes))
    (target / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}")
    return target
