"""Safetensors files: tensors alone, or, as our runs write them, with what says which detector they are of."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .. import __version__

_KEY = "dndetr"  # alone in the header: of several, the library changes the order from file to file
_ABOUT = ("config", "classes", "step", "epoch", "metrics")


def is_safetensors(path: Path) -> bool:
    """By its content: the length of a JSON header, and that header."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8


def safetensors_bytes(checkpoint: dict) -> bytes:
    """A file with the weights of a checkpoint that are evaluated: the moving average where it has one.

    Their configuration, classes and scores are in its header, in JSON.
    """
    weights = checkpoint["model"] if checkpoint["ema"] is None else checkpoint["ema"]
    about = {"version": __version__} | {name: checkpoint[name] for name in _ABOUT if name in checkpoint}
    # The format has no strides, and no memory that two tensors share.
    copies = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    return save(copies, {_KEY: json.dumps(about)})


def read_safetensors(path: Path) -> dict:
    """Tensors by name or, of a file of ours, the checkpoint that it was made of; ValueError where it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text = (file.metadata() or {}).get(_KEY)
    except SafetensorError as error:
        raise ValueError(f"{path} is a damaged safetensors file ({error}): copy it again") from error
    if text is None:
        return weights
    about = _about(text)
    if about is None:
        raise ValueError(
            f"{path}: its header should have under {_KEY!r}, as JSON, the configuration and classes of its weights: it "
            "was changed since a run wrote it; use the run's best.pt"
        )
    return {"model": weights, "ema": None} | about


def _about(text: str) -> dict | None:
    """What a header says beside the weights; None where that is not what ``safetensors_bytes`` writes."""
    try:
        about = json.loads(text)
        known = {name: about[name] for name in _ABOUT if name in about}
        classes_sound = all(isinstance(number, int) and isinstance(name, str) for number, name in known["classes"])
    except (ValueError, TypeError, KeyError):
        return None
    return known if classes_sound and isinstance(known.get("config"), dict) else None
