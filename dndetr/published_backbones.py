"""Backbones of transformers as they are published: short names, folders, the hub, configurations, colours."""

import json
import math
import re
from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import Config
from .hub import NAME, fetched
from .model_config import BackboneConfig
from .transformers_installed import require_transformers

FEATURE = "--model.backbone.kind transformers"
HUB_IDS = {
    "swin-tiny": "microsoft/swin-tiny-patch4-window7-224",
    "swin-small": "microsoft/swin-small-patch4-window7-224",
    "swin-base": "microsoft/swin-base-patch4-window7-224-in22k",
    "swin-large": "microsoft/swin-large-patch4-window12-384-in22k",
    "swinv2-tiny": "microsoft/swinv2-tiny-patch4-window8-256",
    "convnext-tiny": "facebook/convnext-tiny-224",
    "convnext-small": "facebook/convnext-small-224",
    "convnext-base": "facebook/convnext-base-224-22k",
    "convnextv2-tiny": "facebook/convnextv2-tiny-22k-224",
    "convnextv2-base": "facebook/convnextv2-base-22k-224",
    "dinov2-small": "facebook/dinov2-small",
    "dinov2-base": "facebook/dinov2-base",
    "dinov2-large": "facebook/dinov2-large",
    "dinov2-with-registers-small": "facebook/dinov2-with-registers-small",
    "dinov2-with-registers-base": "facebook/dinov2-with-registers-base",
    "dinov3-vits16": "facebook/dinov3-vits16-pretrain-lvd1689m",
    "dinov3-vitb16": "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "dinov3-vitl16": "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "dinov3-convnext-tiny": "facebook/dinov3-convnext-tiny-pretrain-lvd1689m",
    "dinov3-convnext-small": "facebook/dinov3-convnext-small-pretrain-lvd1689m",
    "dinov3-convnext-base": "facebook/dinov3-convnext-base-pretrain-lvd1689m",
    "focalnet-tiny": "microsoft/focalnet-tiny",
    "hgnetv2": "ustc-community/hgnet-v2",
    "pvt-v2-b0": "OpenGVLab/pvt_v2_b0",
    "resnet-18": "microsoft/resnet-18",
    "resnet-50": "microsoft/resnet-50",
    "resnet-101": "microsoft/resnet-101",
}
_UNSUITED = {"uvdoc": "straightens pages of text, and cannot be cut after a stage"}
# Settings of our ResNet that say nothing of another network.
_OF_RESNET = ("depth", "blocks", "planes", "bottleneck", "stem", "dilation")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# What a configuration says beside the network that it describes.
_BESIDE = ("architectures", "_name_or_path", "id2label", "label2id", "num_labels", "dtype", "torch_dtype")
_BESIDE += ("out_features", "out_indices", "problem_type", "output_hidden_states", "output_attentions", "return_dict")


def with_published_backbone(config: Config, given: Set[str]) -> tuple[Config, Path | None, list[str]]:
    """The configuration with its backbone's own in it, the folder that has the weights, and lines to show.

    given: names of the settings that were not left to their defaults. No folder for our ResNet, for a backbone without
    a name, and for that of a preset where ``--init`` brings its weights. Raises ValueError, FileNotFoundError, OSError
    or ImportError, in one line, for whatever is wrong.
    """
    backbone = config.model.backbone
    if backbone.kind == "resnet":
        return config, None, []
    other = [name for name in _OF_RESNET if getattr(backbone, name) != getattr(BackboneConfig, name)]
    if of_resnet := [f"--model.backbone.{name}" for name in other if f"model.backbone.{name}" in given]:
        flags = ", ".join(of_resnet)
        raise ValueError(f"{flags}: these describe our ResNet; leave them out with {FEATURE}")
    require_transformers(FEATURE)
    described = bool(backbone.settings) and "model.backbone.name" not in given  # a preset's
    if not backbone.name or (described and config.init is not None):  # a file has the backbone's weights, too
        return config, None, []
    folder = published_folder(backbone.name)
    model = replace(config.model, backbone=replace(backbone, settings=published_settings(folder)))
    config = replace(config, model=model)
    colours, images = published_colours(folder), config.images
    if colours is None or colours == (images.mean, images.std):
        return config, folder, []
    mean, std = (" ".join(f"{value:g}" for value in values) for values in colours)
    line = f"{backbone.name} was trained with --images.mean {mean} --images.std {std}"
    if given & {"images.mean", "images.std"}:
        return config, folder, [f"{line}, and this run has those that are given"]
    images = replace(images, mean=colours[0], std=colours[1])
    return replace(config, images=images), folder, [f"{line}, and so is this run"]


def published_folder(name: str) -> Path:
    """The folder that a name means: itself, or what the hub has under it, which is fetched unless it is there."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"{name} has no config.json: give a folder that save_pretrained of transformers wrote"
            )
        return path
    hub_id = HUB_IDS.get(name, name)
    if not re.fullmatch(NAME, hub_id) or path.exists():
        known = ", ".join(HUB_IDS)
        raise ValueError(
            f"--model.backbone.name {name}: give one of {known}; or any hub id, such as {HUB_IDS['swin-tiny']}; or a "
            "folder with config.json and weights"
        )
    return fetched(hub_id)


def published_settings(folder: Path) -> str:
    """The configuration of the backbone in a folder, every value of it, as JSON with sorted keys."""
    config = as_backbone_config(_read_json(folder / "config.json"), str(folder / "config.json"))
    values = {name: value for name, value in config.to_dict().items() if name not in _BESIDE}
    return json.dumps(values, sort_keys=True)


def as_backbone_config(values: Any, where: str):
    """transformers' object for these values; ValueError, which begins with ``where``, if they describe no backbone."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind is None:
        raise ValueError(f"{where} names no model_type: give the configuration of a model of transformers")
    if kind in ("timm_backbone", "timm_wrapper"):
        alike = "swin-tiny, convnextv2-tiny or resnet-50"
        raise ValueError(f"{where}: this backbone is timm's ({kind}); take one of transformers' own, such as {alike}")
    if kind in _UNSUITED:
        raise ValueError(f"{where}: {kind} {_UNSUITED[kind]}; take another, such as swin-tiny")
    if kind not in MODEL_FOR_BACKBONE_MAPPING_NAMES:
        what = "a detector; take its backbone alone" if "backbone_config" in values else "no backbone"
        raise ValueError(f"{where}: {kind} is {what}, such as one of {', '.join(HUB_IDS)}")
    try:
        return CONFIG_MAPPING[kind].from_dict(values)
    except Exception as error:  # each configuration checks its values by itself
        raise ValueError(f"{where}: no {kind} is like this: {_first_line(error)}") from error


def published_colours(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of RGB in [0, 1] that a folder's preprocessor takes off; None where it has none."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    values = _read_json(path)
    if not isinstance(values, dict) or not values.get("do_normalize", True):
        return None
    found = tuple(values.get(name) for name in ("image_mean", "image_std"))
    if found == (None, None):
        return None
    for name, colours in zip(("image_mean", "image_std"), found, strict=True):
        sound = isinstance(colours, list) and len(colours) == 3 and all(isinstance(x, int | float) for x in colours)
        if not sound or not all(map(math.isfinite, colours)) or (name == "image_std" and min(colours) <= 0):
            raise ValueError(
                f"{path}: {name} is {colours!r}, not three numbers: mend it, or give --images.mean and --images.std"
            )
    return tuple(map(float, found[0])), tuple(map(float, found[1]))


def demand_weights(folder: Path) -> None:
    """FileNotFoundError unless a folder has weights, every file of them."""
    there = [name for name in _WEIGHTS if (folder / name).is_file()]
    if not there:
        raise FileNotFoundError(
            f"{folder} has a config.json but no weights: put model.safetensors beside it (a backbone that starts from "
            "random numbers would learn little)"
        )
    if not there[0].endswith(".index.json"):
        return
    index = _read_json(folder / there[0])
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict):
        raise ValueError(f"{folder / there[0]} names no files (weight_map): copy it again")
    missing = sorted({str(file) for file in named.values() if not (folder / str(file)).is_file()})
    if missing:
        raise FileNotFoundError(f"{folder / there[0]} names {', '.join(missing)}, which is not there: copy it too")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # no UTF-8, or no JSON
        raise ValueError(f"{path} is no JSON ({error}): copy it again") from None


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
