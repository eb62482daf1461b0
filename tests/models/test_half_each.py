"""Several linear layers of half precision on one input: each layer's results, and gradients added within products."""

import pytest
import torch
from operations import Operations
from torch import nn

from dndetr.models import deformable_decoder, features
from dndetr.models import linear as module
from dndetr.models.deformable_decoder import DeformableDecoder
from dndetr.models.linear import Linear, linear_each
from dndetr.ops.group_attention import GroupLayout
from dndetr.ops.ms_deform_attn import valid_pixels

SHAPES = [(2, 35, 24), (24,), (1, 24), (2, 0, 24)]


def made(shape=(2, 35, 24), outputs=(16, 40, 24)):
    torch.manual_seed(0)
    x = torch.randn(shape).bfloat16().requires_grad_()
    return x, [Linear(shape[-1], width).bfloat16() for width in outputs]


def leaves_of(x, layers):
    return [x, *(parameter for layer in layers for parameter in (layer.weight, layer.bias))]


@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_are_those_of_each(half_on_a_cpu, shape, used):
    """Those of x are as close to float64: what is added is rounded less often."""
    x, layers = made(shape)
    leaves = leaves_of(x, layers)
    outcomes = []
    for way in (linear_each, lambda x, layers: [layer(x) for layer in layers]):
        results = way(x, layers)
        weighting = [torch.linspace(-1, 2, result.numel()).view(result.shape).to(x.dtype) for result in results]
        given = [results[i] for i in used], leaves, [weighting[i] for i in used]
        outcomes.append([*results, *torch.autograd.grad(*given, allow_unused=True)])
    count = len(layers)
    for place, (found, expected) in enumerate(zip(*outcomes, strict=True)):
        assert (found is None) == (expected is None)
        if found is not None and place != count:
            assert torch.equal(found, expected)
    exact = sum(weighting[i].double() @ layers[i].weight.double() for i in used)
    errors = [(outcome[count].double() - exact).abs().sum() for outcome in outcomes]
    assert errors[0] <= 1.5 * errors[1] and outcomes[0][count].dtype == x.dtype


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias")], ids=str)
def test_only_wanted_gradients_are_made(half_on_a_cpu, wanted):
    x, layers = made()
    x.requires_grad_("x" in wanted)
    for layer in layers:
        layer.weight.requires_grad_("weight" in wanted), layer.bias.requires_grad_("bias" in wanted)
    leaves = [leaf for leaf in leaves_of(x, layers) if leaf.requires_grad]
    results = linear_each(x, layers)
    weighting = [torch.ones_like(result) for result in results]
    with Operations() as counted:
        grads = torch.autograd.grad(results, leaves, weighting)
    # A product or a sum for each, and nothing that adds.
    assert counted.count == 3 * len(wanted) and all(grad is not None for grad in grads)


def test_gradients_of_any_strides_and_what_is_not_a_number(half_on_a_cpu):
    x, layers = made((3, 5, 24))
    results = linear_each(x, layers)
    spread = [torch.ones(1, 1, 1, dtype=x.dtype).expand_as(result) for result in results]
    dense = [torch.ones_like(result) for result in results]
    given = results, leaves_of(x, layers)
    found, expected = (torch.autograd.grad(*given, each, retain_graph=True) for each in (spread, dense))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    dense[1][2, 4, 7] = float("nan")
    grad_x, *_ = torch.autograd.grad(*given, dense, retain_graph=True)
    assert grad_x.isnan().any(-1).nonzero().tolist() == [[2, 4]]
    (grad,) = torch.autograd.grad(results[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("change", ["hook", "bias", "float32", "no gradients"])
def test_what_is_more_than_products_is_called(half_on_a_cpu, monkeypatch, change):
    x, layers = made()
    together = []
    monkeypatch.setattr(module._HalfEach, "apply", lambda *given: together.append(given))
    seen = []
    if change == "hook":
        layers[1].register_forward_hook(lambda *_: seen.append(1))
    elif change == "bias":
        layers[1].bias = None
    elif change == "float32":
        x, layers = x.float(), [layer.float() for layer in layers]
    with torch.set_grad_enabled(change != "no gradients"):
        found, expected = linear_each(x, layers), [layer(x) for layer in layers]
    assert not together and len(seen) == 2 * (change == "hook")
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("change", ["nothing", "recomputed", "hook"])
def test_a_deformable_decoder_projects_tokens_for_all_layers_at_once(half_on_a_cpu, monkeypatch, change):
    torch.manual_seed(0)
    shapes, layout = ((4, 5), (2, 3)), GroupLayout(0, 0, 7)
    decoder = DeformableDecoder(32, 2, 3, 48, 5, 2, 2)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    sizes = torch.tensor(shapes).expand(2, -1, -1)
    tokens = torch.randn(2, 26, 32).bfloat16().requires_grad_()
    whole = {"centres": torch.zeros(2, 26, 2), "ratios": torch.ones(2, 2, 2)}
    given = features.Features(tokens, None, shapes, sizes, valid_pixels(sizes, shapes), **whole)
    content, anchors = torch.randn(2, 7, 32), torch.randn(2, 7, 4)
    calls, own = [], deformable_decoder.linear_each
    monkeypatch.setattr(deformable_decoder, "linear_each", lambda *each: calls.append(each) or own(*each))
    seen = []

    def outcome():
        with torch.autocast("cpu", torch.bfloat16):
            logits, boxes = decoder(content, anchors, given, layout, None)
        return *logits, *boxes, torch.autograd.grad(sum(each.float().square().sum() for each in logits), tokens)[0]

    together = outcome()
    assert [len(layers) for _, layers in calls] == [3]
    calls.clear()
    if change == "recomputed":
        decoder.layers[1].recomputed = True
    elif change == "hook":
        decoder.layers[1].cross_attn.register_forward_hook(lambda *_: seen.append(1))
    else:
        monkeypatch.setattr(deformable_decoder, "is_watched", lambda _: True)
    *apart, grad = outcome()
    assert not calls and bool(seen) == (change == "hook")
    assert all(torch.equal(*pair) for pair in zip(together[:-1], apart, strict=True))
    torch.testing.assert_close(together[-1], grad, rtol=5e-2, atol=5e-2 * grad.abs().max().item())


def test_layers_beside_each_other_are_one_product(half_on_a_cpu, monkeypatch):
    torch.manual_seed(0)
    layers = [module.Linear(16, width).bfloat16() for width in (24, 12)]
    x = torch.randn(2, 9, 16).bfloat16().requires_grad_()
    weighting = torch.randn(2, 9, 36).bfloat16()
    leaves = [x, *(parameter for layer in layers for parameter in layer.parameters())]
    calls, own = [], module.linear
    monkeypatch.setattr(module, "linear", lambda *args: calls.append(args) or own(*args))
    out = module.parallel_linear(x, *layers)
    assert len(calls) == 1
    expected = torch.cat([torch.nn.functional.linear(x, layer.weight, layer.bias) for layer in layers], dim=-1)
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    grads = (torch.autograd.grad(result, leaves, weighting) for result in (out, expected))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=5e-2)
    layers[1].register_forward_hook(lambda layer, args, result: result + 1)
    hooked = module.parallel_linear(x, *layers)
    torch.testing.assert_close(hooked[..., 24:], expected[..., 24:] + 1, rtol=1e-2, atol=2e-2)
