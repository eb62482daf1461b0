"""Several linear layers of half precision at once, with an activation between each two, and feed-forward blocks."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from operations import Operations
from torch.utils.checkpoint import checkpoint

from dndetr.models import linear as module
from dndetr.models.layers import FeedForward, Stream
from dndetr.models.linear import Linear, linear_layers
from dndetr.ops import _backend

ACTIVATIONS = ("relu", "prelu")
WANTED = [
    tuple(name in wanted for name in "xwbWBs") for wanted in ("xwbWBs", "x", "w", "b", "W", "B", "s", "WB", "xB", "wW")
]


def check_layers(device, dtype, activation, wanted=WANTED[0], widths=(24, 40, 32)):
    """Several layers at once are what they are one after the other, with their gradients, to the last bit."""
    torch.manual_seed(0)
    layers = [Linear(a, b).to(device, dtype) for a, b in itertools.pairwise(widths)]
    slope = torch.full((1,), 0.25, device=device) if activation == "prelu" else None
    x = torch.randn(2, 35, widths[0], device=device).to(dtype)
    leaves = [x, *(parameter for layer in layers for parameter in (layer.weight, layer.bias))]
    leaves += [slope] * (slope is not None)
    for leaf, wants in zip(leaves, itertools.chain(wanted, itertools.repeat(True)), strict=False):
        leaf.requires_grad_(wants)
    leaves = [leaf for leaf in leaves if leaf.requires_grad]

    def apart():
        hidden = x
        for layer in layers[:-1]:
            hidden = layer(hidden, relu=slope is None, slope=slope)
        return layers[-1](hidden)

    weighting = None
    outcomes = []
    for way in (lambda: linear_layers(x, layers, slope), apart):
        out = way()
        weighting = torch.randn_like(out) if weighting is None else weighting
        outcomes.append([out, *(torch.autograd.grad(out, leaves, weighting) if leaves else ())])
    for found, expected in zip(*outcomes, strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_several_layers_are_each_of_them(half_on_a_cpu, activation, wanted):
    check_layers("cpu", torch.bfloat16, activation, wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_number_of_layers_may_follow_each_other(half_on_a_cpu, activation):
    for widths in ((24, 40, 32, 4), (24, 40, 32, 16, 1)):
        check_layers("cpu", torch.bfloat16, activation, WANTED[0], widths)
    check_layers("cpu", torch.bfloat16, "relu", WANTED[0], (24, 40))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_gradients_nothing_is_kept(half_on_a_cpu, monkeypatch, activation):
    kept, own = [], module.activated_product
    monkeypatch.setattr(module, "activated_product", lambda *given: kept.append(given[4]) or own(*given))
    layers, slope = [Linear(24, 40).bfloat16(), Linear(40, 16).bfloat16()], torch.full((1,), 0.25)
    x = torch.randn(5, 24).bfloat16()
    given = x, layers, slope if activation == "prelu" else None
    with torch.no_grad():
        out = linear_layers(*given)
    assert kept == [False] and not out.requires_grad
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda x: x):
        assert torch.equal(linear_layers(*given), out)
    assert kept == [False, True] and torch.Size([5, 40]) in saved


def test_several_layers_are_differentiable_once(half_on_a_cpu):
    layers, x = [Linear(24, 40).bfloat16(), Linear(40, 16).bfloat16()], torch.randn(5, 24).bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(linear_layers(x, layers).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_several_layers_hide_no_nan(half_on_a_cpu, activation):
    layers, x = [Linear(24, 40).bfloat16(), Linear(40, 16).bfloat16()], torch.randn(64, 24).bfloat16()
    x[3, 5] = float("nan")
    out = linear_layers(x, layers, torch.zeros(1) if activation == "prelu" else None)
    assert out.isnan().any(-1).nonzero().tolist() == [[3]]


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)


def replaced(layer):
    own = layer.forward
    layer.forward = lambda *given, **named: own(*given, **named)


def without_bias(layer):
    layer.bias = None


class Another(Linear):
    """Whose forward may do anything."""


@pytest.mark.parametrize("change", [hooked, replaced, without_bias, lambda layer: setattr(layer, "__class__", Another)])
def test_layers_that_are_more_than_a_product_are_called(half_on_a_cpu, monkeypatch, change):
    layers, x = [Linear(24, 40).bfloat16(), Linear(40, 16).bfloat16()], torch.randn(5, 24).bfloat16()
    together, own = [], module._half_layers
    monkeypatch.setattr(module, "_half_layers", lambda *given: together.append(len(given)) or own(*given))
    expected = linear_layers(x, layers)
    assert together == [7]
    change(layers[1])
    together.clear()
    found = linear_layers(x, layers)
    assert 7 not in together and found.shape == expected.shape
    assert change is without_bias or torch.equal(found, expected)


def test_a_feed_forward_block_has_no_pass_of_its_own_for_an_activation(fake_cuda, monkeypatch):
    """Forward two products are left, backward four and the sums for the last bias."""
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    x, grad = torch.empty(70, 24, **half), torch.empty(70, 24, **half)
    parameters = [torch.empty(size, **half) for size in ((40, 24), (40,), (24, 40), (24,))]

    def counted(backend):
        choices = {"activated_product": backend, "column_sums": "triton"}
        monkeypatch.setattr(_backend, "choose", lambda op, *_: (choices[op], "for this test"))
        with Operations() as forward:
            _, inputs, kept = module._through(x, 1, None, parameters, True)
        saved = None, *inputs, *parameters[::2], *kept
        ctx = SimpleNamespace(saved_tensors=saved, layers=2, needs_input_grad=(True, False, False, *[True] * 4))
        with Operations() as backward:
            module._HalfLayers.backward.__wrapped__(ctx, grad)
        return forward.count, backward.count

    assert counted("triton") == (2, 5) and counted("reference") == (3, 6)


def test_feed_forward_blocks_take_it(half_on_a_cpu, monkeypatch):
    calls, own = [], module.activated_product_backward
    monkeypatch.setattr(module, "activated_product_backward", lambda *given: calls.append(given) or own(*given))
    check_feed_forward("cpu")
    assert len(calls) == 2


def check_feed_forward(device):
    """The block has the gradients that it has without the kernels, also where it is computed again."""
    torch.manual_seed(0)
    block = FeedForward(32, 64, "prelu").to(device, torch.bfloat16)
    block.activation.float()
    assert "activation.weight" in block.state_dict()
    x = torch.randn(2, 9, 32, device=device).bfloat16().requires_grad_()
    weighting = torch.randn_like(x)

    def outcome(called):
        return torch.autograd.grad(called(x), (x, *block.parameters()), weighting)

    def ours(x):
        return block(Stream.of(x)).full

    def plain(x):
        hidden = F.prelu(block.linear1(x), block.activation.weight.bfloat16())
        return block.norm(Stream.of(x), block.linear2(hidden)).full

    found, expected = outcome(ours), outcome(plain)
    again = outcome(lambda x: checkpoint(ours, x, use_reentrant=False))
    for a, b, c in zip(found, expected, again, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, c)
        torch.testing.assert_close(a, b, rtol=5e-2, atol=2e-2 * b.abs().max().item())


@pytest.mark.gpu
def test_feed_forward_blocks_take_it_on_a_gpu():
    check_feed_forward("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_several_layers_are_each_of_them_on_a_gpu(dtype, activation, wanted, monkeypatch, fresh_backends):
    """In two steps: the kernels' own results are those of ops' tests."""
    monkeypatch.setenv("DNDETR_BACKEND_ACTIVATED_PRODUCT", "reference")
    check_layers("cuda", dtype, activation, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_feed_forward_blocks_on_a_gpu_are_as_precise_as_in_two_steps(dtype, activation, monkeypatch, fresh_backends):
    torch.manual_seed(0)
    block = FeedForward(256, 2048, activation).cuda()
    x = torch.randn(2, 500, 256, device="cuda", requires_grad=True)
    weighting = torch.randn_like(x)

    def outcome(block, x, weighting, autocast=True):
        with torch.autocast("cuda", dtype, autocast):
            out = block(Stream.of(x)).full
        return [out, *torch.autograd.grad(out, (x, *block.parameters()), weighting)]

    exact = outcome(copy.deepcopy(block).double(), x.double(), weighting.double(), False)
    found = outcome(block, x, weighting)
    monkeypatch.setenv("DNDETR_BACKEND_ACTIVATED_PRODUCT", "reference")
    _backend.forget()
    for a, b, truth in zip(found, outcome(block, x, weighting), exact, strict=True):
        error, theirs = ((each.double() - truth).norm() for each in (a, b))
        chance = 5e-2 if truth.numel() == 1 else 1e-6  # rounding errors of a slope's gradient are one number
        assert error <= 1.2 * theirs + chance * truth.norm()
