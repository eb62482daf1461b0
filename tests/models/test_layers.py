import detectors
import pytest
import torch
import torch.nn.functional as F
from operations import Operations
from torch import nn

from dndetr.models.build import build_model
from dndetr.models.encoder import DenseEncoderLayer
from dndetr.models.layers import FeedForward, Linear, PackedProjections, ResidualNorm, Stream, lowered
from dndetr.ops import _backend, images_of


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
        model(images_of(batch), batch.sizes, step.noised(batch, step.draw(batch)))
    # What a sine encoding is projected by is the encoding's only consumer.
    cast = {path for path, dtype in taken.items() if dtype != torch.bfloat16 and not path.endswith("ca_qpos_sine_proj")}
    assert len(taken) > 20 and not cast


def test_gradients_of_packed_projections_are_put_together_without_zeros():
    packed, (positioned, x) = PackedProjections(16, 2).double(), torch.randn(2, 3, 5, 16, dtype=torch.float64)
    packed.in_proj_bias.data.copy_(torch.randn(48))
    found = packed.project(positioned, x)
    weight, bias = packed.in_proj_weight, packed.in_proj_bias
    values = F.linear(x, weight[32:], bias[32:]).unflatten(-1, (2, 8)).transpose(1, 2)
    expected = F.linear(positioned, weight[:32], bias[:32]), values
    weighting = [torch.randn_like(each) for each in expected]
    parameters = packed.in_proj_weight, packed.in_proj_bias
    with Operations() as counted:
        grads = torch.autograd.grad(found, parameters, weighting)
    for mine, theirs in zip(
        (*found, *grads), (*expected, *torch.autograd.grad(expected, parameters, weighting)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    # Two products and two sums; what puts weights together, and biases.
    assert counted.count == 2 + 2 + 2


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_attention_of_the_dense_encoder_on_a_gpu_is_never_torchs_own(fake_cuda, monkeypatch, backend):
    def refuse(*_, **__):
        raise AssertionError("cuDNN's gradient with a mask can be NaN")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    monkeypatch.setattr(_backend, "choose", lambda *_: (backend, "for this test"))
    layer, x = DenseEncoderLayer(32, 4, 64, "relu"), torch.empty(2, 9, 32, device="cuda")
    parameters = {name: torch.empty(each.shape, device="cuda") for name, each in layer.named_parameters()}
    valid = torch.empty(2, 9, dtype=torch.bool, device="cuda")
    assert torch.func.functional_call(layer, parameters, (Stream.of(x), x, valid)).full.shape == x.shape


class Adapted(torch.nn.Module):
    """A layer with something added to it, as adapters put in its place: it has no weight of its own."""

    def __init__(self, base):
        super().__init__()
        self.base, self.added = base, torch.nn.Linear(base.in_features, base.out_features)

    def forward(self, x, *args, **kwargs):
        return self.base(x, *args, **kwargs) + self.added(x)


@pytest.mark.parametrize("variant", ["dn-detr", "dn-deformable-detr", "dino"])
def test_layers_may_be_replaced_by_what_has_no_weight(variant):
    torch.manual_seed(0)
    model = build_model(detectors.CONFIGS[variant], detectors.CLASSES)
    batch = detectors.make_batch([3, 5], 8)
    plain = model(images_of(batch), batch.sizes)
    linears = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is Linear and not name.endswith("_embed")
    ]
    added = []
    for parent, name in linears:
        replacement = Adapted(getattr(parent, name))
        added += torch.nn.init.zeros_(replacement.added.weight), torch.nn.init.zeros_(replacement.added.bias)
        setattr(parent, name, replacement)
    adapted = model(images_of(batch), batch.sizes)
    torch.testing.assert_close(adapted.boxes, plain.boxes)
    (adapted.boxes.sum() + adapted.logits.square().sum()).backward()
    assert len(added) > 60 and sum(x.grad is not None and bool(x.grad.any()) for x in added) > len(added) / 2
