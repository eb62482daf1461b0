import detectors
import pytest
import torch
import torch.nn.functional as F
from operations import Operations
from torch import nn

from dndetr.models.layers import FeedForward, Linear, PackedProjections, ResidualNorm, Stream, dense_attention, lowered
from dndetr.ops import _backend


def test_without_autocast_the_stream_is_one_tensor():
    x, position = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    stream = Stream.of(x)
    assert stream.full is x and stream.low is x and stream.positioned is None
    assert torch.equal(stream.plus(position), x + position)
    norm = ResidualNorm(16)
    after = norm(stream, x, position)
    expected = nn.LayerNorm.forward(norm, x + x)
    assert torch.equal(after.full, expected) and after.low is after.full
    assert torch.equal(after.positioned, expected + position)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_stream_is_float32_and_what_projections_take_is_not(dtype):
    x, position = torch.randn(2, 5, 16).to(dtype), torch.randn(2, 5, 16)
    block = FeedForward(16, 32, "relu")
    with torch.autocast("cpu", torch.bfloat16):
        before = Stream.of(x)
        after = block(before, position)
        assert torch.equal(after.plus(position), after.positioned)
        assert lowered(position).dtype == torch.bfloat16
    for stream in (before, after):
        assert stream.full.dtype == torch.float32 and stream.low.dtype == torch.bfloat16
        assert torch.equal(stream.low, stream.full.bfloat16())


@pytest.mark.parametrize("name", ["dn-detr", "dn-deformable-detr", "dn-deformable-encoder"])
def test_under_autocast_no_projection_of_a_layer_casts_its_input(name):
    model, batch = detectors.build(name), detectors.make_batch([3, 5], 8)
    step = detectors.make_step(model)
    taken = {}
    for part in ("encoder", "decoder"):
        for path, module in getattr(model, part).layers.named_modules(prefix=part):
            if isinstance(module, Linear):
                module.register_forward_pre_hook(lambda _, inputs, path=path: taken.update({path: inputs[0].dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        model(batch.images, batch.sizes, step.noised(batch, step.draw(batch)))
    # What a sine encoding is projected by is the encoding's only consumer.
    cast = {path for path, dtype in taken.items() if dtype != torch.bfloat16 and not path.endswith("ca_qpos_sine_proj")}
    assert len(taken) > 20 and not cast


def test_gradients_of_packed_projections_are_put_together_without_zeros():
    packed, (positioned, x) = PackedProjections(16, 2).double(), torch.randn(2, 3, 5, 16, dtype=torch.float64)
    bias = torch.randn(48, dtype=torch.float64)
    packed.in_proj_bias.data.copy_(bias)
    found = packed.project(positioned, x)
    given = positioned, positioned, x
    parts = zip(given, packed.in_proj_weight.chunk(3), packed.in_proj_bias.chunk(3), strict=True)
    expected = [F.linear(*part).unflatten(-1, (2, 8)).transpose(1, 2) for part in parts]
    weighting = torch.randn(3, 3, 2, 5, 8, dtype=torch.float64).unbind()
    parameters = packed.in_proj_weight, packed.in_proj_bias
    with Operations() as counted:
        grads = torch.autograd.grad(found, parameters, weighting)
    for mine, theirs in zip(
        (*found, *grads), (*expected, *torch.autograd.grad(expected, parameters, weighting)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    # Heads are laid out as rows, twice for q and k; two products and two sums; what joins q and k, weights and biases.
    assert counted.count == 3 + 2 + 2 + 3


def test_dense_attention_is_torchs_in_numbers():
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64, requires_grad=True).unbind()
    valid = torch.arange(9) < torch.tensor([[9], [5]])
    given, expected = (
        dense_attention(q, k, v, valid),
        F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None]),
    )
    torch.testing.assert_close(given, expected)
    slant = torch.linspace(-1, 1, given.numel(), dtype=torch.float64).view_as(given)
    pairs = zip(*(torch.autograd.grad(out, (q, k, v), slant) for out in (given, expected)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_dense_attention_on_a_gpu_is_never_torchs_own(fake_cuda, monkeypatch, backend):
    def refuse(*_, **__):
        raise AssertionError("cuDNN's gradient with a mask can be NaN")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    monkeypatch.setattr(_backend, "choose", lambda *_: (backend, "for this test"))
    q = torch.empty(2, 4, 9, 8, device="cuda")
    valid = torch.empty(2, 9, dtype=torch.bool, device="cuda")
    assert dense_attention(q, q, q, valid).shape == q.shape
