"""Folders, files and hub names of transformers' detectors, read as if they were checkpoints of ours.

Nothing of transformers is needed for it.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

from ..config import Config, to_dict
from ..hf.detector_config import DETECTORS, from_transformers
from ..models.weights.transformers_detectors import Weights, from_detector, heads_differ, of_denoising_alone
from .weight_files import read_weights

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INSTEAD = {
    "conditional_detr": "dndetr.denoise(model) trains it in transformers with denoising",
    "rt_detr": "dndetr.accelerate(model) makes it faster in transformers",
    "rt_detr_v2": "dndetr.accelerate(model) makes it faster in transformers",
    "d_fine": "dndetr.accelerate(model) makes it faster in transformers",
}


def described_by_transformers(path: Path) -> bool:
    """Whether a folder, or the one of a file, has a config.json of transformers, which names its kind of model."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.is_file() or (path.is_dir() and (path / "checkpoint.pt").exists()):
        return False
    try:
        return "model_type" in json.loads(config.read_text())
    except (ValueError, TypeError):
        return path.is_dir() or path.name in _WEIGHTS  # broken, and said to be when it is read


def read_detector(path: Path) -> dict:
    """The content of a transformers detector in the form of our checkpoints.

    path: its folder, or a file with its weights beside config.json. The dict has the tensors under our names ("model"),
    our settings ("config"), a row's number and name for every class ("classes") and which tensors are blank, since only
    noised queries have a use for them ("blank"). ValueError or FileNotFoundError, in one line, for other models and for
    files that do not belong together.
    """
    folder = path if path.is_dir() else path.parent
    theirs = _json(folder / "config.json")
    _demand_detector(theirs, folder)
    processor = _json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").exists() else {}
    state = _state(folder) if path.is_dir() else read_weights(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dict of tensors by name")
    try:
        config, classes = from_transformers(theirs, processor)
        if config.model.shared_heads and heads_differ(state):
            config = replace(config, model=replace(config.model, shared_heads=False))
        _demand_rows(state, len(classes))
        model = from_detector(state, config.model, len(classes))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return _as_checkpoint(model, config, classes)


def _as_checkpoint(model: Weights, config: Config, classes) -> dict:
    return {"model": model, "config": to_dict(config), "classes": classes, "blank": of_denoising_alone(model)}


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object of settings")
    return content


def _demand_detector(theirs: dict, folder: Path) -> None:
    kind = theirs.get("model_type")
    if kind in DETECTORS:
        return
    what = f"{folder} holds a model of the kind {kind}"
    if kind is None:
        what = f"{folder}/config.json does not say what kind of model it is of (it has no model_type)"
    instead = _INSTEAD.get(kind, "give one of those")
    raise ValueError(f"{what}, and of transformers {' and '.join(DETECTORS)} are read: {instead}")


def _state(folder: Path) -> Weights:
    """All tensors of a folder, whatever files they are divided into."""
    for name in _WEIGHTS:
        if (folder / name).exists():
            return read_weights(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            return _shards(index)
    raise FileNotFoundError(f"{folder} has config.json, but no weights: {' or '.join(_WEIGHTS)}")


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
