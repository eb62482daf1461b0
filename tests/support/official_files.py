"""Detectors with random weights everywhere, and their weights under the names of the official code."""

import re
from dataclasses import replace

import detectors
import torch

from dndetr.models.build import build_model
from dndetr.models.weights.head_sharing import fit_heads
from dndetr.models.weights.official import from_official

# Our names -> official ones, in order; everything else only gets a prefix.
_BACK = (
    (r"backbone\.(.*)", r"backbone.0.body.\1"),
    (r"decoder\.(class|bbox)_embed\.(.*)", r"\1_embed.\2"),
    (r"queries\.patterns\.weight", "transformer.patterns.weight"),
    (r"queries\.(.*)", r"\1"),
    (r"projection\.level_embed", "transformer.level_embed"),
    (r"(encoder)\.layers\.(\d+)\.ffn\.norm\.(.*)", r"transformer.\1.layers.\2.norm2.\3"),
    (r"(decoder)\.layers\.(\d+)\.ffn\.norm\.(.*)", r"transformer.\1.layers.\2.norm3.\3"),
    (r"(\w+)\.layers\.(\d+)\.ffn\.(.*)", r"transformer.\1.layers.\2.\3"),
    (r"decoder\.layers\.(\d+)\.level_gate\.(.*)", r"transformer.decoder.layers.\1.lvl_attn.\2"),
    (r"decoder\.layers\.(\d+)\.sa_out_proj\.(.*)", r"transformer.decoder.layers.\1.self_attn.out_proj.\2"),
    (r"(.*)", r"transformer.\1"),
)
_ONE_LEVEL = ((r"projection\.projections\.0\.(.*)", r"input_proj.\1"),)
_LEVELS = ((r"projection\.projections\.(.*)", r"input_proj.\1"),)
_DENSE = ((r"decoder\.layers\.(\d+)\.ca_out_proj\.(.*)", r"transformer.decoder.layers.\1.cross_attn.out_proj.\2"),)
_GATED = ((r"decoder\.layers\.(\d+)\.ca_out_proj\.(.*)", r"transformer.decoder.layers.\1.ca_out_v_proj.\2"),)
_PROPOSALS = (
    (r"proposals\.(.*)", r"transformer.\1"),
    (r"queries\.tgt_embed\.weight", "transformer.tgt_embed.weight"),
)
_SELECTED = (
    (r"proposals\.(class|bbox)_embed\.(.*)", r"transformer.enc_out_\1_embed.\2"),
    (r"decoder\.(class|bbox)_embed\.(.*)", r"\1_embed.0.\2"),
    *_PROPOSALS,
)
_OBJECTS = ((r"proposals\.(class|bbox)_embed\.(.*)", r"\1_embed.3.\2"), *_PROPOSALS)  # after those of three layers
BACK = {
    "dn-detr": (*_ONE_LEVEL, *_DENSE, *_BACK),
    "dn-deformable-encoder-patterns": (*_LEVELS, *_GATED, *_BACK),
    "dn-deformable-detr": (*_LEVELS, *_BACK),
    "dino": (*_LEVELS, *_SELECTED, *_BACK),
    "two-stage": (*_LEVELS, *_OBJECTS, *_BACK),
}


def randomised(name, classes, seed=0, **changes):
    """A detector in which no tensor, norm statistics and zero-initialised heads included, is a default."""
    torch.manual_seed(seed)
    model = build_model(replace(detectors.CONFIGS[name], **changes), classes)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor).abs() * 0.05)
    return model.eval()


def propose_only(model, rows):
    """No proposal is selected for a class of another row: fewer classes then select the same ones."""
    if model.proposals is not None and not model.proposals.objects:
        bias = model.proposals.class_embed.bias.data
        others = torch.ones(len(bias), dtype=torch.bool)
        others[rows] = False
        bias[others] = -1e4


def official(model, name) -> dict:
    """The model's weights under the names of the official code; a head of all layers as its twelve aliases."""
    state = {}
    for ours, value in model.state_dict().items():
        pattern, theirs = next(entry for entry in BACK[name] if re.fullmatch(entry[0], ours))
        state[re.sub(f"^{pattern}$", theirs, ours)] = value.clone()
    if name == "dino":
        layers = len(model.decoder.layers)
        for head, value in [entry for entry in state.items() if re.match(r"(class|bbox)_embed\.0", entry[0])]:
            for layer in range(layers):
                alias = head.replace("_embed.0.", f"_embed.{layer}.")
                state[alias] = state[f"transformer.decoder.{alias}"] = value
    assert fit_heads(from_official(state), model.state_dict()).keys() == model.state_dict().keys()
    return state
