"""The data of a run as its configuration names it: built-in shapes or a COCO-format folder."""

from collections import Counter
from collections.abc import Iterator

from ..batch import Batch
from ..config import Config
from .coco import CocoDataset
from .loader import build_loader
from .shapes import ShapesDataset
from .transforms import FixedEvaluation, FixedTraining, OfficialEvaluation, OfficialTraining, Unresized

# What an image costs in evaluation is small beside training, so its batches may be larger on small canvases.
_EVAL_PIXELS = 50 * 128 * 128


class TrainingData:
    """Training and validation batches, the classes, and the ground truth to score against.

    Raises DataError for whatever is wrong with the folder, before anything is written.
    """

    def __init__(self, config: Config):
        images = config.images
        if config.data == "shapes":
            train = ShapesDataset("train", config.train_images, seed=config.seed)
            val = ShapesDataset("val", config.val_images)
        else:
            train_view, eval_view = _transforms(config)
            cache = images.cache_mib << 20
            train = CocoDataset(config.data, "train", train_view, seed=config.seed, cache_bytes=cache)
            val = CocoDataset(config.data, "val", eval_view, classes=train.classes, cache_bytes=cache)
        self.classes = train.classes
        self.ground_truth = val.coco_dict()
        options = {"seed": config.seed, "workers": config.workers, "multiple": images.multiple}
        self._train = build_loader(train, config.batch_size, training=True, **options)
        eval_batch = config.batch_size
        if val.canvas is not None:
            eval_batch = max(eval_batch, _EVAL_PIXELS // (val.canvas[0] * val.canvas[1]))
        self._val = build_loader(val, eval_batch, training=False, **options)
        self.images = {"train": len(train), "val": len(val)}
        self.class_counts = {"val": _counts(self.ground_truth, self.classes)}
        if config.data != "shapes":
            self.class_counts = {"train": _counts(train.coco_dict(), self.classes)} | self.class_counts

    @property
    def steps_per_epoch(self) -> int:
        """Whole training batches in an epoch."""
        return len(self._train)

    def training(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The training batches of an epoch, from number ``first`` on."""
        return self._train.epoch(epoch, first)

    def validation(self) -> Iterator[Batch]:
        """All validation images, in the same order every time."""
        return self._val.epoch()


def _transforms(config: Config):
    images = config.images
    if images.recipe == "fixed":
        evaluation = FixedEvaluation(images.canvas)
        vflip = 0.5 if images.vertical_flip else 0.0
        return FixedTraining(images.canvas, vflip=vflip) if images.augment else evaluation, evaluation
    if images.recipe == "original":
        return Unresized(hflip=0.5 if images.augment else 0.0), Unresized()
    evaluation = OfficialEvaluation(images.eval_size, images.max_size)
    return OfficialTraining(images.sizes, images.max_size) if images.augment else evaluation, evaluation


def _counts(ground_truth: dict, classes: list[tuple[int, str]]) -> list[int]:
    found = Counter(entry["category_id"] for entry in ground_truth["annotations"] if not entry.get("iscrowd"))
    return [found[category_id] for category_id, _ in classes]
