"""Whether a file's backbone is the model's, all of it; half of one would put norms where their convolutions are not."""

import re
from collections.abc import Set
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...model_config import BackboneConfig
from ..backbone import BLOCKS
from ..build import build_backbone
from .swin_kind import SwinKind, swin_kind

_PREFIX = "backbone."
_MADE_ANEW = ("backbone.pyramid.", "backbone.model.hidden_states_norms.")  # of maps, where a file has none
# What a file may not have more of than the model: ResNets, transformers' backbones with stages, and those without.
_PART = re.compile(
    r"(?:layer(\d)\.\d+|conv\d|bn\d)\..*"
    r"|model\.(?:\w+\.)*?(?:(?:layers|stages)\.(\d+)|layer\.\d+)\..*"
    r"|model\.(?:\w+\.)*position_embeddings"
)
Shapes = dict[str, torch.Size]


def demand_whole_backbone(
    own: dict[str, Tensor], weights: dict[str, Tensor], path: str | Path, idle: Set[str] = frozenset()
) -> None:
    """ValueError, with the flags that would fit, unless a file has all of the model's backbone, or nothing of one.

    own: the model's tensors; weights: the file's, under our names; path: its name in messages; idle: names of the
    model's that no map depends on, which may be missing. Stages after the model's last one, step counters of batch
    norms, and what is made of the maps may be there or not.
    """
    here, there = _shapes(own), _shapes(weights)
    needed = here.keys() - {name.removeprefix(_PREFIX) for name in idle}
    difference = _difference(here, there, needed) if there else None
    if difference is not None:
        raise ValueError(f"{path}: its backbone does not fit: {difference}; {_advice(here, there)}")


def _advice(here: Shapes, there: Shapes) -> str:
    """What the file's backbone seems to be, and what to type or give."""
    kind, swin = _kind(there), swin_kind(there)
    if any(name.startswith("model.") for name in here):
        return _advice_for_transformers(swin_kind(here), swin or (kind if kind.blocks else None))
    own_kind = _kind(here)
    if swin is not None:
        choice = f"--model.backbone.kind transformers {swin.flag}"
        what = f"it seems to be a {swin}, but the model's is a {own_kind}"
        return f"{what}: choose the file's with {choice}, or name a preset that has it"
    stages, needed = len(kind.blocks), len(own_kind.blocks)
    what = f"it seems to be a {kind}"
    if not stages:
        beginning = f"{_PREFIX}{next(iter(there))}"
        return f"it is no ResNet, or hardly the beginning of one (it has {beginning}): give another file"
    if (variant := _variant(there)) is not None:
        return (
            f"{what} with {variant}, which --model.backbone does not make: give a plain ResNet's file, such as "
            "torchvision's or timm's resnet50"
        )
    if stages < needed:
        return f"{what}, cut off before layer{stages + 1}, but the model has layer{needed}: give a whole file"
    if not _can_be_built(kind, there, needed):
        return f"{what}, not whole, or of a kind that --model.backbone does not make: give another file"
    flags = _flags(kind, own_kind)
    hint = "" if "depth" in flags else "--model.backbone.depth (or .stem, .blocks, .planes, .norm), here "
    return f"{what}: choose the file's with {hint}{flags}, or name a preset that has it"


def _advice_for_transformers(own: SwinKind | None, there: "SwinKind | _Kind | None") -> str:
    """The same for a model with a backbone of transformers, a Swin if it is ``own``; there: None if nothing known."""
    if own is not None and isinstance(there, SwinKind) and there.begins_like(own):
        return f"it seems to be a {there}, not whole or changed: give another file"
    what = "" if there is None else f"it seems to be a {there}, but "
    whose = "of transformers" if own is None else f"a {own}"
    text = f"{what}the model's is {whose}: give a checkpoint of a detector with one like it, "
    if isinstance(there, SwinKind):
        text += f"choose the file's with {there.flag}, "
    elif there is not None:
        text += "name a preset with a ResNet, "
    return f"{text}or leave out --init"


def _shapes(weights: dict[str, Tensor]) -> Shapes:
    return {
        name.removeprefix(_PREFIX): value.shape
        for name, value in weights.items()
        if name.startswith(_PREFIX) and not name.startswith(_MADE_ANEW) and not name.endswith("num_batches_tracked")
    }


def _difference(here: Shapes, there: Shapes, needed: Set[str]) -> str | None:
    """The first that keeps the file's backbone from being the model's, in words."""
    for name, shape in here.items():
        if name not in there and name in needed:
            return f"it has no {_PREFIX}{name}"
        if there.get(name, shape) != shape:
            return f"{_PREFIX}{name} is {shape_text(there[name])} there and {shape_text(shape)} here"
    last = max((stage for name in here if (stage := _stage(name)) is not None), default=0)
    for name in there.keys() - here.keys():
        stage = _stage(name)
        if stage is not None and stage <= last:
            return f"the model has no {_PREFIX}{name}"
    return None


def _stage(name: str) -> int | None:
    """The stage that a tensor is of, 0 before them and where there are none; None if it is of no such part."""
    match = _PART.fullmatch(name)
    return None if match is None else int(match[1] or match[2] or 0)


class _Kind(NamedTuple):
    """Which ResNet some tensors are of, as far as its whole stages go."""

    blocks: tuple[int, ...]
    planes: tuple[int, ...]
    bottleneck: bool
    stem: str
    norm: str

    @property
    def depth(self) -> int | None:
        """The published depth that begins like this, if any does."""
        if not self.blocks or self.planes != BackboneConfig.planes[: len(self.planes)]:
            return None
        begin = [depth for depth, blocks in BLOCKS.items() if blocks[: len(self.blocks)] == self.blocks]
        return next((depth for depth in begin if (depth >= 50) == self.bottleneck), None)

    def __str__(self) -> str:
        if self.depth is not None:
            return f"ResNet-{self.depth}"
        kind = "bottlenecks" if self.bottleneck else "basic blocks"
        return f"ResNet of {_spaced(self.blocks)} {kind}"


def _kind(shapes: Shapes) -> _Kind:
    blocks, planes = [], []
    while f"layer{len(blocks) + 1}.0.conv1.weight" in shapes:
        stage = len(blocks) + 1
        planes.append(shapes[f"layer{stage}.0.conv1.weight"][0])
        blocks.append(next(n for n in count() if f"layer{stage}.{n}.conv1.weight" not in shapes))
    return _Kind(
        blocks=tuple(blocks),
        planes=tuple(planes),
        bottleneck="layer1.0.conv3.weight" in shapes,
        stem="small" if "conv2.weight" in shapes else "imagenet",
        norm="frozen" if "bn1.running_mean" in shapes else "group",
    )


def _variant(shapes: Shapes) -> str | None:
    """What is special about a ResNet of a kind that is published but is not ours; None where nothing is."""
    if any(name.startswith(("conv1.0.", "embedder.embedder.0.")) for name in shapes):
        return "a stem of several convolutions (ResNet-C, ResNet-D, those of RT-DETR)"
    if any(".se." in name for name in shapes):
        return "weights for its channels (SE-ResNet, ECA-ResNet)"
    if len(shapes.get("layer2.0.downsample.1.weight", ())) == 4:
        return "pooling in its shortcuts (ResNet-D)"
    first, second, third = (shapes.get(f"layer1.0.conv{number}.weight") for number in (1, 2, 3))
    if second is not None and second[1] != first[0]:
        return "grouped convolutions (ResNeXt)"
    if third is not None and third[0] != 4 * first[0]:
        return "wide bottlenecks (Wide ResNet)"
    return None


def _can_be_built(kind: _Kind, shapes: Shapes, stages: int) -> bool:
    """Whether the flags of a kind make a backbone of so many stages that these tensors fit."""
    config = BackboneConfig(**kind._asdict(), outputs=(stages,))
    with torch.device("meta"):
        built = build_backbone(config).state_dict()
    wanted = _shapes({_PREFIX + name: value for name, value in built.items()})
    return _difference(wanted, shapes, wanted.keys()) is None


def _flags(kind: _Kind, own: _Kind) -> str:
    """What to type for this kind, where the model is of another."""
    flags = {}
    stages = len(own.blocks)
    if (kind.blocks[:stages], kind.bottleneck) != (own.blocks, own.bottleneck):
        if kind.depth is not None and own.depth is not None:
            flags["depth"] = kind.depth
        else:
            flags |= {"blocks": _spaced(kind.blocks), "bottleneck": kind.bottleneck}
    if kind.planes[:stages] != own.planes:
        flags["planes"] = _spaced(kind.planes)
    flags |= {name: getattr(kind, name) for name in ("stem", "norm") if getattr(kind, name) != getattr(own, name)}
    return " ".join(f"--model.backbone.{name} {value}" for name, value in flags.items())


def _spaced(values: tuple[int, ...]) -> str:
    """Numbers as flags take them."""
    return " ".join(map(str, values))


def shape_text(value: torch.Size) -> str:
    """A shape in words."""
    return "x".join(map(str, value)) or "one number"
