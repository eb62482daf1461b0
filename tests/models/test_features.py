"""From maps to tokens: what is computed for nobody, and in what precision."""

from dataclasses import replace

import detectors
import pytest
import torch
from operations import Operations
from torch import nn

from dndetr.models import encoder as encoders
from dndetr.models.build import build_model
from dndetr.models.features import GroupNorm, PositionGradient, level_valid_sizes, places_of_tokens, sides_on_device
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shapes", [((5, 7),), ((25, 40), (13, 20), (7, 10), (4, 5)), ((1, 3), (6, 1), (2, 2))], ids=str
)
def test_places_of_tokens_are_those_of_each_level(shapes, dtype):
    canvas, sizes = (200, 320), torch.tensor([[200, 320], [1, 1], [133, 7], [64, 319]])
    valid_sizes = level_valid_sizes(sizes, *sides_on_device((canvas, *shapes), "cpu").split((1, len(shapes))))
    valid, centres = places_of_tokens(valid_sizes, shapes, dtype)
    for level, (h, w) in enumerate(shapes):
        picked = [torch.arange(side) * whole // side for side, whole in zip((h, w), canvas, strict=True)]
        counted = [(places < sizes[:, axis, None]).sum(1) for axis, places in enumerate(picked)]
        assert torch.equal(valid_sizes[:, level], torch.stack(counted, dim=-1))
        (start, end), size = (sum(h * w for h, w in shapes[:n]) for n in (level, level + 1)), valid_sizes[:, level]
        row, column = torch.arange(h, dtype=dtype) + 0.5, torch.arange(w, dtype=dtype) + 0.5
        y = (row / size[:, :1].to(dtype))[:, :, None].expand(-1, h, w)
        x = (column / size[:, 1:].to(dtype))[:, None].expand(-1, h, w)
        assert torch.equal(centres[:, start:end], torch.stack((x, y), dim=-1).flatten(1, 2))
        assert torch.equal(valid[:, start:end], ((y < 1) & (x < 1)).flatten(1))


@pytest.mark.parametrize("variant", list(detectors.CONFIGS))
def test_valid_ratios_and_centres_are_for_several_scales(variant):
    found = features(**vars(detectors.CONFIGS[variant]))
    if detectors.CONFIGS[variant].variant == "dn-detr":
        assert found.centres is None and found.ratios is None
        return
    for level, (h, w) in enumerate(found.shapes):
        expected = torch.stack((found.valid_sizes[:, level, 1] / w, found.valid_sizes[:, level, 0] / h), dim=-1)
        assert torch.equal(found.valid_ratios(torch.float32)[:, level], expected)
    assert found.centres.shape == (*found.valid.shape, 2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_level_embeddings_have_the_gradient_of_all_positions(monkeypatch, layers, checkpointing):
    changes = {"encoder_layers": layers, "checkpointing": checkpointing}
    torch.manual_seed(0)
    model = build_model(replace(detectors.CONFIGS["dn-deformable-detr"], **changes), detectors.CLASSES).double()
    batch = detectors.make_batch([3, 5], 8)
    canvas = batch.canvas

    def outcome(plain):
        monkeypatch.setattr(encoders, "half_precision", lambda *_: None if plain else torch.float16)
        found = model.projection(model.backbone(images_of(batch).double()), batch.sizes, canvas)
        tokens = model.encoder(found).tokens
        parameters = [*model.projection.parameters(), *model.encoder.parameters()]
        weighting = torch.linspace(-1, 1, tokens.numel(), dtype=tokens.dtype).view_as(tokens)
        return tokens, *torch.autograd.grad(tokens, parameters, weighting)

    for found, expected in zip(outcome(False), outcome(True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_position_has_no_gradient_as_large_as_the_tokens():
    torch.manual_seed(0)
    x, embedding = (torch.randn(*size, requires_grad=True) for size in ((2, 6, 4), (2, 4)))
    weighting = torch.randn(2, 6, 4)
    out = PositionGradient.apply(x, embedding, ((2, 2), (1, 2)))
    assert torch.equal(out, x)
    grads = torch.autograd.grad(out, (x, embedding), weighting)
    assert torch.equal(grads[0], weighting)
    torch.testing.assert_close(grads[1], torch.stack([weighting[:, :4].sum((0, 1)), weighting[:, 4:].sum((0, 1))]))
    frozen = PositionGradient.apply(x, embedding.detach(), ((2, 2), (1, 2)))
    with Operations() as counted:
        assert torch.autograd.grad(frozen, x, weighting)[0] is weighting
    assert counted.count == 0
