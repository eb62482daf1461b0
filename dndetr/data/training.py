"""The data of a run as its configuration names it: built-in shapes or a data set on the disk."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from ..batch import Batch
from ..config import Config
from .batch_shapes import BatchShape, BatchShapes, choose_shapes, dearest_slots, largest_canvas
from .errors import DataError
from .folder_dataset import FolderDataset
from .loader import build_loader
from .records import NOTHING_TO_LEARN, Records, Source
from .repeat_factors import Repeated, Repeats, repeat_factors
from .review.image_files import check_files
from .sample import normalisation
from .shapes import MIN_SIZE, ShapesDataset
from .source import open_source
from .subset import Subset
from .transforms import FixedEvaluation, FixedTraining, OfficialEvaluation, OfficialTraining, Transform, Unresized

# What an image costs in evaluation is small beside training, so its batches may be larger on small canvases.
_EVAL_PIXELS = 50 * 128 * 128
_FEW_IMAGES = 1000
_OVERFIT_STEPS = 50  # of an epoch


class TrainingData:
    """Training and validation batches, the classes, and the ground truth to score against, ``val_records``.

    Of ``world`` processes, ``neighbours`` of them on this machine, the one of this ``rank`` reads its share of both.
    ``about`` is the line that says what was recognised on the disk, if it lies there; ``warnings`` are sentences to
    show once. Raises DataError for whatever is wrong with the folder, ValueError where its workers lack shared memory,
    before anything is written.
    """

    def __init__(self, config: Config, rank: int = 0, world: int = 1, neighbours: int = 1):
        images = config.images
        if config.data == "shapes":
            colours = normalisation(images)
            length = max(config.train_images, config.overfit or 0)
            train = ShapesDataset("train", length, seed=config.seed, colours=colours)
            val = train if config.overfit else ShapesDataset("val", config.val_images, colours=colours)
            self.warnings = shapes_or_folder(config.data)
            self.about = []
        else:
            source = source_of(config)
            self.about = [f"{config.data_name}: {source.about}"]
            train_view, eval_view = training_transform(config), evaluation_transform(config)
            cache = images.cache_mib << 20
            records = source.read("train")
            train = FolderDataset(
                records, train_view, seed=config.seed, cache_bytes=cache, federated=config.loss.federated
            )
            records = records if config.overfit else source.read("val")
            val = FolderDataset(records, eval_view, classes=train.classes, cache_bytes=cache)
            found = [*check_files(train, images.skip_unreadable), *check_files(val, images.skip_unreadable)]
            self.warnings = list(dict.fromkeys(found))  # with --overfit both are of the same split
            self.about += _of_federated(train.records, config)
        if config.overfit:
            repeats = -(-_OVERFIT_STEPS * config.batch_size * config.accumulate * world // config.overfit)
            train, val = Subset(train, config.overfit, repeats), Subset(val, config.overfit)
        self.warnings += _from_scratch(config, len(train))
        if not any(train.counts):
            raise DataError(f"{config.data}: {NOTHING_TO_LEARN}")
        if not any(val.counts):
            self.warnings.append(f"{config.data}: the val split has no objects, so there will be no AP and no best.pt")
        repeats = None
        if config.repeat_threshold is not None:
            repeats = Repeats(repeat_factors(train.records, config.repeat_threshold), config.seed)
            train = Repeated(train)
            self.about.append(f"--repeat-threshold {config.repeat_threshold:g}: {repeats}")
        self._config, self._train_images = config, train
        self.classes, self.val_records = train.classes, val.records
        options = {"seed": config.seed, "workers": config.workers, "multiple": images.multiple}
        share = {"rank": rank, "world": world, "neighbours": neighbours}
        exact = config.denoising.slots == "batch"
        self._train = build_loader(
            train,
            config.batch_size,
            training=True,
            held=config.accumulate,
            exact=exact,
            repeats=repeats,
            **options,
            **share,
        )
        self._val = build_loader(val, evaluation_batch(config, val.canvas), training=False, **options, **share)
        self.images = {"train": config.overfit or len(train), "val": len(val)}
        if config.overfit or config.data == "shapes":
            self.class_counts = {"val": _counts(self.val_records)}
        else:
            self.class_counts = {"train": train.class_counts, "val": val.class_counts}

    @cached_property
    def ground_truth(self) -> dict:
        """The validation images in COCO's format; made when it is first asked for."""
        return self.val_records.coco_dict()

    @property
    def steps_per_epoch(self) -> int:
        """Whole training batches in an epoch."""
        return len(self._train)

    def choose_shapes(self, steps: int) -> BatchShapes | None:
        """Give the training batches few shapes, for CUDA graphs, in a run of so many steps -> those that were chosen.

        To be called before the first epoch. None, and nothing changes, where images have one canvas anyway, where a
        step is of several batches, whose shapes would all have to be the same, and where groups have no slots to spare.
        """
        config = self._config
        if self._train_images.canvas is not None or config.accumulate > 1 or config.denoising.slots == "batch":
            return None
        shapes = choose_shapes(self._train_images, self._config, steps)
        self._train.take(shapes)
        return shapes

    def largest_shape(self) -> BatchShape:
        """A canvas that holds every training image, and the slots that cost the most."""
        images, config = self._train_images, self._config
        canvas = largest_canvas(images, config) if images.canvas is None else images.canvas
        return BatchShape(*canvas, dearest_slots(max(images.counts), config.denoising))

    def training(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The training batches of an epoch, from number ``first`` on."""
        return self._train.epoch(epoch, first)

    def validation(self) -> Iterator[Batch]:
        """This process's validation images, in the same order every time."""
        return self._val.epoch()


def _of_federated(records: Records, config: Config) -> list[str]:
    """What becomes of federated annotations, in a line, where the training images have such."""
    if records.verified is None:
        return []
    count = f"{records.verified.stated.sum():,} of {len(records):,} training images say which classes were looked for"
    if config.loss.federated:
        return [f"{config.data_name}: {count}, others are no negatives there"]
    return [f"{config.data_name}: {count}; with --loss.federated others would be no negatives there"]


def source_of(config: Config) -> Source:
    """The data set on the disk that a configuration names, divided as it says."""
    return open_source(config.data, config.val_share, config.split_file)


def shapes_or_folder(data: str) -> list[str]:
    """A warning where ``shapes`` means the built-in data, though the working directory has a folder of that name."""
    if data != "shapes" or not Path(data).is_dir():
        return []
    return ["--data shapes: these are the built-in shapes, not the folder of that name; for it give --data ./shapes"]


def evaluation_batch(config: Config, canvas: tuple[int, int] | None) -> int:
    """Images at once in evaluation; canvas (height, width) where all images have one size."""
    if canvas is None:
        return config.batch_size
    return max(config.batch_size, _EVAL_PIXELS // (canvas[0] * canvas[1]))


def evaluation_transform(config: Config) -> Transform:
    """How a run's evaluation prepares images."""
    if config.data == "shapes":
        return FixedEvaluation((MIN_SIZE, MIN_SIZE), mean=config.images.mean, std=config.images.std)
    return _transforms(config)[1]


def training_transform(config: Config) -> Transform:
    """How a run's training prepares the images of a data set on the disk."""
    return _transforms(config)[0]


def _from_scratch(config: Config, images: int) -> list[str]:
    """A warning where a detector is to start from random weights and is unlikely to get anywhere."""
    if config.init is not None or config.resume is not None or config.model.backbone.name:
        return []
    reasons = []
    if config.model.backbone.norm == "frozen":
        reasons.append("a frozen norm does not normalise random weights")
    if config.data != "shapes" and config.overfit is None and images < _FEW_IMAGES:
        reasons.append(f"{images:,} images are few to learn from")
    if not reasons:
        return []
    advice = "give pretrained weights, --init FILE (a torchvision ResNet or a DN-DETR checkpoint)"
    if config.model.backbone.norm == "frozen":
        advice += ", or else --model.backbone.norm batch --model.backbone.frozen 0"
    return [f"training from scratch: {' and '.join(reasons)}; {advice}"]


def _transforms(config: Config) -> tuple[Transform, Transform]:
    images = config.images
    colours = {"mean": images.mean, "std": images.std}
    if images.recipe == "fixed":
        evaluation = FixedEvaluation(images.canvas, **colours)
        vflip = 0.5 if images.vertical_flip else 0.0
        return FixedTraining(images.canvas, vflip=vflip, **colours) if images.augment else evaluation, evaluation
    if images.recipe == "original":
        return Unresized(hflip=0.5 if images.augment else 0.0, **colours), Unresized(**colours)
    evaluation = OfficialEvaluation(images.eval_size, images.max_size, **colours)
    return OfficialTraining(images.sizes, images.max_size, **colours) if images.augment else evaluation, evaluation


def _counts(records: Records) -> list[int]:
    """Objects of each class."""
    objects = records.objects
    return np.bincount(objects.label[~objects.crowd], minlength=len(records.classes)).tolist()
