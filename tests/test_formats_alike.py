"""The same pictures and boxes in every format: the same losses and the same evaluation, to the digit."""

import json
from pathlib import Path

import numpy as np
import pytest
from broken_sets import FLAGS
from PIL import Image

from dndetr import evaluate, train

NAMES = ("ant", "bee", "cat")
_TIMES = ("seconds", "images_per_second", "data_wait")


def pictures(rng, count):
    """Name, pixels and objects (label, x, y, width, height in whole pixels) of images of odd sizes."""
    for i in range(count):
        height, width = rng.integers(40, 90, 2)
        objects = []
        for _ in range(rng.integers(0, 5) if i else 3):
            w, h = rng.integers(3, (width // 2, height // 2))
            x, y = rng.integers(0, (width - w + 1, height - h + 1))
            objects.append((int(rng.integers(len(NAMES))), *map(int, (x, y, w, h))))
        yield f"{i + 1}.{'jpg' if i % 2 else 'png'}", rng.integers(0, 256, (height, width, 3), dtype=np.uint8), objects


def write_coco(root: Path, split: str, images):
    document = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3 * i + 1, "name": n} for i, n in enumerate(NAMES)],
    }
    for number, (name, pixels, objects) in enumerate(images):
        save(root / split / name, pixels)
        height, width = pixels.shape[:2]
        document["images"].append({"id": number + 1, "file_name": name, "height": height, "width": width})
        for label, *box in objects:
            entry = {"id": len(document["annotations"]) + 1, "image_id": number + 1, "category_id": 3 * label + 1}
            document["annotations"].append(entry | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


def write_yolo(root: Path, split: str, images):
    for name, pixels, objects in images:
        save(root / "images" / split / name, pixels)
        height, width = pixels.shape[:2]
        rows = [
            f"{label} {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f} {w / width:.6f} {h / height:.6f}\n"
            for label, x, y, w, h in objects
        ]
        path = root / "labels" / split / f"{Path(name).stem}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(rows))
    names = "".join(f"- {name}\n" for name in NAMES)
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames:\n{names}")


def write_voc(root: Path, split: str, images):
    stems = []
    for name, pixels, objects in images:
        stem = f"{split}_{Path(name).stem}"
        stems.append(stem)
        save(root / "JPEGImages" / f"{stem}{Path(name).suffix}", pixels)
        height, width = pixels.shape[:2]
        found = "".join(
            f"<object><name>{NAMES[label]}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
            f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for label, x, y, w, h in objects
        )
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{found}</annotation>")
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems))


def save(path: Path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.mark.usefixtures("no_pictures")
def test_formats_train_and_evaluate_alike(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    told = {}
    for writer in (write_coco, write_yolo, write_voc):
        folder = tmp_path / writer.__name__
        for split, count in (("train", 12), ("val", 5)):
            writer(folder, split, list(pictures(np.random.default_rng(len(split)), count)))
        run = train.run([*FLAGS, "--max-steps-per-epoch", "4", "--log-every", "1", "--data", str(folder)])
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert {row["event"] for row in rows} == {"train", "eval", "end"}
        told[writer.__name__] = [{key: row[key] for key in row if key not in _TIMES} for row in rows]
        assert evaluate.main([str(run), "--output", str(tmp_path / f"evaluation_{writer.__name__}")]) == 0
        told[writer.__name__].append(json.loads((tmp_path / f"evaluation_{writer.__name__}/metrics.json").read_text()))
    first, *others = told.values()
    assert all(np.isfinite(row["loss"]) for row in first if row.get("event") == "train") and others == [first] * 2
    out = capsys.readouterr().out
    assert all(f"{name}: {about}" in out for name, about in (("write_coco", "COCO, "), ("write_yolo", "YOLO, ")))
    assert "write_voc: Pascal VOC, " in out
