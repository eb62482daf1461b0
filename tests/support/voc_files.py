"""Pascal VOC folders written for tests, as the format's own description has it and not by any code of the package."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Objects = Iterable[tuple[str, Sequence[float]]]
"""Classes and corners xmin, ymin, xmax, ymax, counted from 1."""

DOG, CAT = ("dog", (11, 6, 30, 15)), ("cat", (1, 1, 64, 48))
SPLITS = {"train": {"b": [DOG, CAT], "a": [DOG]}, "val": {"c": [CAT]}}

_TAGS = ("xmin", "ymin", "xmax", "ymax")


def object_xml(name: str, corners: Sequence[float], more: str = "") -> str:
    """An object as the development kit writes it; more: further elements."""
    sides = "".join(f"\t\t\t<{tag}>{value:g}</{tag}>\n" for tag, value in zip(_TAGS, corners, strict=True))
    box = f"\t\t<bndbox>\n{sides}\t\t</bndbox>\n"
    return f"\t<object>\n\t\t<name>{name}</name>\n\t\t<pose>Left</pose>\n{more}{box}\t</object>\n"


def annotation_xml(file_name: str, size: tuple[int, int], objects: str = "") -> str:
    """The annotations of an image of a (height, width); objects: those of it, as ``object_xml`` makes them."""
    sides = f"\t\t<width>{size[1]}</width>\n\t\t<height>{size[0]}</height>\n\t\t<depth>3</depth>\n"
    head = f"\t<folder>VOC2012</folder>\n\t<filename>{file_name}</filename>\n\t<size>\n{sides}\t</size>\n"
    return f"<annotation>\n{head}\t<segmented>0</segmented>\n{objects}</annotation>\n"


def write_voc(home: Path, splits: Mapping[str, Mapping[str, Objects]], size=(48, 64), lists="ImageSets/Main") -> Path:
    """Writes a data set of named images, with noise for those that are not there yet; lists: "" for no split files."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations", lists):
        (home / folder).mkdir(parents=True, exist_ok=True)
    for split, images in splits.items():
        for stem, objects in images.items():
            if not (home / "JPEGImages" / f"{stem}.jpg").exists():
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(home / "JPEGImages" / f"{stem}.jpg")
            text = annotation_xml(f"{stem}.jpg", size, "".join(object_xml(*each) for each in objects))
            (home / "Annotations" / f"{stem}.xml").write_text(text)
        if lists:
            (home / lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in images))
    return home


def put(home: Path, stem: str, objects: str, size=(48, 64), file_name: str | None = None) -> None:
    """Writes other annotations for an image."""
    (home / "Annotations" / f"{stem}.xml").write_text(annotation_xml(file_name or f"{stem}.jpg", size, objects))


def put_list(home: Path, name: str, content: str | bytes, folder="ImageSets/Main") -> None:
    """Writes a list of images."""
    (home / folder).mkdir(parents=True, exist_ok=True)
    (home / folder / f"{name}.txt").write_bytes(content.encode() if isinstance(content, str) else content)
