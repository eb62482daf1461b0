"""Data sets on the disk: a split's records and its image files in, samples out."""

import copy
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from .classes import Classes
from .errors import DataError
from .file_names import missing_files
from .image import read_image
from .records import Records, class_problems, pairs, raise_problems
from .sample import Sample
from .transforms import Transform, View
from .units import unit_doubt

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
        self.remarks = [*records.remarks, *self._take(records)]

    @property
    def canvas(self) -> tuple[int, int] | None:
        """(height, width) of every sample, where the transform fixes one."""
        return self.transform.canvas

    def leave_out(self, indices: Iterable[int]) -> None:
        """Go on without some images, in the ground truth too; the others move up."""
        gone = set(indices)
        self._take(self.records.take([index for index in range(len(self)) if index not in gone]))
        self._decoded.clear()

    @property
    def class_counts(self) -> list[int]:
        """Number of objects of each class."""
        return np.bincount(self._labels, minlength=len(self.classes)).tolist()

    def labels(self, index: int) -> list[int]:
        """Labels of the objects of an image, before augmentation."""
        return self._labels[self._of(index)].tolist()

    @property
    def counts(self) -> list[int]:
        """Number of objects of each image, before augmentation."""
        return np.diff(self._starts).tolist()

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self, index: int, epoch: int = 0, occurrence: int = 0) -> Sample:
        """Image ``index`` as epoch ``epoch`` sees it, the first time or a later one."""
        view, rng = self._view(index, epoch, occurrence)
        pixels = view.picture(self.picture(index, view.shrink))
        colours = self.transform.colours(pixels, rng)
        boxes_xyxy, kept = view.boxes(self._boxes[self._of(index)])
        labels = torch.from_numpy(self._labels[self._of(index)][kept])
        objects = torch.from_numpy(boxes_xyxy), labels
        unverified = self._unverified(index) if self._federated else None
        return Sample(pixels, colours, *objects, self.ids[index], self.sizes[index], unverified)

    def extent(self, index: int, epoch: int = 0, occurrence: int = 0) -> tuple[int, int, int]:
        """Height, width and number of objects of that sample, without reading its file."""
        view, _ = self._view(index, epoch, occurrence)
        return *view.size, int(view.boxes(self._boxes[self._of(index)])[1].sum())

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

    def coco_dict(self) -> dict:
        """Ground truth for evaluation: all objects as they were annotated, neither clipped nor left out."""
        return self.records.coco_dict()

    def _view(self, index: int, epoch: int, occurrence: int) -> tuple[View, np.random.Generator]:
        """The geometry of a sample, and where the rest of its randomness comes from."""
        later = (occurrence,) if occurrence else ()
        rng = np.random.default_rng((self.seed, epoch, index, *later))
        return self.transform.view(self.sizes[index], rng), rng

    def _unverified(self, index: int) -> torch.Tensor:
        """Which classes are no negatives in an image [K] bool; an object that training leaves out was annotated too."""
        first, last = np.searchsorted(self.records.objects.image, (index, index + 1))
        annotated = self.records.objects.label[first:last]
        own = self.records.verified.unverified(index, annotated, len(self.records.classes))
        found = torch.ones(len(self.classes), dtype=torch.bool)
        found[self._places] = torch.from_numpy(own)
        return found

    def _of(self, index: int) -> slice:
        """Where the objects of an image are."""
        return slice(self._starts[index], self._starts[index + 1])

    def _take(self, records: Records) -> list[str]:
        """Have these images, and those of their objects that training can use -> what is not used, in words."""
        self.records = records
        self.ids, self.sizes = records.ids.tolist(), pairs(records.sizes)
        # Pillow stores four bytes for a pixel of RGB.
        self._decoded_bytes = 4 * int(records.sizes.prod(axis=1).sum())
        corners, clipped, kept = records.clipped()
        image, label = records.objects.image[kept], records.objects.label[kept]
        self._boxes = clipped[kept]
        place = {number: label for label, (number, _) in enumerate(self.classes)}
        self._places = np.array([place[number] for number, _ in records.classes], np.int64)
        self._labels = self._places[label]
        self._starts = np.concatenate(([0], np.bincount(image, minlength=len(records)).cumsum()))
        # Annotation tools round to a pixel; less is not worth a word.
        moved = (np.abs(clipped - corners) > 1).any(axis=1)
        return self._unused(kept, moved)

    def _unused(self, kept: np.ndarray, moved: np.ndarray) -> list[str]:
        """What is not used, counted; kept, moved: which objects are trained on, and which are clipped."""
        objects = self.records.objects
        single = ~objects.crowd
        flat = single & (objects.boxes[:, 2:] == 0).any(axis=1)
        remarks = [
            f"{count:,} {noun if count == 1 else plural} {what}"
            for count, noun, plural, what in (
                (objects.crowd.sum(), "crowd region", "crowd regions", "left out of training"),
                (flat.sum(), "box", "boxes", "without area left out"),
                ((single & ~kept & ~flat).sum(), "box", "boxes", "outside the image left out"),
                ((kept & moved).sum(), "box", "boxes", "clipped to the image"),
                ((np.diff(self._starts) == 0).sum(), "image", "images", "without objects"),
            )
            if count
        ]
        doubt = unit_doubt(objects.boxes[single], self.records.sizes[objects.image[single]].astype(np.float64))
        return remarks if doubt is None else [*remarks, doubt]
