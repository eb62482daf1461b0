"""COCO-format data sets: annotation file and image folder in, samples out."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from dndetr.data.annotations import find_problems, find_split, missing_files, read_document
from dndetr.data.errors import DataError
from dndetr.data.image import read_image
from dndetr.data.sample import Sample
from dndetr.data.transforms import Transform

Classes = list[tuple[int, str]]


class CocoDataset:
    """One split of a COCO-format folder.

    classes: (category id, name) in label order; by default those of the split itself, sorted by id. Give the validation
    split the training split's: a category that training does not know is an error. Crowd regions are left out, boxes
    are clipped to their image, and those without area are dropped.

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
        for problem in find_problems(document):
            raise DataError(f"{self.split.json}: {problem.message}")
        own = sorted((category["id"], category["name"]) for category in document["categories"])
        self.classes = own if classes is None else _agreed(own, classes, self.split.json)
        self.ids = [image["id"] for image in document["images"]]
        self.sizes = [(image["height"], image["width"]) for image in document["images"]]
        self._files = [image["file_name"] for image in document["images"]]
        if missing := missing_files(self.split, self._files):
            raise DataError(
                f"{self.split.json}: {len(missing)} of {len(self)} image files are missing, the first is "
                f"{self.split.images / missing[0]}; put them there or remove them from the annotations"
            )
        self._boxes, self._labels = self._objects(document["annotations"])
        self._decoded: dict[int, Image.Image] = {}
        # Pillow stores four bytes for a pixel of RGB.
        self._decoded_bytes = sum(4 * height * width for height, width in self.sizes)

    @property
    def canvas(self) -> tuple[int, int] | None:
        """(height, width) of every sample, where the transform fixes one."""
        return self.transform.canvas

    @property
    def counts(self) -> list[int]:
        """Number of objects of each image, before augmentation."""
        return [len(labels) for labels in self._labels]

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """Image ``index`` as epoch ``epoch`` sees it."""
        rng = np.random.default_rng((self.seed, epoch, index))
        size = self.sizes[index]
        view = self.transform.view(size, rng)
        image = self.transform.tensor(view.picture(self.picture(index, view.shrink)), rng)
        boxes_xyxy, kept = view.boxes(self._boxes[index])
        labels = torch.from_numpy(self._labels[index][kept])
        return Sample(image, torch.from_numpy(boxes_xyxy), labels, self.ids[index], size)

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
        path = self.split.images / self._files[index]
        image = read_image(path, self.sizes[index], 1.0 if cached else shrink)
        if cached:
            self._decoded[index] = image
        return image

    def coco_dict(self) -> dict:
        """Ground truth for evaluation: the split's JSON, with the area and iscrowd that an annotation may lack."""
        document = read_document(self.split.json)
        for entry in document["annotations"]:
            entry.setdefault("iscrowd", 0)
            entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
        return document

    def _objects(self, annotations: list[dict]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Boxes [n, 4] float64 xyxy pixels and labels [n] int64 of every image."""
        label_of = {number: label for label, (number, _) in enumerate(self.classes)}
        position = {number: index for index, number in enumerate(self.ids)}
        boxes, labels = ([[] for _ in self.ids] for _ in range(2))
        for entry in annotations:
            if not entry.get("iscrowd"):
                index = position[entry["image_id"]]
                boxes[index].append(entry["bbox"])
                labels[index].append(label_of[entry["category_id"]])
        clipped = []
        for index, (height, width) in enumerate(self.sizes):
            xyxy = np.array(boxes[index], np.float64).reshape(-1, 4)
            xyxy[:, 2:] += xyxy[:, :2]
            xyxy = xyxy.clip(0, (width, height, width, height))
            kept = (xyxy[:, 2:] > xyxy[:, :2]).all(axis=1)
            clipped.append(xyxy[kept])
            labels[index] = np.array(labels[index], np.int64)[kept]
        return clipped, labels


def _agreed(own: Classes, classes: Classes, path: Path) -> Classes:
    """The given classes, if a split's own are among them."""
    names = dict(classes)
    for number, name in own:
        if number not in names:
            raise DataError(f"{path}: category {number} ({name!r}) is not among the classes of training; add it there")
        if names[number] != name:
            raise DataError(
                f"{path}: category {number} is {name!r} here and {names[number]!r} in training; "
                "give both files the same categories"
            )
    return list(classes)
