"""Linear layers in half precision on a GPU, and activations that follow at once: against float64."""

import pytest
import torch
import torch.nn.functional as F

from dndetr.models import linear as module
from dndetr.models.linear import linear

SHAPES = [(2, 70, 24), (24,), (2, 0, 24), (3, 2, 5, 24)]
SUBSETS = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
WITH_SLOPE = [(3,), (0, 3), (1, 2), (0, 1, 2), (0, 1, 2, 3)]
SPREADS = [lambda g: g[:1, :1].expand_as(g), lambda g: g.transpose(0, 1).contiguous().transpose(0, 1)]


def check_half(x, weight, bias, relu, wanted=(0, 1, 2), spread=None, slope=None):
    """Result and wanted gradients within bfloat16's rounding of float64 with the same activation's mask."""
    given = [x, weight, bias] if slope is None else [x, weight, bias, slope]
    leaves = [value.detach().requires_grad_(i in wanted) for i, value in enumerate(given)]
    out = linear(*leaves[:3], relu, *leaves[3:])
    exact = [value.detach().double().requires_grad_(i in wanted) for i, value in enumerate(given)]
    plain = F.linear(*exact[:3])
    below = plain * exact[3] if slope is not None else plain * (0 if relu else 1)
    expected = torch.where(linear(x, weight, bias) > 0, plain, below)
    assert out.dtype == x.dtype and out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    grad = torch.randn_like(out) if spread is None else spread(torch.randn_like(out))
    found = torch.autograd.grad(out, [leaves[i] for i in wanted], grad)
    precise = torch.autograd.grad(expected, [exact[i] for i in wanted], grad.double())
    for i, a, b in zip(wanted, found, precise, strict=True):
        assert a.dtype == given[i].dtype and a.shape == b.shape
        atol = 2e-2 * max(b.abs().max().item(), 1) if b.numel() else 0
        if i == 3:  # a sum over all numbers, which may be small
            atol = 1e-4 * (grad.double() * plain).abs().sum().item()
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=atol)


def half_inputs(shape, outputs=40, device="cpu", dtype=torch.bfloat16):
    torch.manual_seed(0)
    sizes = (shape, (outputs, 24), (outputs,))
    return [torch.randn(*size, device=device).to(dtype) for size in sizes]


@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
@pytest.mark.parametrize("relu", [True, False])
def test_half_precision(half_on_a_cpu, relu, wanted):
    check_half(*half_inputs((2, 70, 24)), relu, wanted)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_precision_of_any_shape(half_on_a_cpu, shape, relu):
    check_half(*half_inputs(shape), relu)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("spread", SPREADS)
def test_half_precision_takes_gradients_of_any_strides(half_on_a_cpu, spread, relu):
    check_half(*half_inputs((5, 7, 24)), relu, spread=spread)


def test_half_precision_behind_a_relu_hides_no_nan(half_on_a_cpu):
    x, weight, bias = half_inputs((64, 24))
    x[3, 5] = float("nan")
    assert linear(x, weight, bias, relu=True).isnan().any(-1).nonzero().tolist() == [[3]]


@pytest.mark.parametrize("wanted", WITH_SLOPE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_before_a_prelu(half_on_a_cpu, dtype, wanted):
    for slope in (0.25, 0.0, -0.5, 3.0):
        check_half(*half_inputs((2, 70, 24)), False, wanted, slope=torch.full((1,), slope, dtype=dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_precision_of_any_shape_before_a_prelu(half_on_a_cpu, shape):
    check_half(*half_inputs(shape), False, WITH_SLOPE[-1], slope=torch.full((1,), 0.25, dtype=torch.bfloat16))


@pytest.mark.parametrize("spread", SPREADS)
def test_a_prelu_takes_gradients_of_any_strides(half_on_a_cpu, spread):
    check_half(*half_inputs((5, 7, 24)), False, WITH_SLOPE[-1], spread, torch.full((1,), 0.25))


def test_half_precision_before_a_prelu_hides_no_nan(half_on_a_cpu):
    x, weight, bias = half_inputs((64, 24))
    x[3, 5] = float("nan")
    assert linear(x, weight, bias, slope=torch.zeros(1)).isnan().any(-1).nonzero().tolist() == [[3]]


def test_half_precision_before_a_prelu_is_differentiable_once(half_on_a_cpu):
    x, weight, bias = (value.requires_grad_() for value in half_inputs((5, 24)))
    out = linear(x, weight, bias, slope=torch.ones(1, requires_grad=True))
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_half_precision_falls_to_torch_without_bias(half_on_a_cpu):
    x, weight, _ = half_inputs((5, 24))
    assert torch.equal(linear(x, weight, relu=True), F.linear(x, weight).relu())


def test_half_precision_is_what_autocast_multiplies_in(fake_cuda, monkeypatch):
    def half(x, weight):
        tensors = (torch.empty(3, 4, dtype=dtype, device="cuda") for dtype in (x, weight))
        return module.half_precision(*tensors)

    full, double, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    assert half(bf16, bf16) == bf16 and half(f16, f16) == f16
    assert half(full, full) is half(full, bf16) is half(double, double) is None
    # torch.autocast itself asks for a GPU.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: bf16)
    assert half(full, full) == half(f16, full) == half(bf16, bf16) == bf16
    assert half(double, double) is half(double, full) is None
    assert module.half_precision(torch.empty(3, 4, dtype=bf16), torch.empty(2, 4, dtype=bf16)) is None
    for relu in (True, False):
        out = linear(*(torch.empty(*size, device="cuda") for size in ((2, 3, 4), (5, 4), (5,))), relu)
        assert out.shape == (2, 3, 5) and out.dtype == bf16
    slope = torch.empty(1, device="cuda")
    out = linear(*(torch.empty(*size, device="cuda") for size in ((2, 3, 4), (5, 4), (5,))), slope=slope)
    assert out.shape == (2, 3, 5) and out.dtype == bf16


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", [(2, 70, 24), (24,), (2, 0, 24), (5000, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu(dtype, shape, relu, wanted):
    for outputs in (4, 40, 256):
        check_half(*half_inputs(shape, outputs, "cuda", dtype), relu, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", WITH_SLOPE, ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 24), (24,), (2, 0, 24), (5000, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_before_a_prelu_on_a_gpu(dtype, shape, wanted):
    for outputs, kind in ((4, torch.float32), (40, dtype), (256, torch.float32)):
        # Without autocast torch, which takes what is empty, wants one dtype.
        slope = torch.full((1,), 0.25, device="cuda", dtype=dtype if 0 in shape else kind)
        check_half(*half_inputs(shape, outputs, "cuda", dtype), False, wanted, slope=slope)


@pytest.mark.gpu
def test_a_prelu_on_a_gpu_replays_in_a_graph():
    leaves = [value.requires_grad_() for value in half_inputs((5000, 24), device="cuda")]
    leaves.append(torch.full((1,), 0.25, device="cuda").requires_grad_())
    weighting = torch.randn(5000, 40, device="cuda").bfloat16()

    def work():
        out = linear(*leaves[:3], slope=leaves[3])
        return out, *torch.autograd.grad(out, leaves, weighting)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = work()
    with torch.no_grad():
        leaves[0].mul_(-1)
        leaves[3].mul_(2)
    graph.replay()
    for found, expected in zip(captured, work(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_autocast_on_a_gpu_gives_gradients_of_the_leaves():
    x, weight, bias = half_inputs((2, 70, 24), device="cuda", dtype=torch.float32)
    slope = torch.full((1,), 0.25, device="cuda")
    leaves = [value.requires_grad_() for value in (x, weight, bias, slope)]
    weighting = torch.linspace(-1, 1, 2 * 70 * 40, device="cuda").view(2, 70, 40).bfloat16()

    def outcome(out, leaves):
        return [out, *torch.autograd.grad(out, leaves, weighting)]

    with torch.autocast("cuda", torch.bfloat16):
        found = outcome(linear(x, weight, bias, relu=True), leaves[:3])
        expected = outcome(F.linear(x, weight, bias).relu(), leaves[:3])
        found += outcome(linear(x, weight, bias, slope=slope), leaves)
        expected += outcome(F.prelu(F.linear(x, weight, bias), slope), leaves)
    assert [a.dtype for a in found] == [torch.bfloat16, *[torch.float32] * 3, torch.bfloat16, *[torch.float32] * 4]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * max(b.abs().max().item(), 1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_relu_on_a_gpu_hides_no_nan(dtype):
    x, weight, bias = half_inputs((64, 24), device="cuda", dtype=dtype)
    x[3, 5] = float("nan")
    assert linear(x, weight, bias, relu=True).isnan().any(-1).nonzero().tolist() == [[3]]
