"""COCO-format data sets: annotation file and image folder in, samples out."""

import copy
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from .annotations import (
    Classes,
    class_problems,
    classes_of,
    find_problems,
    find_split,
    raise_problems,
    read_document,
)
from .errors import DataError
from .file_names import missing_files
from .image import read_image
from .sample import Sample
from .transforms import Transform, View
from .units import unit_doubt


class CocoDataset:
    """One split of a COCO-format folder.

    classes: (category id, name) in label order; by default those of the split itself, sorted by id. Give the validation
    split the training split's: a category that training does not know is an error. Crowd regions are left out, boxes
    are clipped to their image, and those without area are dropped; ``remarks`` counts these.

    Randomness of ``transform`` depends on (seed, epoch, index) alone. Decoded pictures are kept in memory where the
    whole split fits into ``cache_bytes``, once for each loader worker.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: Transform,
        classes: Classes | None = None,
        seed: int = 0,
        cache_bytes: int = 1 << 30,
    ):
        self.split = find_split(root, split)
        self.transform, self.seed, self.cache_bytes = transform, seed, cache_bytes
        document = read_document(self.split.json)
        raise_problems([*find_problems(document)], self.split)
        own = classes_of(document)
        self.classes = own if classes is None else list(classes)
        raise_problems([*class_problems(own, self.classes)], self.split)
        self.images = document["images"]
        raise_problems(missing_files(self.split, self.images), self.split)
        self.ids = [image["id"] for image in self.images]
        self.sizes = [(image["height"], image["width"]) for image in self.images]
        self._boxes, self._labels = self._objects(document["annotations"])
        self._decoded: dict[int, Image.Image] = {}
        # Pillow stores four bytes for a pixel of RGB.
        self._decoded_bytes = sum(4 * height * width for height, width in self.sizes)

    @property
    def canvas(self) -> tuple[int, int] | None:
        """(height, width) of every sample, where the transform fixes one."""
        return self.transform.canvas

    def leave_out(self, indices: Iterable[int]) -> None:
        """Go on without some images, in the ground truth too; the others move up."""
        gone = set(indices)
        kept = [index for index in range(len(self)) if index not in gone]
        for name in ("images", "ids", "sizes", "_boxes", "_labels"):
            setattr(self, name, [getattr(self, name)[index] for index in kept])
        self._decoded.clear()

    @property
    def class_counts(self) -> list[int]:
        """Number of objects of each class."""
        return np.bincount(np.concatenate(self._labels), minlength=len(self.classes)).tolist()

    def labels(self, index: int) -> list[int]:
        """Labels of the objects of an image, before augmentation."""
        return self._labels[index].tolist()

    @property
    def counts(self) -> list[int]:
        """Number of objects of each image, before augmentation."""
        return [len(labels) for labels in self._labels]

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """Image ``index`` as epoch ``epoch`` sees it."""
        view, rng = self._view(index, epoch)
        pixels = view.picture(self.picture(index, view.shrink))
        colours = self.transform.colours(pixels, rng)
        boxes_xyxy, kept = view.boxes(self._boxes[index])
        labels = torch.from_numpy(self._labels[index][kept])
        return Sample(pixels, colours, torch.from_numpy(boxes_xyxy), labels, self.ids[index], self.sizes[index])

    def extent(self, index: int, epoch: int = 0) -> tuple[int, int, int]:
        """Height, width and number of objects of ``sample(index, epoch)``, without reading its file."""
        view, _ = self._view(index, epoch)
        return *view.size, int(view.boxes(self._boxes[index])[1].sum())

    def with_transform(self, transform: Transform, seed: int) -> "CocoDataset":
        """The same split seen in another way."""
        other = copy.copy(self)
        other.transform, other.seed = transform, seed
        return other

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.sample(index)

    def picture(self, index: int, shrink: float = 1.0) -> Image.Image:
        """The upright RGB original; ``shrink`` as in ``read_image``."""
        if index in self._decoded:
            return self._decoded[index]
        worker = get_worker_info()
        cached = self._decoded_bytes * (worker.num_workers if worker else 1) <= self.cache_bytes
        path = self.split.images / self.images[index]["file_name"]
        try:
            image = read_image(path, self.sizes[index], 1.0 if cached else shrink)
        except DataError as error:
            raise type(error)(f"image {self.ids[index]}: {error}") from error
        if cached:
            self._decoded[index] = image
        return image

    def coco_dict(self) -> dict:
        """Ground truth for evaluation: the split's JSON, with the area and iscrowd that an annotation may lack."""
        document = read_document(self.split.json)
        if len(document["images"]) > len(self):
            kept = set(self.ids)
            document["images"] = self.images
            document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] in kept]
        for entry in document["annotations"]:
            if entry.get("iscrowd") is None:
                entry["iscrowd"] = 0
            if entry.get("area") is None:
                entry["area"] = entry["bbox"][2] * entry["bbox"][3]
        return document

    def _view(self, index: int, epoch: int) -> tuple[View, np.random.Generator]:
        """The geometry of a sample, and where the rest of its randomness comes from."""
        rng = np.random.default_rng((self.seed, epoch, index))
        return self.transform.view(self.sizes[index], rng), rng

    def _objects(self, annotations: list[dict]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Boxes [n, 4] float64 xyxy pixels and labels [n] int64 of every image."""
        label_of = {number: label for label, (number, _) in enumerate(self.classes)}
        position = {number: index for index, number in enumerate(self.ids)}
        single = [entry for entry in annotations if not entry.get("iscrowd")]
        image = np.array([position[entry["image_id"]] for entry in single], np.int64)
        label = np.array([label_of[entry["category_id"]] for entry in single], np.int64)
        given = np.array([entry["bbox"] for entry in single], np.float64).reshape(-1, 4)

        sizes = np.array(self.sizes, np.float64)[image]
        corners = np.concatenate((given[:, :2], given[:, :2] + given[:, 2:]), axis=1)
        clipped = corners.clip(0, sizes[:, [1, 0, 1, 0]])
        kept = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
        flat = (given[:, 2:] == 0).any(axis=1)
        # Annotation tools round to a pixel; less is not worth a word.
        moved = (np.abs(clipped - corners) > 1).any(axis=1)
        order = np.flatnonzero(kept)[np.argsort(image[kept], kind="stable")]
        counts = np.bincount(image[kept], minlength=len(self))
        ends = counts.cumsum()[:-1]
        self.remarks = [
            f"{count:,} {noun if count == 1 else plural} {what}"
            for count, noun, plural, what in (
                (len(annotations) - len(single), "crowd region", "crowd regions", "left out of training"),
                (flat.sum(), "box", "boxes", "without area left out"),
                ((~kept & ~flat).sum(), "box", "boxes", "outside the image left out"),
                ((kept & moved).sum(), "box", "boxes", "clipped to the image"),
                ((counts == 0).sum(), "image", "images", "without objects"),
            )
            if count
        ]
        if doubt := unit_doubt(given, sizes):
            self.remarks.append(doubt)
        return np.split(clipped[order], ends), np.split(label[order], ends)
