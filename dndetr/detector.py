"""A trained detector to use: ``dndetr.load(RUN).predict(images)``."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .config import Config, from_dict
from .context import own_context
from .data.classes import Classes, distinct_names, listed
from .data.loader import build_loader
from .data.training import evaluation_batch, evaluation_transform
from .data.user_images import ImageLike, UserImages, is_image
from .device import pick_device, pick_precision
from .models.build import build_model
from .models.dn_detr import DNDETR
from .models.weights.official import COCO_CLASSES
from .models.weights.pretrained import initialise
from .models.weights.unwrap import unwrap
from .presets import PRESETS, preset_named
from .runs.checkpoint import load_checkpoint
from .scoring.coco import postprocess


class Prediction(NamedTuple):
    """What was found in one image, best first; on the CPU.

    boxes_xyxy [k, 4] float32 in pixels of the original image; scores [k] in [0, 1]; labels [k] int64 in [0, K); names,
    k class names.
    """

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor
    names: list[str]


class Detector:
    """A model with the settings and the classes of its run.

    classes: (category id, name) in label order; config: the run's; device, precision: as in the train command, or
    torch's own objects. What is found does not depend on torch's settings where it is asked (autocast, default dtype
    and device, inference mode).
    """

    @own_context()
    def __init__(
        self,
        model: DNDETR,
        config: Config,
        classes: Classes,
        device: str | torch.device = "auto",
        precision: str | torch.dtype = "auto",
    ):
        self.config = config
        self.classes = [(int(number), str(name)) for number, name in classes]
        self.device = pick_device(device)
        self.precision = pick_precision(precision, self.device)
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()

    @property
    def names(self) -> list[str]:
        """Class names in label order, each its own: with the category id, "person (id 3)", where they repeat."""
        return distinct_names(self.classes)

    @property
    def named_classes(self) -> list[dict]:
        """Category id and name (as in ``names``) of each class, in label order, for JSON."""
        return [{"id": number, "name": name} for (number, _), name in zip(self.classes, self.names, strict=True)]

    @own_context()
    def predict(
        self, images: ImageLike | Iterable[ImageLike], threshold: float = 0.5, batch_size: int | None = None
    ) -> list[Prediction]:
        """Detections with a score of at least ``threshold`` in one image or several -> one Prediction an image.

        Images are prepared, batched (unless ``batch_size`` is given) and scored as in the run's own evaluation. Files,
        by their path or open, are turned upright as their EXIF data say, and read when their batch comes. DataError
        names a file that cannot be read; ValueError for pixels that are none.
        """
        if math.isnan(threshold):
            raise ValueError("a threshold of NaN: give a number")
        images = [images] if images is None or is_image(images) else list(images)
        if not images:
            return []
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"a batch size of {batch_size}: give 1 or more")
        data = UserImages(images, evaluation_transform(self.config))
        batch_size = batch_size or evaluation_batch(self.config, data.canvas)
        loader = build_loader(data, batch_size, training=False, multiple=self.config.images.multiple)
        found: dict[int, Prediction] = {}
        class_names = self.names
        for batch in loader.epoch():
            logits, boxes = self.infer(batch)
            if not (logits.isfinite().all() and boxes.isfinite().all()):
                raise ValueError("the model predicts NaN or infinite scores or boxes; it has diverged")
            detections = postprocess(logits, boxes, batch.original_sizes.to(boxes.device), self.config.detections)
            rows = zip(*(field.cpu() for field in detections), strict=True)
            for index, (scores, labels, boxes_xyxy) in zip(batch.ids.tolist(), rows, strict=True):
                kept = scores >= threshold
                names = [class_names[label] for label in labels[kept].tolist()]
                found[index] = Prediction(boxes_xyxy[kept], scores[kept], labels[kept], names)
        return [found[index] for index in range(len(images))]

    @own_context()
    def infer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The last decoder layer's logits [B, N, K] and boxes [B, N, 4] for a batch, float32, on the device."""
        predictions = self.model.infer(batch, self.precision)
        return predictions.logits[-1], predictions.boxes[-1]


@own_context()
def load(
    path: str | Path, device: str | torch.device = "auto", *, preset: str | None = None, classes: Classes | None = None
) -> Detector:
    """The detector in a run folder (its latest checkpoint) or a checkpoint file; its moving average where it has one.

    preset, classes: for weights that come without configuration and classes, such as official files, which have COCO's
    classes unless others are given. ValueError where anything would have to be guessed.
    """
    chosen = None if preset is None else preset_named(preset)
    checkpoint = load_checkpoint(path, needs=())
    if chosen is not None:
        config, classes = chosen, COCO_CLASSES if classes is None else classes
        model = _model_of_weights(checkpoint, path, config, classes)
    elif {"model", "config", "classes"} <= checkpoint.keys() and isinstance(checkpoint["config"], dict):
        try:
            config, classes = from_dict(checkpoint["config"]), checkpoint["classes"]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        model = build_model(config.model, len(classes))
        try:
            model.load_state_dict(unwrap(checkpoint, path).weights)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1].strip()[:200]
            raise ValueError(f"{path}: its weights are not those of its configuration: {first}") from error
    else:
        raise ValueError(
            f"{path} holds no configuration and classes; for weights alone, such as an official DN-DETR file, name "
            f"the model: --preset with one of {', '.join(PRESETS)}"
        )
    return Detector(model, config, classes, device, config.precision)


def _model_of_weights(checkpoint: dict, path: str | Path, config: Config, classes: Classes) -> DNDETR:
    """The preset's model with the weights of a file that has nothing else."""
    preset = config.preset
    if {"config", "classes"} <= checkpoint.keys():
        raise ValueError(f"--preset {preset}: {path} has its own configuration; leave out --preset")
    model = build_model(config.model, len(classes))
    report = initialise(model, checkpoint, path, classes)
    if report.other is not None:
        raise ValueError(
            f"{path} is of another detector, {report.other}, of which only the backbone can be used: train one that "
            "starts from it with python -m dndetr.train --init FILE"
        )
    if report.remade:
        advice = "name another --preset"
        if report.hints:
            advice = f"{'; '.join(report.hints)}: a preset has no such flags, python -m dndetr.train --init FILE has"
        raise ValueError(
            f"{path} is not a whole {preset}: {len(report.remade)} tensors are missing or of another shape, such as "
            f"{listed(report.remade, 2)}; {advice}"
        )
    if report.absent or not report.found:
        raise ValueError(f"{path} has no classes {listed(report.absent) or 'that are known by id or name'}")
    return model
