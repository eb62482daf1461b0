"""Starting weights from a file: our checkpoints, official DINO, DN-DETR and DAB-DETR files, detrex's, backbones."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ...data.classes import Classes, distinct_names, listed, match_classes
from ..deformable_decoder import DeformableDecoder
from ..dn_detr import DNDETR
from ..transformers_backbone import TransformersBackbone
from .backbone_match import demand_whole_backbone, shape_text
from .detrex import is_detrex, official_from_detrex
from .head_sharing import fit_heads
from .official import COCO_CLASSES, encoder_heads_last, from_official
from .official_swin import SWIN_BLOCK, from_official_swin
from .unwrap import unwrap

_DETR = re.compile(r"transformer\.decoder\.layers\.0\.multihead_attn\.")
_CLASS_HEAD = re.compile(r"(decoder|proposals)\.class_embed\.(\d+\.)?(weight|bias)")
_PROPOSALS_CLASS = "proposals.class_embed."
_LABEL_TABLE = "queries.label_enc.weight"
_CLASSIFIERS = ("fc.", "head.")  # of ResNets, of Swins


class Source(NamedTuple):
    """What a file holds: tensors under our names, and whose rows those of its class heads are.

    classes: (category id, name) of every row, or ids: category ids alone, as in official files; both None where the
    file does not say. objects: whether the encoder's proposals are scored for being objects, None where it does not
    say; detrex: whether it is detrex's; removed, aside: as ``unwrap`` has them; other: the name of another detector, of
    which only the backbone is in ``weights``; blank: tensors of denoising, which a detector of transformers has not;
    notes: what else is to be said of the file.
    """

    weights: dict[str, Tensor]
    classes: Classes | None
    ids: Sequence[int] | None
    objects: bool | None
    detrex: bool
    removed: list[str]
    aside: list[str]
    other: str | None = None
    blank: Sequence[str] = ()
    notes: Sequence[str] = ()


class Initialised(NamedTuple):
    """What became of a file's weights.

    kept: names of tensors taken from it; remade: names of those that it does not have, or in another shape, and which
    therefore start as in a new model; ignored: names in the file that the model does not have; found, absent: classes
    whose rows were taken, and those that start anew (both empty where the rows were not looked up); removed: keys and
    prefixes under which the file had its weights; hints: flags with which the model may be more like the file's; other:
    the name of another detector, of which only the backbone was taken.
    """

    kept: list[str]
    remade: list[str]
    ignored: list[str]
    found: list[str]
    absent: list[str]
    removed: list[str]
    hints: list[str]
    other: str | None = None

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
        if self.other is not None:
            text += f"; it is of another detector, {self.other}, of which only the backbone is used"
        return "; ".join([text, *self.hints])


def weights_of(content: dict, path: str | Path) -> Source:
    """The weights in a file's content; the moving average where a checkpoint has one.

    ValueError, with the file's name, where they contradict each other.
    """
    weights, *others = unwrap(content, path)
    if any(map(_DETR.match, weights)):
        return _backbone_of_detr(weights, *others)
    if any(name.startswith("transformer.") for name in weights):
        detrex = is_detrex(weights)
        if detrex:
            weights = official_from_detrex(weights)
        objects = encoder_heads_last(weights) and not detrex
        try:
            weights = from_official_swin(from_official(weights))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return Source(weights, None, _ids(weights, detrex), objects, detrex, *others)
    if any(name in weights for name in ("conv1.weight", "layer1.0.conv1.weight", SWIN_BLOCK)):
        weights = {f"backbone.{name}": value for name, value in weights.items() if not name.startswith(_CLASSIFIERS)}
        return Source(from_official_swin(weights), None, None, None, False, *others)
    classes = content.get("classes") if "model" in content else None
    if classes is not None:
        classes = [(number, name) for number, name in classes]
        if all(name == f"LABEL_{number}" for number, name in classes):  # what transformers calls those without a name
            classes = None
    objects = _of_objects(content.get("config"))
    beside = {name: content[name] for name in ("blank", "notes") if "model" in content and name in content}
    return Source(from_official_swin(weights), classes, None, objects, False, *others, **beside)


def _backbone_of_detr(weights: dict[str, Tensor], removed: list[str], aside: list[str]) -> Source:
    """DETR's transformer has some tensors of the names and shapes of ours, which mean something else there."""
    body = "backbone.0.body."
    backbone = {f"backbone.{name.removeprefix(body)}": weights[name] for name in weights if name.startswith(body)}
    aside = [*aside, *(name for name in weights if not name.startswith(body))]
    return Source(backbone, None, None, None, False, removed, aside, "DETR")


def _of_objects(config) -> bool | None:
    """Whether our configuration's proposals are scored for being objects; None for anything else."""
    settings = config.get("model") if isinstance(config, dict) else None
    proposals = settings.get("proposals") if isinstance(settings, dict) else None
    return None if proposals is None else proposals == "objects"


def _ids(weights: dict[str, Tensor], detrex: bool) -> Sequence[int] | None:
    """The category id of every row of the class heads, in files that do not name them; None if heads disagree."""
    rows = {len(value) for name, value in weights.items() if _CLASS_HEAD.fullmatch(name)}
    if len(rows) != 1:
        return None
    coco = [number for number, _ in COCO_CLASSES]
    return range(*rows) if not detrex else coco if rows == {len(coco)} else None


def initialise(model: DNDETR, content: dict, path: str | Path, classes: Classes) -> Initialised:
    """Copy into ``model`` every tensor of a file that fits by name and shape; rows of the class heads by class.

    content: of the file, as ``load_checkpoint`` reads it; path: its name in messages; classes: (category id, name) of
    the model, in label order. They are looked up by name in our checkpoints, by category id in official files, whose
    heads have a row for every id. A head of all decoder layers becomes that of each, and copies of one that of all.
    ValueError if nothing fits, or the backbone does not, since training would then silently start from random weights.
    """
    source = weights_of(content, path)
    own = model.state_dict()
    idle = _idle(model)
    demand_whole_backbone(own, source.weights, path, idle)
    weights = fit_heads(source.weights, own)
    objects = model.proposals is not None and model.proposals.objects
    other_scores = source.objects is not None and source.objects != objects
    places = _places(classes, source)
    taken, remade = {}, []
    for name, value in own.items():
        of_proposals = name.startswith(_PROPOSALS_CLASS)
        blank = name in source.blank
        there = None if of_proposals and other_scores else weights.get(name)
        by_class = places is not None and (_CLASS_HEAD.fullmatch(name) or name == _LABEL_TABLE)
        if blank and name != _LABEL_TABLE:
            remade.append(name)
        elif there is not None and (by_class or blank) and there.shape[1:] == value.shape[1:]:
            # An object of whatever class; matching queries start from the blank table's last row.
            rows = [0] if of_proposals and objects else [] if blank else places
            taken[name] = _rows_by_class(value, there, rows, name == _LABEL_TABLE)
        elif there is not None and there.shape == value.shape:
            taken[name] = there
        elif there is not None:
            remade.append(f"{name} ({shape_text(there.shape)} there, {shape_text(value.shape)} here)")
        elif not _is_counter(name) and name not in idle:
            remade.append(name)
    if not taken:
        found = listed([*source.weights, *source.aside], 3) or "no tensors"
        raise ValueError(f"{path}: nothing in this file fits the model (it has {found})")
    model.load_state_dict(taken, strict=False)
    ignored = [name for name in (*weights, *source.aside) if name not in own and not _is_counter(name)]
    found, absent = [], []
    for (number, _), name, place in zip(classes, distinct_names(classes), places or (), strict=False):
        (absent if place is None else found).append(name if source.ids is None else f"{name} ({number})")
    hints = _hints(model, weights, source)
    return Initialised(list(taken), remade, ignored, found, absent, source.removed, hints, source.other)


def _hints(model: DNDETR, weights: dict[str, Tensor], source: Source) -> list[str]:
    """What to type for a model that is more like the file's, where only the file's author can know."""
    hints = list(source.notes)
    one_head = isinstance(model.decoder, DeformableDecoder) and "decoder.class_embed.weight" in model.state_dict()
    if one_head and any(re.match(r"decoder\.(class|bbox)_embed\.\d", name) for name in weights):
        hints.append("its decoder layers have heads of their own, kept with --model.no-shared-heads")
    if source.detrex and model.projection.temperature == (20.0, 20.0):
        flags = "--model.temperature 10000 10000 --model.position-shift 0.5"
        hints.append(f"detrex trains most models with other positions, those of {flags}")
    if source.blank:
        hints.append("embeddings of noised labels are made anew, since a detector of transformers has none")
        if source.classes is None:
            hints.append("its classes have no names, so they are taken in their order if there are as many")
    return hints


def _places(classes: Classes, source: Source) -> list[int | None] | None:
    """The file's row for every class, None where it has none; None altogether where rows cannot be told apart."""
    if source.ids is not None:
        rows = {number: row for row, number in enumerate(source.ids)}
        return [rows.get(number) for number, _ in classes]
    return None if source.classes is None else match_classes(classes, source.classes)


def _rows_by_class(own: Tensor, there: Tensor, places: list[int | None], table: bool) -> Tensor:
    """``own`` with the rows that the file has; the last row of a label table is no class, and goes to the last."""
    rows = own.clone()
    for label, place in enumerate(places):
        if place is not None and place < len(there) - table:
            rows[label] = there[place]
    if table:
        rows[-1] = there[-1]
    return rows


def _idle(model: DNDETR) -> set[str]:
    """Names of tensors of a backbone of transformers that no map depends on, so that nobody misses them."""
    backbone = model.backbone
    return {f"backbone.model.{name}" for name in backbone.idle} if isinstance(backbone, TransformersBackbone) else set()


def _is_counter(name: str) -> bool:
    """Batch norm's step counter, which no layer here reads."""
    return name.endswith("num_batches_tracked")


def _grouped(names: list[str]) -> str:
    """A few names as they are, many by the part of the model that they belong to."""
    if len(names) <= 3:
        return ", ".join(names)
    depths = [3 if name.startswith("backbone.model.") else 2 if name.startswith("backbone.") else 1 for name in names]
    parts = Counter(".".join(name.split(".")[:depth]) for name, depth in zip(names, depths, strict=True))
    return ", ".join(f"{part} ({count})" for part, count in parts.items())
