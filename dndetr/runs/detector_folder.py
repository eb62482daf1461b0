"""Folders, files and hub names of transformers' detectors, read as if they were checkpoints of ours.

Nothing of transformers is needed for it.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..config import Config, from_dict, to_dict
from ..data.classes import listed
from ..hf.detector_config import from_transformers, without_counterpart
from ..hf.detector_model import detector_model
from ..hub import DETECTORS, WEIGHTS, fetched, is_hub_name
from ..models.weights.transformers_detectors import Weights, from_detector, heads_differ, of_denoising_alone
from ..presets import preset_named
from ..settings import flat
from .weight_files import read_weights
from .written_detector import BESIDE, restored

# What says how a model is made, computed or trained, not what it is.
_OF_NEW_MODELS = (
    *("model.anchors", "model.size_bias", "model.checkpointing", "model.one_to_many"),
    *("model.backbone.frozen", "model.backbone.name"),
)
_KNOWN = f"{' and '.join(DETECTORS)}, and ResNets,"
_INSTEAD = {
    "conditional_detr": "dndetr.denoise(model) trains it in transformers with denoising",
    "rt_detr": "dndetr.accelerate(model) makes it faster in transformers",
    "rt_detr_v2": "dndetr.accelerate(model) makes it faster in transformers",
    "d_fine": "dndetr.accelerate(model) makes it faster in transformers",
}


def read_of_transformers(path: str | Path) -> dict:
    """The content of a detector of transformers in the form of our checkpoints.

    path: its folder, a file with its weights beside config.json, or its name on the hub. The dict has the tensors under
    our names ("model"), our settings ("config"), a row's number and name for every class ("classes") and which tensors
    are blank, since only noised queries have a use for them ("blank"). Folders that dndetr wrote have what is theirs
    back. A ResNet's are its tensors alone. ValueError or OSError, in one line, for other models and for files that do
    not belong together.
    """
    name, path = path, fetched(str(path)) if is_hub_name(str(path)) else Path(path)
    folder = path if path.is_dir() else path.parent
    theirs = _json(folder / "config.json")
    kind = theirs.get("model_type")
    _demand_known(kind, name)
    processor = _json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").exists() else {}
    state = _state(folder) if path.is_dir() else read_weights(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dict of tensors by name")
    if other := next((key for key, value in state.items() if not isinstance(value, Tensor)), None):
        kind = type(state[other]).__name__
        raise ValueError(f"{path} has a {kind} under {other!r}, where transformers has tensors alone: give {folder}")
    try:
        if kind == "resnet":
            if theirs.get("layer_type", "bottleneck") == "bottleneck":
                without_counterpart(theirs, downsample_in_bottleneck=False)
            return state
        config, classes = from_transformers(theirs, processor)
        if config.model.backbone.kind == "transformers":  # whose names change with its versions
            _, state = detector_model(folder, f"the backbone of {name}")
        if config.model.shared_heads and heads_differ(state):
            config = replace(config, model=replace(config.model, shared_heads=False))
        _demand_rows(state, len(classes))
        model = from_detector(state, config.model, len(classes))
        if (folder / BESIDE).exists():
            return restored(folder, model, config, classes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return {"model": model, "config": to_dict(config), "classes": classes, "blank": of_denoising_alone(model)}


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object of settings")
    return content


def _demand_known(kind: str | None, name: str | Path) -> None:
    if kind in (*DETECTORS, "resnet"):
        return
    if kind is None:
        raise ValueError(f"{name}: its config.json has no model_type, so it is no model of transformers")
    instead = _INSTEAD.get(kind, "other backbones go with --model.backbone.kind transformers")
    raise ValueError(
        f"{name} is a model of the kind {kind}, and of transformers {_KNOWN} are read: {instead}; of its file alone, "
        "--init FOLDER/model.safetensors takes a ResNet that is in it"
    )


def _state(folder: Path) -> Weights:
    """All tensors of a folder, whatever files they are divided into."""
    for name in WEIGHTS:
        if (folder / name).exists():
            return read_weights(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            return _shards(index)
    raise FileNotFoundError(f"{folder} has config.json, but no weights: {' or '.join(WEIGHTS)}")


def _shards(index: Path) -> Weights:
    places = _json(index).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{index} has no weight_map, which names the file of every tensor: copy it again")
    state: Weights = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not (index.parent / name).exists():
            raise FileNotFoundError(f"{index} names {name}, which is not in its folder: copy all files of the model")
        state |= read_weights(index.parent / name)
    lacking = [name for name in places if name not in state]
    if lacking:
        raise ValueError(f"{index} names {lacking[0]}, which is not in {places[lacking[0]]}: copy all files again")
    return state


def _demand_rows(state: Weights, classes: int) -> None:
    """ValueError where the class heads have another number of rows than config.json has names."""
    for name, value in state.items():
        if re.fullmatch(r"(model\.decoder\.)?class_embed\.(\d+\.)?weight", name) and len(value) != classes:
            raise ValueError(
                f"id2label has {classes} classes, and {name} {len(value)} rows: they are of different models"
            )


def as_starting_point(path: str | Path) -> Config:
    """A detector's model and images, trained as its preset says: what a run without ``--preset`` begins from."""
    own = from_dict(read_of_transformers(path)["config"])
    backbone = replace(own.model.backbone, name="")  # whose weights are not to be fetched: they are in the file
    return replace(preset_named(own.preset), model=replace(own.model, backbone=backbone), images=own.images)


def compared(content: dict, config: Config) -> str:
    """Whether a run's model is that of the detector that it starts from, in words. content: the detector's."""
    theirs, ours = (flat({"model": of.model}) for of in (from_dict(content["config"]), config))
    names = [name for name in ours if name not in _OF_NEW_MODELS and ours[name] != theirs[name]]
    if not names:
        return f"the model is the file's, trained as --preset {config.preset} trains"
    others = [f"{name} {theirs[name]} there, {ours[name]} here" for name in names]
    return f"the model is not quite the file's ({listed(others, 4)}): without --preset, and these flags, it is"
