"""Detectors with random weights everywhere, and their weights under the names of the official code."""

import re

import detectors
import torch

from dndetr.models.build import build_model
from dndetr.models.official import official_names

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
BACK = {
    "dn-detr": (*_ONE_LEVEL, *_DENSE, *_BACK),
    "dn-deformable-encoder-patterns": (*_LEVELS, *_GATED, *_BACK),
    "dn-deformable-detr": (*_LEVELS, *_BACK),
}


def randomised(name, classes, seed=0):
    """A detector in which no tensor, norm statistics and zero-initialised heads included, is a default."""
    torch.manual_seed(seed)
    model = build_model(detectors.CONFIGS[name], classes)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor).abs() * 0.05)
    return model.eval()


def official(model, name) -> dict:
    """The model's weights under the names of the official code."""
    state = {}
    for ours, value in model.state_dict().items():
        pattern, theirs = next(entry for entry in BACK[name] if re.fullmatch(entry[0], ours))
        state[re.sub(f"^{pattern}$", theirs, ours)] = value.clone()
    assert list(official_names(state).values()) == list(model.state_dict())
    return state
