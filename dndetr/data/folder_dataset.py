"""Data sets on the disk: a split's records and its image files in, samples out."""

import copy
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from .classes import Classes
from .columns import Column
from .errors import DataError
from .file_names import missing_files
from .image import read_image
from .records import Records, class_problems, raise_problems
from .sample import Sample
from .summary import clip, corners_of
from .transforms import Transform, View

NOT_FEDERATED = (
    "--loss.federated: no image has neg_category_ids or not_exhaustive_category_ids, so all are annotated in full: "
    "leave it out"
)


class FolderDataset:
    """One split of a data set on the disk.

    classes: (category id, name) in label order; by default those of the split itself. Give the validation split the
    training split's: a category that training does not know is an error. Crowd regions are left out, boxes are clipped
    to their image, and those without area are dropped; ``remarks`` counts these.

    Randomness of ``transform`` depends on (seed, epoch, index, occurrence) alone, the last where an epoch shows an
    image several times. Decoded pictures are kept in memory where the whole split fits into ``cache_bytes``, once for
    each loader worker. federated: samples say which classes were not verified in their image. Raises DataError for what
    is wrong with the records, and for files that are missing.
    """

    def __init__(
        self,
        records: Records,
        transform: Transform,
        classes: Classes | None = None,
        seed: int = 0,
        cache_bytes: int = 1 << 30,
        federated: bool = False,
    ):
        raise_problems(records.problems, records)
        if federated and records.verified is None:
            raise DataError(f"{records.file}: {NOT_FEDERATED}")
        self._federated = federated
        self.transform, self.seed, self.cache_bytes = transform, seed, cache_bytes
        self.classes = list(records.classes if classes is None else classes)
        raise_problems([*class_problems(records.classes, self.classes)], records)
        raise_problems(missing_files(records), records)
        self._decoded: dict[int, Image.Image] = {}
        self._take(records)
        self.remarks = [*records.remarks, *records.summary.remarks]

    @property
    def canvas(self) -> tuple[int, int] | None:
        """(height, width) of every sample, where the transform fixes one."""
        return self.transform.canvas

    def leave_out(self, indices: Iterable[int]) -> None:
        """Go on without some images, in the ground truth too; the others move up."""
        kept = np.ones(len(self), bool)
        kept[[*indices]] = False
        self._take(self.records.take(np.flatnonzero(kept)))
        self._decoded.clear()

    @property
    def class_counts(self) -> list[int]:
        """Number of objects of each class."""
        found = np.zeros(len(self.classes), np.int64)
        found[self._label_of] = self.records.summary.classes
        return found.tolist()

    def labels(self, index: int) -> list[int]:
        """Labels of the objects of an image, before augmentation."""
        return self._objects(index)[1].tolist()

    @property
    def counts(self) -> Column:
        """Number of objects of each image, before augmentation."""
        return Column(self.records.summary.counts)

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self, index: int, epoch: int = 0, occurrence: int = 0) -> Sample:
        """Image ``index`` as epoch ``epoch`` sees it, the first time or a later one."""
        view, rng = self._view(index, epoch, occurrence)
        pixels = view.picture(self.picture(index, view.shrink))
        colours = self.transform.colours(pixels, rng)
        boxes_xyxy, labels = self._objects(index)
        boxes_xyxy, kept = view.boxes(boxes_xyxy)
        objects = torch.from_numpy(boxes_xyxy), torch.from_numpy(labels[kept])
        unverified = self._unverified(index) if self._federated else None
        return Sample(pixels, colours, *objects, self.ids[index], self.sizes[index], unverified)

    def extent(self, index: int, epoch: int = 0, occurrence: int = 0) -> tuple[int, int, int]:
        """Height, width and number of objects of that sample, without reading its file."""
        view, _ = self._view(index, epoch, occurrence)
        return *view.size, int(view.boxes(self._objects(index)[0])[1].sum())

    def with_transform(self, transform: Transform, seed: int) -> "FolderDataset":
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
        try:
            image = read_image(self.records.path(index), self.sizes[index], 1.0 if cached else shrink)
        except DataError as error:
            raise type(error)(f"{self.records.called(index)}{error}") from error
        if cached:
            self._decoded[index] = image
        return image

    def _view(self, index: int, epoch: int, occurrence: int) -> tuple[View, np.random.Generator]:
        """The geometry of a sample, and where the rest of its randomness comes from."""
        later = (occurrence,) if occurrence else ()
        rng = np.random.default_rng((self.seed, epoch, index, *later))
        return self.transform.view(self.sizes[index], rng), rng

    def _unverified(self, index: int) -> torch.Tensor:
        """Which classes are no negatives in an image [K] bool; an object that training leaves out was annotated too."""
        annotated = self.records.objects.label[self._of(index)]
        own = self.records.verified.unverified(index, annotated, len(self.records.classes))
        found = torch.ones(len(self.classes), dtype=torch.bool)
        found[self._label_of] = torch.from_numpy(own)
        return found

    def _objects(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [n, 4] xyxy pixels, clipped to their image, and labels [n] int64 of the objects that training uses."""
        objects, own = self.records.objects, self._of(index)
        boxes_xyxy, used = clip(corners_of(objects.boxes[own]), self.records.sizes[index], objects.crowd[own])
        return boxes_xyxy[used], self._label_of[objects.label[own][used]]

    def _of(self, index: int) -> slice:
        """Where the objects of an image are."""
        first, last = self.records.summary.starts[index : index + 2].tolist()
        return slice(first, last)

    def _take(self, records: Records) -> None:
        """Have these images and their objects."""
        self.records = records
        self.ids, self.sizes = Column(records.ids), Column(records.sizes)
        # Pillow stores four bytes for a pixel of RGB.
        self._decoded_bytes = 4 * int(records.sizes.prod(axis=1).sum())
        place = {number: label for label, (number, _) in enumerate(self.classes)}
        self._label_of = np.array([place[number] for number, _ in records.classes], np.int64)
