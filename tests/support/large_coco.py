"""COCO documents as large as one likes, written piece by piece, without their image files."""

from pathlib import Path

import numpy as np

_PIECE = 100_000


def write_large(root: Path, images: int, objects: int, classes: int = 365, split: str = "train") -> Path:
    """A COCO-format folder with boxes spread over its images in no order, one in a hundred a crowd -> the JSON file."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    (root / split).mkdir()
    ids = np.sort(rng.choice(3 * images, images, replace=False))
    sizes = rng.integers(300, 1400, (images, 2))
    file = root / "annotations" / f"instances_{split}.json"
    with open(file, "w") as out:
        rows = zip(ids.tolist(), sizes.tolist(), strict=True)
        out.write('{"info": {"description": "large"}, "images": [')
        out.write(
            ", ".join(f'{{"height": {h}, "id": {i}, "width": {w}, "file_name": "{i}.jpg"}}' for i, (h, w) in rows)
        )
        out.write('], "annotations": [')
        for first in range(0, objects, _PIECE):
            out.write(
                ", " * (first > 0) + ", ".join(_rows(rng, first, min(_PIECE, objects - first), ids, sizes, classes))
            )
        names = ", ".join(f'{{"id": {number}, "name": "class {number}"}}' for number in range(1, classes + 1))
        out.write(f'], "categories": [{names}]}}')
    return file


def _rows(rng, first: int, count: int, ids: np.ndarray, sizes: np.ndarray, classes: int) -> list[str]:
    which = rng.integers(0, len(ids), count)
    sides = sizes[which, ::-1]
    spans = rng.random((count, 2)) * sides / 2
    boxes = np.concatenate((rng.random((count, 2)) * (sides - spans), spans), axis=1).round(3).tolist()
    rows = zip(boxes, ids[which].tolist(), rng.integers(1, classes + 1, count).tolist(), strict=True)
    crowds = (rng.random(count) < 0.01).astype(int).tolist()
    return [
        f'{{"id": {first + place + 1}, "iscrowd": {crowd}, "isfake": 0, "area": {box[2] * box[3]:.4f}, '
        f'"bbox": {box}, "image_id": {image}, "category_id": {category}}}'
        for place, ((box, image, category), crowd) in enumerate(zip(rows, crowds, strict=True))
    ]
