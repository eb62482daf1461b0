"""Starting weights from a file: our checkpoints, official DN-DETR and DAB-DETR files, torchvision's ResNets."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from ..data.classes import Classes, distinct_names, listed, match_classes
from .backbone_match import demand_whole_backbone, shape_text
from .official import from_official
from .unwrap import unwrap

_CLASS_HEAD = re.compile(r"decoder\.class_embed\.(\d+\.)?(weight|bias)")
_LABEL_TABLE = "queries.label_enc.weight"


class Source(NamedTuple):
    """What a file holds: tensors under our names, and whose rows those of its class heads are.

    classes: (category id, name) of every row; for official files, whose rows are category ids without names, only
    their number; None where the file does not say. removed, aside: as ``unwrap`` has them.
    """

    weights: dict[str, Tensor]
    classes: Classes | int | None
    removed: list[str]
    aside: list[str]


class Initialised(NamedTuple):
    """What became of a file's weights.

    kept: names of tensors taken from it; remade: names of those that it does not have, or in another shape, and which
    therefore start as in a new model; ignored: names in the file that the model does not have; found, absent: classes
    whose rows were taken, and those that start anew (both empty where the rows were not looked up); removed: keys and
    prefixes under which the file had its weights.
    """

    kept: list[str]
    remade: list[str]
    ignored: list[str]
    found: list[str]
    absent: list[str]
    removed: list[str]

    def __str__(self) -> str:
        text = f"found under {', '.join(self.removed)}; " if self.removed else ""
        text += f"kept {len(self.kept)} tensors"
        if self.found or self.absent:
            text += f" and the classes {listed(self.found)}" if self.found else " and no class"
        if self.absent:
            text += f"; classes made anew: {listed(self.absent)}"
        for what, names in (("re-made", self.remade), ("ignored", self.ignored)):
            if names:
                text += f"; {what} {len(names)}: {_grouped(names)}"
        return text


def weights_of(content: dict, path: str | Path) -> Source:
    """The weights in a file's content; the moving average where a checkpoint has one."""
    weights, *others = unwrap(content, path)
    if any(name.startswith("transformer.") for name in weights):
        weights = from_official(weights)
        rows = {len(value) for name, value in weights.items() if _CLASS_HEAD.fullmatch(name)}
        return Source(weights, rows.pop() if len(rows) == 1 else None, *others)
    if "conv1.weight" in weights:
        return Source(
            {f"backbone.{n}": value for n, value in weights.items() if not n.startswith("fc.")}, None, *others
        )
    classes = content.get("classes") if "model" in content else None
    return Source(weights, None if classes is None else [(number, name) for number, name in classes], *others)


def initialise(model: nn.Module, content: dict, path: str | Path, classes: Classes) -> Initialised:
    """Copy into ``model`` every tensor of a file that fits by name and shape; rows of the class heads by class.

    content: of the file, as ``load_checkpoint`` reads it; path: its name in messages; classes: (category id, name) of
    the model, in label order. They are looked up by name in our checkpoints, by category id in official files, whose
    heads have a row for every id. ValueError if nothing fits, or the backbone does not, since training would then
    silently start from random weights.
    """
    source = weights_of(content, path)
    own = model.state_dict()
    demand_whole_backbone(own, source.weights, path)
    places = _places(classes, source.classes)
    taken, remade = {}, []
    for name, value in own.items():
        there = source.weights.get(name)
        by_class = places is not None and (_CLASS_HEAD.fullmatch(name) or name == _LABEL_TABLE)
        if there is not None and by_class and there.shape[1:] == value.shape[1:]:
            taken[name] = _rows_by_class(value, there, places, name == _LABEL_TABLE)
        elif there is not None and there.shape == value.shape:
            taken[name] = there
        elif there is not None:
            remade.append(f"{name} ({shape_text(there.shape)} there, {shape_text(value.shape)} here)")
        elif not _is_counter(name):
            remade.append(name)
    if not taken:
        found = listed(list(source.weights), 3) or "no tensors"
        raise ValueError(f"{path}: nothing in this file fits the model (it has {found})")
    model.load_state_dict(taken, strict=False)
    ignored = [name for name in (*source.weights, *source.aside) if name not in own and not _is_counter(name)]
    found, absent = [], []
    for (number, _), name, place in zip(classes, distinct_names(classes), places or (), strict=False):
        (absent if place is None else found).append(f"{name} ({number})" if isinstance(source.classes, int) else name)
    return Initialised(list(taken), remade, ignored, found, absent, source.removed)


def _places(classes: Classes, there: Classes | int | None) -> list[int | None] | None:
    """The file's row for every class, None where it has none; None altogether where rows cannot be told apart."""
    if there is None:
        return None
    if isinstance(there, int):
        return [number if 0 <= number < there else None for number, _ in classes]
    return match_classes(classes, there)


def _rows_by_class(own: Tensor, there: Tensor, places: list[int | None], table: bool) -> Tensor:
    """``own`` with the rows that the file has; the last row of a label table is no class, and goes to the last."""
    rows = own.clone()
    for label, place in enumerate(places):
        if place is not None and place < len(there) - table:
            rows[label] = there[place]
    if table:
        rows[-1] = there[-1]
    return rows


def _is_counter(name: str) -> bool:
    """Batch norm's step counter, which no layer here reads."""
    return name.endswith("num_batches_tracked")


def _grouped(names: list[str]) -> str:
    """A few names as they are, many by the part of the model that they belong to."""
    if len(names) <= 3:
        return ", ".join(names)
    depths = [2 if name.startswith("backbone.") else 1 for name in names]
    parts = Counter(".".join(name.split(".")[:depth]) for name, depth in zip(names, depths, strict=True))
    return ", ".join(f"{part} ({count})" for part, count in parts.items())
