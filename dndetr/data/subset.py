"""A few images of a data set, over and over."""

import numpy as np

from .errors import DataError
from .loader import Dataset
from .records import Records
from .sample import Sample

# Objects whose shorter side is a smaller share of the image's have few pixels on small canvases, and learning them by
# heart takes much longer than all others.
_TINY = 1 / 30


class Subset:
    """The first ``count`` images that have objects, ``repeats`` times, as epoch 0 sees them, as a data set.

    Images with tiny objects are taken only where there are too few others.
    """

    def __init__(self, dataset: Dataset, count: int, repeats: int = 1):
        smallest = _smallest_objects(dataset.records)
        usable = [index for index, share in enumerate(smallest) if share < np.inf and dataset.counts[index]]
        if len(usable) < count:
            raise DataError(f"--overfit {count}: only {len(usable)} training images have objects; give that many")
        chosen = sorted(sorted(usable, key=lambda index: smallest[index] < _TINY)[:count])
        self._dataset, self.records = dataset, dataset.records.take(chosen)
        self._indices = chosen * repeats
        self.classes, self.canvas = dataset.classes, dataset.canvas
        self.sizes = [dataset.sizes[index] for index in self._indices]
        self.counts = [dataset.counts[index] for index in self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """Image ``index``, the same in every epoch."""
        return self._dataset.sample(self._indices[index])

    def extent(self, index: int, epoch: int = 0) -> tuple[int, int, int]:
        """Height, width and number of objects of ``sample(index)``."""
        return self._dataset.extent(self._indices[index])


def _smallest_objects(records: Records) -> list[float]:
    """For each image the smallest share of its height or width that one of its objects spans; inf without objects."""
    objects = records.objects.where(~records.objects.crowd)
    shares = (objects.boxes[:, [3, 2]] / records.sizes[objects.image]).min(axis=1)
    smallest = np.full(len(records), np.inf)
    np.minimum.at(smallest, objects.image, shares)
    return smallest.tolist()
