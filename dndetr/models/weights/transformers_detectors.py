"""DAB-DETR and Deformable DETR of transformers: their tensors under our names, and ours under theirs.

Nothing of denoising is left in a detector, so a DN-DETR is a DAB-DETR, and a model whose queries have vectors for
positions a Deformable DETR.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from ...model_config import ModelConfig
from ..build import build_model
from ..layers import MLP
from .head_sharing import fit_heads
from .transformers_resnet import from_transformers_resnet, to_transformers_resnet

Weights = dict[str, Tensor]
Rows = tuple[tuple[str, str], ...]

_BACKBONE = "model.backbone.conv_encoder.model."
# Their name and ours: # is a number, * the rest. In order; the first that fits decides, in either direction.
_ENCODER: Rows = (
    ("model.encoder.layers.#.self_attn_layer_norm.*", "encoder.layers.#.norm1.*"),
    ("model.encoder.layers.#.fc1.*", "encoder.layers.#.ffn.linear1.*"),
    ("model.encoder.layers.#.fc2.*", "encoder.layers.#.ffn.linear2.*"),
    ("model.encoder.layers.#.final_layer_norm.*", "encoder.layers.#.ffn.norm.*"),
)
_OTHERS: Rows = (("model.encoder.*", "encoder.*"), ("model.decoder.*", "decoder.*"))
_SELF, _CROSS, _MLP = (f"model.decoder.layers.#.{part}" for part in ("self_attn", "cross_attn", "mlp"))
_DAB: Rows = (
    ("class_embed.*", "decoder.class_embed.*"),
    ("bbox_predictor.*", "decoder.bbox_embed.*"),
    ("model.input_projection.*", "projection.projections.0.*"),
    ("model.query_refpoint_embeddings.*", "queries.refpoint_embed.*"),
    ("model.patterns.*", "queries.patterns.*"),
    *_ENCODER,
    ("model.encoder.layers.#.activation_fn.*", "encoder.layers.#.ffn.activation.*"),
    *(
        (f"{_SELF}.self_attn_{theirs}_proj.*", f"decoder.layers.#.sa_{ours}_proj.*")
        for theirs, ours in (
            *(("query_content", "qcontent"), ("query_pos", "qpos")),
            *(("key_content", "kcontent"), ("key_pos", "kpos"), ("value", "v")),
        )
    ),
    (f"{_SELF}.self_attn.output_proj.*", "decoder.layers.#.sa_out_proj.*"),
    (f"{_SELF}.self_attn_layer_norm.*", "decoder.layers.#.norm1.*"),
    *(
        (f"{_CROSS}.cross_attn_{theirs}_proj.*", f"decoder.layers.#.ca_{ours}_proj.*")
        for theirs, ours in (
            *(("query_content", "qcontent"), ("query_pos", "qpos"), ("query_pos_sine", "qpos_sine")),
            *(("key_content", "kcontent"), ("key_pos", "kpos"), ("value", "v")),
        )
    ),
    (f"{_CROSS}.cross_attn.output_proj.*", "decoder.layers.#.ca_out_proj.*"),
    (f"{_CROSS}.cross_attn_layer_norm.*", "decoder.layers.#.norm2.*"),
    (f"{_MLP}.fc1.*", "decoder.layers.#.ffn.linear1.*"),
    (f"{_MLP}.fc2.*", "decoder.layers.#.ffn.linear2.*"),
    (f"{_MLP}.activation_fn.*", "decoder.layers.#.ffn.activation.*"),
    (f"{_MLP}.final_layer_norm.*", "decoder.layers.#.ffn.norm.*"),
    ("model.decoder.layernorm.*", "decoder.norm.*"),
    *_OTHERS,
)
_DEFORMABLE: Rows = (
    ("class_embed.*", "decoder.class_embed.*"),
    ("bbox_embed.*", "decoder.bbox_embed.*"),
    ("model.input_proj.*", "projection.projections.*"),
    ("model.level_embed", "projection.level_embed"),
    ("model.query_position_embeddings.*", "queries.position_and_content.*"),
    ("model.reference_points.*", "queries.reference_points.*"),
    ("model.pos_trans.*", "queries.pos_trans.*"),
    ("model.pos_trans_norm.*", "queries.pos_trans_norm.*"),
    ("model.enc_output.*", "proposals.enc_output.*"),
    ("model.enc_output_norm.*", "proposals.enc_output_norm.*"),
    *_ENCODER,
    ("model.encoder.layers.#.mlp.activation_fn.*", "encoder.layers.#.ffn.activation.*"),
    ("model.decoder.layers.#.self_attn_layer_norm.*", "decoder.layers.#.norm2.*"),
    ("model.decoder.layers.#.encoder_attn.*", "decoder.layers.#.cross_attn.*"),
    ("model.decoder.layers.#.encoder_attn_layer_norm.*", "decoder.layers.#.norm1.*"),
    ("model.decoder.layers.#.fc1.*", "decoder.layers.#.ffn.linear1.*"),
    ("model.decoder.layers.#.fc2.*", "decoder.layers.#.ffn.linear2.*"),
    ("model.decoder.layers.#.mlp.activation_fn.*", "decoder.layers.#.ffn.activation.*"),
    ("model.decoder.layers.#.final_layer_norm.*", "decoder.layers.#.ffn.norm.*"),
    *_OTHERS,
)
# Names that other versions of transformers, and its script for official files, give the same tensors.
_ALIASES = ((r"model\.backbone\.model\.", _BACKBONE),)
_DAB_ALIASES = (
    *_ALIASES,
    *(
        (rf"(model\.decoder\.layers\.\d+)\.layer\.{number}\.", rf"\1.{part}.")
        for number, part in enumerate(("self_attn", "cross_attn", "mlp"))
    ),
)
_DEFORMABLE_ALIASES = (
    *_ALIASES,
    (r"(model\.(?:en|de)coder\.layers\.\d+\.self_attn)\.o_proj\.", r"\1.out_proj."),
    (r"(model\.(?:en|de)coder\.layers\.\d+)\.mlp\.(fc[12])\.", r"\1.\2."),
    (r"(model\.(?:en|de)coder\.layers\.\d+)\.activation_fn\.", r"\1.mlp.activation_fn."),
)
_PACKED = re.compile(r"(.*\.self_attn\.)in_proj_(weight|bias)")
_PART = re.compile(r"(.*\.self_attn\.)([qkv])_proj\.(weight|bias)")
_BOTH = "queries.position_and_content.weight"
_UNKNOWN = "queries.label_enc.weight"
_DENOISING = (_UNKNOWN, "queries.position_head.")


def of_denoising_alone(names: Iterable[str]) -> list[str]:
    """Those of our names that no detector of transformers has a counterpart of, since only noised queries use them."""
    return [name for name in names if name.startswith(_DENOISING)]


def from_detector(state: Weights, config: ModelConfig, classes: int) -> Weights:
    """A state dictionary of transformers -> that of our model of the same configuration, in float32.

    What of it only noised queries use is zero. ValueError for tensors that are missing, of another shape, not finite,
    or of parts that the configuration does not speak of.
    """
    with torch.device("meta"):
        own = build_model(config, classes).state_dict()
    ours = _under_our_names(state, config)
    weights = fit_heads(ours, own)
    for name in of_denoising_alone(own):
        weights[name] = torch.zeros(own[name].shape)
    for name, value in own.items():
        place = _first(_their_names([name], config))
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, torch.zeros(value.shape, dtype=value.dtype))
        elif name not in weights:
            raise ValueError(f"its weights lack {place}: give a whole file")
        elif weights[name].shape != value.shape:
            there, here = ("x".join(map(str, x.shape)) for x in (weights[name], value))
            raise ValueError(f"{place} is {there}, and {here} by its config.json: they are of different models")
        elif not weights[name].isfinite().all():
            raise ValueError(f"{place} has NaN or infinite numbers: its training failed")
    beside = [name for name in weights if name not in own and not _is_unused(name, config)]
    if beside:
        raise ValueError(
            f"its weights have {_first(_their_names(beside, config))}, of which its config.json does not speak: they "
            "are of different models"
        )
    return {name: weights[name] for name in own}


def to_detector(weights: Weights, config: ModelConfig) -> tuple[Weights, Weights]:
    """Our model's tensors -> under the names that transformers writes, and those without a counterpart under ours.

    Matching queries of a DN-DETR start from the label table's row "unknown", which becomes part of the patterns. What
    transformers has without a use for it is zero.
    """
    dab, weights = config.variant == "dn-detr", dict(weights)
    counters = [name for name in weights if name.endswith("num_batches_tracked")]
    second_set = [name for name in weights if name.endswith("_embed.many")]
    kept = {name: weights.pop(name) for name in (*counters, *of_denoising_alone(weights), *second_set)}
    if dab:
        if "queries.patterns.weight" in weights:
            kept["queries.patterns.weight"] = weights["queries.patterns.weight"]
        weights["queries.patterns.weight"] = _starting_content(kept, config)
    else:
        weights = _with_their_heads(weights, config)
    if "queries.position_embed.weight" in weights:
        parts = [weights.pop(f"queries.{part}_embed.weight") for part in ("position", "tgt")]
        weights[_BOTH] = torch.cat(parts, dim=1)
    unpacked: Weights = {}
    for name, value in weights.items():
        if found := _PACKED.fullmatch(name):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                unpacked[f"{found[1]}{part}_proj.{found[2]}"] = rows
        else:
            unpacked[name] = value
    if config.encoder_layers == 0:
        unpacked |= _without_encoder(config)
    return {theirs: unpacked[ours] for ours, theirs in _their_names(unpacked, config).items()}, kept


def _without_encoder(config: ModelConfig) -> Weights:
    """What transformers has, without a use for it, where there is no encoder."""
    if config.variant != "dn-detr":
        return {"projection.level_embed": torch.zeros(config.levels, config.width)}
    scale = MLP(config.width, config.width, config.width).state_dict()
    return {f"encoder.query_scale.{name}": torch.zeros_like(value) for name, value in scale.items()}


def _starting_content(queries: Weights, config: ModelConfig) -> Tensor:
    """What a DN-DETR's matching queries start from, [patterns or 1, C]: the row "unknown", and own patterns."""
    unknown = torch.nn.functional.pad(queries[_UNKNOWN][-1:], (0, int(config.label_indicator)))
    return unknown + queries["queries.patterns.weight"] if config.patterns else unknown


def heads_differ(state: Weights) -> bool:
    """Whether a file has heads of their own for several decoder layers, which transformers then leaves untied."""
    return any(
        name.startswith(("class_embed.", "bbox_embed."))
        and (first := re.sub(r"_embed\.\d+\.", "_embed.0.", name)) != name
        and (first not in state or not state[first].equal(value))
        for name, value in state.items()
    )


def _under_our_names(state: Weights, config: ModelConfig) -> Weights:
    dab = config.variant == "dn-detr"
    aliases, rows = (_DAB_ALIASES, _DAB) if dab else (_DEFORMABLE_ALIASES, _DEFORMABLE)
    ours: Weights = {}
    for name, value in state.items():
        theirs = name
        for alias, written in aliases:
            theirs = re.sub(f"^{alias}", written, theirs)
        if theirs.startswith(_BACKBONE):
            place = _of_backbone(theirs.removeprefix(_BACKBONE), config)
        else:
            place = _translated(theirs, rows)
        value = value.float() if value.is_floating_point() else value
        if place in ours and not ours[place].equal(value):
            raise ValueError(f"{name} is not the tensor that it has under the head's other name")
        ours[place] = value
    packed: dict[str, dict[str, Tensor]] = {}
    for name in list(ours):
        if found := _PART.fullmatch(name):
            packed.setdefault(f"{found[1]}in_proj_{found[3]}", {})[found[2]] = ours.pop(name)
    for name, parts in packed.items():
        if parts.keys() != set("qkv"):
            raise ValueError(f"its weights lack a part of {name.replace('in_proj_', 'q, k and v_proj.')}")
        ours[name] = torch.cat([parts[part] for part in "qkv"])
    if _BOTH in ours:
        both = ours.pop(_BOTH).chunk(2, dim=1)
        ours["queries.position_embed.weight"], ours["queries.tgt_embed.weight"] = both
    if config.proposals != "none":  # the last heads are the encoder's
        last = re.compile(rf"decoder\.(class|bbox)_embed\.{config.decoder_layers}\.(.*)")
        ours = {last.sub(r"proposals.\1_embed.\2", name): value for name, value in ours.items()}
    return ours


def _with_their_heads(weights: Weights, config: ModelConfig) -> Weights:
    """Heads where transformers saves them: those that boxes are refined with, and all of two stages, in the decoder."""
    two_stages, layers = config.proposals != "none", config.decoder_layers
    moved: Weights = {}
    for name, value in weights.items():
        found = re.fullmatch(r"(decoder|proposals)\.(class|bbox)_embed\.(?:(\d+)\.)?(.*)", name)
        if found is None:
            moved[name] = value
            continue
        part, kind, number, rest = found.groups()
        within = "model.decoder." if two_stages or (kind == "bbox" and config.box_refinement) else ""
        if part == "proposals":
            places = [layers]
        elif number is not None:
            places = [number]
        else:
            places = range(layers) if within else [0]
        moved |= {f"{within}{kind}_embed.{place}.{rest}": value for place in places}
    return moved


def _their_names(names: Iterable[str], config: ModelConfig) -> dict[str, str]:
    """Our names -> theirs; those that are theirs already, and unknown ones, stay."""
    rows = tuple((ours, theirs) for theirs, ours in (_DAB if config.variant == "dn-detr" else _DEFORMABLE))
    found = {}
    for name in names:
        if name.startswith("backbone."):
            rest = name.removeprefix("backbone.")
            own = config.backbone.kind == "resnet"
            found[name] = _BACKBONE + (to_transformers_resnet([rest])[rest] if own else rest.removeprefix("model."))
        else:
            found[name] = name if name.startswith("model.") else _translated(name, rows)
    return found


def _of_backbone(rest: str, config: ModelConfig) -> str:
    """Our name of a backbone's tensor; ResNets are transformers' own, or timm's, with torchvision's names."""
    if config.backbone.kind == "transformers":
        return f"backbone.model.{rest}"
    rest = rest.removeprefix("_backbone.")
    return f"backbone.{from_transformers_resnet([rest])[rest]}"


def _translated(name: str, rows: Rows) -> str:
    for pattern, replacement in rows:
        found = re.fullmatch(re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", "(.*)"), name)
        if found:
            return re.sub("[#*]", "{}", replacement).format(*found.groups())
    return name


def _is_unused(name: str, config: ModelConfig) -> bool:
    """Whether transformers has a tensor, too, without a use for it: stages after the last map, what no encoder asks."""
    stage = re.match(r"backbone\.layer(\d+)\.", name)
    beyond = stage is not None and int(stage[1]) > max(config.backbone.outputs)
    without_encoder = config.encoder_layers == 0 and name.startswith(("encoder.query_scale.", "projection.level_embed"))
    of_theirs = name.startswith(("backbone.model.", "backbone.fc.")) or name.endswith("num_batches_tracked")
    return beyond or without_encoder or of_theirs


def _first(names: dict[str, str]) -> str:
    first, *others = names.values()
    return f"{first} and {len(others)} more" if others else first
