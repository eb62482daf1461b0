"""PReLU's own gradients, and the feed-forward block, against torch's modules."""

import pytest
import torch
from torch import nn

from dndetr.models.activations import PReLU, activation
from dndetr.models.layers import MLP, FeedForward, Stream


def gradients(module, x):
    x = x.detach().clone().requires_grad_()
    out = module(x)
    weighting = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out)
    return [out, *torch.autograd.grad(out, (x, *module.parameters()), weighting)]


@pytest.mark.parametrize("slope", [0.25, 0.0, -0.5, 3.0])
@pytest.mark.parametrize("shape", [(2, 7, 24), (5,), (0, 4)], ids=str)
def test_prelu_is_torchs(slope, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    x.view(-1)[::3] = 0  # where the two branches meet
    ours, plain = PReLU(init=slope), nn.PReLU(init=slope).double()
    for found, expected in zip(gradients(ours, x), gradients(plain, x.double()), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_prelu_of_any_strides_and_dtype():
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4).permute(2, 0, 1)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        ours, plain = PReLU().to(dtype), nn.PReLU().to(dtype)
        for found, expected in zip(gradients(ours, x.to(dtype)), gradients(plain, x.to(dtype)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)


def test_what_is_not_one_slope_in_float32_is_torchs():
    torch.manual_seed(0)
    several, x = PReLU(5).requires_grad_(False), torch.randn(3, 5, 4, requires_grad=True)
    several.weight.copy_(torch.linspace(0.1, 0.5, 5))
    plain = nn.PReLU(5)
    plain.load_state_dict(several.state_dict())
    given, expected = (torch.autograd.grad(module(x).sum(), x)[0] for module in (several, plain))
    assert torch.equal(given, expected)
    scalar = torch.tensor(-2.0, requires_grad=True)
    PReLU()(scalar).backward()
    assert scalar.grad == 0.25
    with torch.autocast("cpu", torch.bfloat16):
        out = PReLU()(x)
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_prelu_keeps_its_name_in_a_checkpoint_and_exports():
    assert list(PReLU().state_dict()) == list(nn.PReLU().state_dict())
    exported = torch.export.export(PReLU(), (torch.randn(3, 4),))
    assert any("prelu" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["relu", "prelu", "gelu"])
def test_feed_forward_is_its_formula(name, dtype):
    torch.manual_seed(0)
    block = FeedForward(32, 64, name).to(dtype)

    class Formula(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            b = self.block
            hidden = nn.functional.linear(x, b.linear1.weight, b.linear1.bias)
            hidden = {"relu": torch.relu, "gelu": nn.functional.gelu}.get(name, b.activation)(hidden)
            return nn.LayerNorm.forward(b.norm, x + nn.functional.linear(hidden, b.linear2.weight, b.linear2.bias))

    class Full(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block(Stream.of(x)).full

    x = torch.randn(2, 9, 32, dtype=dtype)
    for found, expected in zip(gradients(Full(), x), gradients(Formula(), x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_mlp_has_a_relu_between_its_layers():
    torch.manual_seed(0)
    mlp, x = MLP(32, 48, 16, 4), torch.randn(5, 32)
    plain = nn.Sequential(mlp.layers[0], nn.ReLU(), mlp.layers[1], nn.ReLU(), mlp.layers[2])
    torch.testing.assert_close(mlp(x), plain(x))


def test_unknown_activation_names_the_choices():
    with pytest.raises(ValueError, match="unknown activation 'swish': choose one of relu, prelu, gelu"):
        activation("swish")
