"""State dictionaries as others save them: inside other dictionaries, under the names of what was wrapped around."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .official_swin import SWIN_BLOCK
from .transformers_resnet import from_transformers_resnet

# Keys of dictionaries and first parts of names under which weights are found, the ones to use first: moving averages,
# then what is trained, with the names that published backbones have.
_PREFERRED = (
    *("ema", "ema_model", "model_ema", "ema_state_dict", "state_dict_ema", "teacher"),
    *("model", "state_dict", "model_state_dict", "module", "encoder_q", "base_encoder"),
)
# What torch adds where it wraps: DataParallel and averages, compile, sharding, checkpointing.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# The first convolution of a ResNet or a Swin or, in ResNets that are not ours, of a stem of several (timm, RT-DETR).
_STEM = re.compile(
    r"(?P<outer>(?:.*\.)?)"
    r"(?:conv1\.(?:0\.)?weight|embedder\.embedder\.0\.convolution\.weight|patch_embed\.proj\.weight)"
)
_BLOCKS = ("layer1.0.conv1.weight", SWIN_BLOCK)
_BACKBONE = re.compile(r"(^|\.)backbone\.(0\.(body\.)?)?$")


class Unwrapped(NamedTuple):
    """Tensors by the names that the model itself gave them; what was taken off to get there, and names left aside."""

    weights: dict[str, Tensor]
    removed: list[str]
    aside: list[str]


def unwrap(content: Mapping, path: str | Path) -> Unwrapped:
    """The weights in a file's content; path: its name in messages. ValueError where they could be several models'.

    A ResNet of transformers has torchvision's names here, ours.
    """
    state, removed = content, []
    while (key := _inner(state)) is not None:
        removed.append(str(key))
        state = state[key]
    named = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    wrongly = next((state[key] for key in _PREFERRED if state.get(key) is not None), None)
    if not named and wrongly is not None:
        raise ValueError(f"{path} has a {type(wrongly).__name__} where its weights should be, not a dict of tensors")
    weights: dict[str, Tensor] = {}
    plain = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in named}
    own = {"model", "config", "classes"} <= content.keys()  # a checkpoint of ours: its backbone has its own names
    ours = {name: name for name in plain.values()} if own else from_transformers_resnet(plain.values())
    for name, value in named.items():
        inner = ours[plain[name]]
        if inner in weights:
            raise ValueError(f"{path} has {inner} twice, once as {name}: save the weights of one model alone")
        weights[inner] = value
    if own:
        return Unwrapped(weights, [], [])
    removed += [part for part in _WRAPPERS if any(part in name.split(".") for name in named)]
    outer = _outer(weights, path)
    if outer:
        removed.append(outer.removesuffix("."))
    if removed in (["ema"], ["model"]):  # where our own checkpoints and official files have them
        removed = []
    inside = {name.removeprefix(outer): value for name, value in weights.items() if name.startswith(outer)}
    return Unwrapped(inside, removed, [name for name in weights if not name.startswith(outer)])


def _inner(state: Mapping) -> str | None:
    """The key under which the weights lie; None where they are here."""
    for key in _PREFERRED:
        if _holds_tensors(state.get(key)):
            return key
    if any(isinstance(value, Tensor) and value.ndim for value in state.values()):
        return None
    others = [key for key, value in state.items() if _holds_tensors(value, directly=True)]
    return others[0] if len(others) == 1 else None


def _holds_tensors(value, directly: bool = False) -> bool:
    if not isinstance(value, Mapping):
        return False
    return any(isinstance(v, Tensor) or (not directly and _holds_tensors(v)) for v in value.values())


def _outer(weights: dict[str, Tensor], path: str | Path) -> str:
    """What stands before the names of the one model with a ResNet or Swin, wherever that is in it; else empty."""
    stems = [match["outer"] for match in map(_STEM.fullmatch, weights) if match]
    found = {_BACKBONE.sub(r"\1", stem) for stem in stems if any(stem + block in weights for block in _BLOCKS)}
    if "" in found or not found:
        return ""
    for key in _PREFERRED:
        found = {outer for outer in found if key in outer.split(".")} or found
    if len(found) > 1:
        names = ", ".join(sorted(found))
        raise ValueError(f"{path} has the weights of several models, {names}: save those of the one to use alone")
    return found.pop()
