"""Names of transformers' ResNet (``ResNetModel``, ``ResNetBackbone`` and what has one inside) and ours, both ways."""

import re
from collections.abc import Iterable

_THEIRS = re.compile(
    r"(?P<outer>(?:.*\.)?)"
    r"(?:embedder\.embedder|encoder\.stages\.(?P<stage>\d+)\.layers\.(?P<block>\d+)\.(?:layer\.(?P<conv>\d+)|shortcut))"
    r"\.(?P<kind>convolution|normalization)\.(?P<part>\w+)"
)
_OURS = re.compile(
    r"(?P<outer>(?:.*?\.)??)"
    r"(?:layer(?P<stage>\d+)\.(?P<block>\d+)\.)?"
    r"(?:(?P<kind>conv|bn)(?P<conv>\d+)|downsample\.(?P<step>[01]))\.(?P<part>\w+)"
)


def from_transformers_resnet(names: Iterable[str]) -> dict[str, str]:
    """Names in a state dictionary of transformers -> ours, torchvision's; others keep theirs.

    Whatever stands before a name (``resnet.``, ``model.backbone.conv_encoder.model.``) stays before it. Our
    bottlenecks have their stride in the 3x3 convolution. With ``downsample_in_bottleneck=True`` in its configuration
    theirs is in the first 1x1, another network of the same names and shapes: whoever has the configuration must look.
    """
    return {name: _ours(name) for name in names}


def to_transformers_resnet(names: Iterable[str]) -> dict[str, str]:
    """Our names of a ResNet with the stem "imagenet" -> transformers'; others keep theirs, as does what stands before.

    Their norms also have ``num_batches_tracked``, which no frozen norm has.
    """
    return {name: _theirs(name) for name in names}


def _ours(name: str) -> str:
    found = _THEIRS.fullmatch(name)
    if found is None:
        return name
    outer, part, norm = found["outer"], found["part"], found["kind"] == "normalization"
    if found["stage"] is None:
        return f"{outer}{'bn1' if norm else 'conv1'}.{part}"
    block = f"{outer}layer{int(found['stage']) + 1}.{found['block']}"
    if found["conv"] is None:
        return f"{block}.downsample.{int(norm)}.{part}"
    return f"{block}.{'bn' if norm else 'conv'}{int(found['conv']) + 1}.{part}"


def _theirs(name: str) -> str:
    found = _OURS.fullmatch(name)
    if found is None or (found["stage"] is None and found["conv"] != "1"):
        return name
    outer, part = found["outer"], found["part"]
    kind = "normalization" if found["kind"] == "bn" or found["step"] == "1" else "convolution"
    if found["stage"] is None:
        return f"{outer}embedder.embedder.{kind}.{part}"
    block = f"{outer}encoder.stages.{int(found['stage']) - 1}.layers.{found['block']}"
    within = "shortcut" if found["conv"] is None else f"layer.{int(found['conv']) - 1}"
    return f"{block}.{within}.{kind}.{part}"
