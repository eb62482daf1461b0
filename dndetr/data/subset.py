"""A few images of a data set, over and over."""

from .errors import DataError
from .loader import Dataset
from .sample import Sample

# Objects whose shorter side is a smaller share of the image's have few pixels on small canvases, and learning them by
# heart takes much longer than all others.
_TINY = 1 / 30


class Subset:
    """The first ``count`` images that have objects, ``repeats`` times, as epoch 0 sees them, as a data set.

    Images with tiny objects are taken only where there are too few others.
    """

    def __init__(self, dataset: Dataset, count: int, repeats: int = 1):
        smallest = _smallest_objects(dataset.coco_dict())
        usable = [index for index, share in enumerate(smallest) if share is not None and dataset.counts[index]]
        if len(usable) < count:
            raise DataError(f"--overfit {count}: only {len(usable)} training images have objects; give that many")
        chosen = sorted(sorted(usable, key=lambda index: smallest[index] < _TINY)[:count])
        self._dataset, self._chosen = dataset, chosen
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

    def coco_dict(self) -> dict:
        """Ground truth of the chosen images."""
        document = self._dataset.coco_dict()
        images = [document["images"][index] for index in self._chosen]
        kept = {image["id"] for image in images}
        annotations = [entry for entry in document["annotations"] if entry["image_id"] in kept]
        return document | {"images": images, "annotations": annotations}


def _smallest_objects(document: dict) -> list[float | None]:
    """For each image the smallest share of its height or width that one of its objects spans; None without objects."""
    shares: dict[int, list[float]] = {image["id"]: [] for image in document["images"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in document["images"]}
    for entry in document["annotations"]:
        if not entry.get("iscrowd"):
            spans = zip(entry["bbox"][2:], sizes[entry["image_id"]], strict=True)
            shares[entry["image_id"]].append(min(span / side for span, side in spans))
    return [min(found, default=None) for found in shares.values()]
