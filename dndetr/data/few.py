"""A few images of a data set, over and over."""

from dndetr.data.errors import DataError
from dndetr.data.loader import Dataset
from dndetr.data.sample import Sample


class FewImages:
    """The first ``count`` images that have objects, ``repeats`` times, as epoch 0 sees them, as a data set."""

    def __init__(self, dataset: Dataset, count: int, repeats: int = 1):
        chosen = [index for index, objects in enumerate(dataset.counts) if objects][:count]
        if len(chosen) < count:
            raise DataError(f"--overfit {count}: only {len(chosen)} training images have objects; give that many")
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

    def coco_dict(self) -> dict:
        """Ground truth of the chosen images."""
        document = self._dataset.coco_dict()
        images = [document["images"][index] for index in self._chosen]
        kept = {image["id"] for image in images}
        annotations = [entry for entry in document["annotations"] if entry["image_id"] in kept]
        return document | {"images": images, "annotations": annotations}
