"""From maps to tokens: what is computed for nobody, and in what precision."""

from dataclasses import replace

import detectors
import pytest
import torch
from torch import nn

from dndetr.models.build import build_model
from dndetr.models.features import GroupNorm
from dndetr.ops import images_of


def features(**changes):
    """Of the deformable model with these changes to its configuration."""
    torch.manual_seed(0)
    model = build_model(replace(detectors.CONFIGS["dn-deformable-detr"], **changes), detectors.CLASSES)
    batch = detectors.make_batch([3, 5], 8)
    return model.projection(model.backbone(images_of(batch)), batch.sizes, batch.canvas)


def test_positions_are_made_for_those_who_ask():
    whole, tokens = features(), features(encoder_layers=0)
    assert whole.position.shape == whole.tokens.shape
    assert tokens.position is None and tokens.tokens.shape == whole.tokens.shape
    dense_decoder = features(variant="dn-deformable-encoder", encoder_layers=0)
    assert dense_decoder.position.shape == dense_decoder.tokens.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_group_norm_keeps_to_the_precision_of_its_parameters(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 6, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    precise = torch.promote_types(dtype, torch.float32)
    ours, torchs = GroupNorm(4, 8).to(precise), nn.GroupNorm(4, 8).to(precise)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found, expected = ours(x), torchs(x.to(precise).contiguous())
    assert found.dtype == precise
    assert torch.equal(found, expected)
    weighting = torch.randn_like(found)
    assert torch.equal(*(torch.autograd.grad(out, x, weighting)[0] for out in (found, expected)))


def test_group_norm_of_a_map_that_is_mostly_padding():
    """torch's kernel for channels-last maps on a CPU is a hundred times further off."""
    torch.manual_seed(0)
    x = torch.full((1, 64, 40, 400), 3.0)
    x[:, :, :8, :20] += 0.01 * torch.randn(1, 64, 8, 20)
    x = x.contiguous(memory_format=torch.channels_last)
    found, expected = GroupNorm(32, 64)(x), nn.GroupNorm(32, 64).double()(x.double())
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
