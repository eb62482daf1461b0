"""A data set as LVIS is published: addresses for names, images of a split in two folders, federated annotations."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("apple", "bead", "cup", "dish", "egg")  # ids 2, 4, 6, 8, 10
SIZE = (48, 64)


def write_lvis(root: Path, images: int = 12) -> Path:
    """Of every four training images one is of val2017. Class 10 (egg) is in the first image alone, 2 (apple) in all.

    Of each image the class after its last one is verified to be absent, and apples are not exhaustive in every third.
    The last image of a split is background of which nothing is stated.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", images), ("val", 4)):
        entries, annotations = [], []
        for place in range(count):
            number, height, width = 1000 * len(split) + place, *SIZE
            folder = "val2017" if place % 4 == 3 or split == "val" else "train2017"
            name = f"{number:012}.jpg"
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(root / folder / name)
            image = {"id": number, "coco_url": f"http://images.cocodataset.org/{folder}/{name}"}
            image |= {"height": height, "width": width, "license": 1, "flickr_url": "http://none/1.jpg"}
            entries.append(image)
            if place == count - 1:
                continue
            present = [2, 4 + 2 * (place % 3), *([10] if place == 0 else [])]
            image["neg_category_ids"] = [present[-1] % 10 + 2] if place else []
            image["not_exhaustive_category_ids"] = [2] if place % 3 == 0 else []
            for category in present:
                x, y = rng.uniform(0, 30, 2).round(2).tolist()
                entry = {"id": len(annotations) + 1, "image_id": number, "category_id": category}
                annotations.append(entry | {"bbox": [x, y, 20.5, 14.25], "area": 100.5, "segmentation": [[1, 2, 3, 4]]})
        categories = [
            {"id": 2 * label + 2, "name": name, "synset": f"{name}.n.01", "frequency": "f"}
            for label, name in enumerate(CLASSES)
        ]
        document = {"info": {}, "images": entries, "annotations": annotations, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"lvis_v1_{split}.json").write_text(json.dumps(document))
    return root


def change(root: Path, edit, split: str = "train") -> None:
    """Edits the annotations of a split: ``edit(document)``."""
    path = root / "annotations" / f"lvis_v1_{split}.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
