"""A detector as a folder that transformers reads, and what is kept there of what it has no place for."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import Config, from_dict, to_dict
from ..data.classes import Classes, distinct_names
from ..files import write_atomic, write_json_atomic
from ..hf.detector_model import detector_model
from ..hf.written_config import to_processor, to_transformers
from ..models.build import build_model
from ..models.weights.head_sharing import fit_heads
from ..models.weights.transformers_detectors import Weights, of_denoising_alone, to_detector
from ..scoring.coco import Detections, postprocess
from .paths import given_away
from .safetensors_file import read_safetensors, safetensors_bytes, tensor_bytes

BESIDE = "dndetr.safetensors"
_CHANGED = "its weights were changed since dndetr exported them, and are used as they are now"


def write_detector(folder: Path, weights: Weights, config: Config, classes: Classes) -> dict:
    """Write a detector's files into a folder -> the content of config.json.

    ValueError for what transformers has no counterpart of, before anything is written.
    """
    theirs = to_transformers(config, classes)
    tensors, kept = to_detector(weights, config.model)
    content = tensor_bytes(tensors, {"format": "pt"})
    settings = to_dict(given_away(config))
    beside = {"model": kept, "ema": None, "config": settings, "classes": classes, "exported": _digest(content)}
    write_atomic(folder / "model.safetensors", content)
    write_atomic(folder / BESIDE, safetensors_bytes(beside))
    write_json_atomic(folder / "config.json", theirs, indent=2)
    write_json_atomic(folder / "preprocessor_config.json", to_processor(config, theirs["model_type"]), indent=2)
    return theirs


def restored(folder: Path, model: Weights, config: Config, classes: Classes) -> dict:
    """What a folder has by transformers' files, in the form of a checkpoint, with what dndetr had kept beside.

    Weights that are those that were exported come back to the bit, with the run's own settings; others win over what
    was kept, and that is among the "notes". ValueError where the files are of different models.
    """
    beside = read_safetensors(folder / BESIDE)
    if "exported" not in beside:
        raise ValueError(f"its {BESIDE} is not what dndetr writes: remove it to read the rest alone")
    kept, exported = beside["model"], from_dict(beside["config"])
    exported_classes = [(number, name) for number, name in beside["classes"]]
    weights = folder / "model.safetensors"
    if weights.exists() and _digest(weights.read_bytes()) == beside["exported"]:
        with torch.device("meta"):
            own = build_model(exported.model, len(exported_classes)).state_dict()
        found = fit_heads(model | kept, own)
        if any(name not in found or found[name].shape != value.shape for name, value in own.items()):
            raise ValueError(f"{BESIDE} and config.json are of different models: export anew")
        return _content({name: found[name] for name in own}, exported, exported_classes, [], [])
    if [name for _, name in classes] == distinct_names(exported_classes):
        classes = exported_classes
    config = replace(exported, model=config.model, images=config.images)
    blank = of_denoising_alone(model)
    if all(name in kept and kept[name].shape == model[name].shape for name in blank):
        model = model | {name: kept[name] for name in blank}
        table = "queries.label_enc.weight"
        if config.model.variant == "dn-detr":  # what matching queries start from is in the patterns
            model[table] = torch.cat((kept[table][:-1], model[table].new_zeros(1, model[table].shape[1])))
        blank = []
    return _content(model, config, classes, blank, [_CHANGED])


def _content(model: Weights, config: Config, classes: Classes, blank: list[str], notes: list[str]) -> dict:
    return {"model": model, "config": to_dict(config), "classes": classes, "blank": blank, "notes": notes}


def in_transformers(folder: Path, most: int) -> Callable[[Tensor, Tensor], Detections]:
    """What transformers makes of a folder: (images [B, 3, H, W], sizes [B, 2]) -> its ``most`` detections an image."""
    model, _ = detector_model(folder, "--to transformers")

    @torch.no_grad()
    def detect(images: Tensor, sizes: Tensor) -> Detections:
        rows, columns = (torch.arange(side) for side in images.shape[-2:])
        mask = (rows[:, None] < sizes[:, :1, None]) & (columns < sizes[:, 1:, None])
        found = model(pixel_values=images, pixel_mask=mask.long())
        return postprocess(found.logits, found.pred_boxes, torch.ones_like(sizes), most)

    return detect


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
