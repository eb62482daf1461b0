"""What config.json and preprocessor_config.json of a transformers detector say, as our settings."""

import json
import math
import re
from dataclasses import replace

from ..config import Config, ImagesConfig
from ..data.classes import Classes
from ..model_config import BackboneConfig, ModelConfig
from ..presets import deformable_detr_r50, dn_detr_r50


def from_transformers(theirs: dict, processor: dict) -> tuple[Config, Classes]:
    """A detector's settings, as read from its files, as ours, and its classes, one for every row of its class heads.

    What it does not say of training is DN-DETR's recipe, but without its denoising. ValueError, in the file's words,
    for what has no counterpart.
    """
    deformable = theirs["model_type"] == "deformable_detr"
    recipe = deformable_detr_r50() if deformable else dn_detr_r50()
    model = _deformable(theirs) if deformable else _dab(theirs)
    denoising, images = replace(recipe.denoising, groups=0), _images(processor, recipe.images)
    return replace(recipe, model=model, images=images, denoising=denoising), _classes(theirs)


def without_counterpart(theirs: dict, **expected) -> None:
    """ValueError for the first of these settings that is there and has another value."""
    for name, value in expected.items():
        if theirs.get(name, value) != value:
            raise ValueError(f"{name} {json.dumps(theirs[name])} has no counterpart here (only {json.dumps(value)})")


def _dab(theirs: dict) -> ModelConfig:
    without_counterpart(theirs, keep_query_pos=False, normalize_before=False, query_dim=4)
    scale = theirs.get("sine_position_embedding_scale")
    if scale is not None and not math.isclose(scale, 2 * math.pi):
        without_counterpart(theirs, sine_position_embedding_scale=None)
    return ModelConfig(
        variant="dn-detr",
        backbone=_backbone(theirs, last=True),
        **_shared(theirs, hidden=2048, activation="prelu"),
        width=theirs.get("hidden_size", 256),
        queries=theirs.get("num_queries", 300),
        patterns=theirs.get("num_patterns", 0),
        anchors="uniform" if theirs.get("random_refpoints_xy") else "normal",
        temperature=(float(theirs.get("temperature_height", 20)), float(theirs.get("temperature_width", 20))),
    )


def _deformable(theirs: dict) -> ModelConfig:
    without_counterpart(theirs, position_embedding_type="sine", num_channels=3)
    refine, two_stage = theirs.get("with_box_refine", False), theirs.get("two_stage", False)
    queries = theirs.get("two_stage_num_proposals" if two_stage else "num_queries", 300)
    return ModelConfig(
        variant="dn-deformable-detr",
        backbone=_backbone(theirs),
        **_shared(theirs, hidden=1024, activation="relu"),
        width=theirs.get("d_model", 256),
        queries=queries,
        levels=theirs.get("num_feature_levels", 4),
        encoder_points=theirs.get("encoder_n_points", 4),
        decoder_points=theirs.get("decoder_n_points", 4),
        temperature=(10000.0, 10000.0),
        position_shift=0.5,
        proposals="objects" if two_stage else "none",
        proposal_padding="official" if two_stage else "hidden",
        shared_heads=not refine,
        query_scale=False,
        label_indicator=False,
        query_positions="vectors",
        box_refinement=refine,
    )


def _shared(theirs: dict, hidden: int, activation: str) -> dict:
    """What both kinds have, with their defaults where these differ."""
    return {
        "heads": _same(theirs, "attention_heads", 8),
        "hidden": _same(theirs, "ffn_dim", hidden),
        "encoder_layers": theirs.get("encoder_layers", 6),
        "decoder_layers": theirs.get("decoder_layers", 6),
        "activation": _one_of(theirs, "activation_function", activation, ("relu", "prelu", "gelu")),
        "box_eps": 1e-5,
    }


def _same(theirs: dict, name: str, default: int) -> int:
    values = [theirs.get(f"{part}_{name}", default) for part in ("encoder", "decoder")]
    if values[0] != values[1]:
        raise ValueError(f"encoder_{name} {values[0]} and decoder_{name} {values[1]}: here both are the same")
    return values[0]


def _one_of(theirs: dict, name: str, default: str, known: tuple[str, ...]) -> str:
    value = theirs.get(name, default)
    if value not in known:
        raise ValueError(f"{name} {value} has no counterpart here (only {', '.join(known)})")
    return value


def _backbone(theirs: dict, last: bool = False) -> BackboneConfig:
    """What makes a detector's maps; last: of all that it gives, the last map alone is used."""
    backbone = theirs.get("backbone_config")
    if backbone is None and theirs.get("use_timm_backbone", True):
        maps = theirs["model_type"] == "deformable_detr" and theirs.get("num_feature_levels", 4) > 1
        backbone = {"model_type": "timm_backbone", "backbone": theirs.get("backbone") or "resnet50"}
        backbone["out_indices"] = [2, 3, 4] if maps else [4]
        if theirs.get("dilation"):
            backbone["output_stride"] = 16
        backbone |= theirs.get("backbone_kwargs") or {}
    elif backbone is None:
        if theirs.get("backbone") is not None:
            raise ValueError(f"backbone {theirs['backbone']} is only a name: save it again with transformers 5")
        backbone = {"model_type": "resnet"}
    without_counterpart(backbone, num_channels=3)
    kind = backbone.get("model_type")
    if kind == "timm_backbone":
        config = _timm_resnet(backbone)
        return replace(config, outputs=config.outputs[-1:]) if last else config
    outputs = _outputs(backbone)[-1:] if last else _outputs(backbone)
    if kind == "resnet" and _is_ours(backbone, outputs):
        bottleneck = backbone.get("layer_type", "bottleneck") == "bottleneck"
        widths = backbone.get("hidden_sizes", (256, 512, 1024, 2048))
        return BackboneConfig(
            blocks=tuple(backbone.get("depths", (3, 4, 6, 3))),
            planes=tuple(width // 4 if bottleneck else width for width in widths),
            bottleneck=bottleneck,
            outputs=outputs,
        )
    if "depths" not in backbone:  # all blocks have one stride, and of those the last one's map is used
        final = len(backbone.get("stage_names") or range(1 + backbone.get("num_hidden_layers", 12))) - 1
        if outputs != (final,):
            raise ValueError(f"its {kind} gives the maps {outputs}: of backbones without stages only the last is read")
        outputs = (4,)
    return BackboneConfig(kind="transformers", settings=json.dumps(backbone, sort_keys=True), outputs=outputs)


def _outputs(backbone: dict) -> tuple[int, ...]:
    """Numbers of the stages whose maps are used, the stem being 0."""
    names = backbone.get("stage_names") or [f"stage{n}" for n in range(1 + len(backbone.get("depths", range(4))))]
    without_stem = int(names[0] == "stage1")  # as PVT V2, where "stage1" is number 0
    if backbone.get("out_indices") is not None:
        numbers = [index % len(names) for index in backbone["out_indices"]]
    else:
        numbers = [names.index(name) for name in backbone.get("out_features") or names[-1:]]
    return tuple(sorted(number + without_stem for number in numbers))


def _is_ours(backbone: dict, outputs: tuple[int, ...]) -> bool:
    """Whether our ResNet can be this one of transformers."""
    bottleneck = backbone.get("layer_type", "bottleneck") == "bottleneck"
    return (
        backbone.get("embedding_size", 64) == 64
        and backbone.get("hidden_act", "relu") == "relu"
        and not backbone.get("downsample_in_first_stage", False)
        and not (bottleneck and backbone.get("downsample_in_bottleneck", False))
        and not (bottleneck and any(width % 4 for width in backbone.get("hidden_sizes", ())))  # planes are a quarter
        and len(backbone.get("depths", range(4))) <= 4
        and 0 not in outputs
    )


def _timm_resnet(backbone: dict) -> BackboneConfig:
    name = backbone.get("backbone", "")
    found = re.fullmatch(r"resnet(18|34|50|101)(\..*)?", name)
    if found is None:
        raise ValueError(f"its backbone is timm's {name}, and of those only resnet18, 34, 50 and 101 are read")
    depth, dilation = int(found[1]), backbone.get("output_stride", 32) == 16
    if dilation and depth < 50:
        raise ValueError(f"timm dilates {name} in another way than this ResNet: of DC5, resnet50 and 101 are read")
    outputs = tuple(sorted(index % 5 for index in backbone.get("out_indices") or [4]))
    return BackboneConfig(depth=depth, dilation=dilation, outputs=outputs)


def _images(processor: dict, own: ImagesConfig) -> ImagesConfig:
    without_counterpart(processor, resample=2)
    mean, std = processor.get("image_mean") or own.mean, processor.get("image_std") or own.std
    if not processor.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    # Ours act on colours in [0, 1].
    factor = 255 * (processor.get("rescale_factor") or 1 / 255) if processor.get("do_rescale", True) else 255
    if not math.isclose(factor, 1):
        mean, std = (tuple(value / factor for value in values) for values in (mean, std))
    own = replace(own, mean=tuple(mean), std=tuple(std))
    size = processor.get("size") or {}
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": processor.get("max_size", 1333)}
    if not processor.get("do_resize", True):
        return replace(own, recipe="original")
    if {"height", "width"} <= size.keys():
        return replace(own, recipe="fixed", canvas=(size["height"], size["width"]))
    if size and "shortest_edge" not in size:
        raise ValueError(f"its images' size {json.dumps(size)} has no counterpart here (only sides, or both edges)")
    short, long = size.get("shortest_edge", own.eval_size), size.get("longest_edge", own.max_size)
    sizes = tuple(round(side * short / own.eval_size) for side in own.sizes)
    return replace(own, sizes=sizes, eval_size=short, max_size=long or 100 * short)


def _classes(theirs: dict) -> Classes:
    """A row's number and name for every row of the class heads."""
    names = theirs.get("id2label")
    if names is None:
        return [(row, f"LABEL_{row}") for row in range(theirs.get("num_labels", 2))]
    rows = {int(row): str(name) for row, name in names.items()}
    if sorted(rows) != list(range(len(rows))):
        raise ValueError(f"id2label has the rows {', '.join(map(str, sorted(rows)[:9]))}: they count from 0")
    return [(row, rows[row]) for row in range(len(rows))]
