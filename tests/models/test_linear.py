"""Linear layers: float32 products against torch's own in float64, and ReLUs that follow at once."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dndetr.models import linear as module
from dndetr.models.linear import Linear, linear

SHAPES = {"tokens": (2, 70, 24), "one-row": (24,), "nobody": (2, 0, 24), "wide-batch": (3, 2, 5, 24)}
onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def gradients(function, x, weight, bias):
    leaves = [value if value is None else value.detach().requires_grad_() for value in (x, weight, bias)]
    out = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    weighting = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out)
    return [out, *torch.autograd.grad(out, wanted, weighting)]


@onednn
@pytest.mark.parametrize("outputs", [4, 16, 40])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_the_sum_of_products(shape, with_bias, outputs):
    torch.manual_seed(0)
    x, weight = torch.randn(SHAPES[shape]), torch.randn(outputs, 24)
    bias = torch.randn(outputs) if with_bias else None
    found = gradients(linear, x, weight, bias)
    expected = gradients(F.linear, x.double(), weight.double(), bias if bias is None else bias.double())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@onednn
def test_any_strides_are_read_in_place():
    torch.manual_seed(0)
    x, weight = torch.randn(24, 7, 3).permute(2, 1, 0), torch.randn(24, 40).t()
    for a, b in zip(
        gradients(linear, x, weight, None), gradients(F.linear, x.double(), weight.double(), None), strict=True
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@onednn
def test_the_result_can_be_changed_in_place():
    """As Deformable DETR of transformers does with the corrections of boxes."""
    layer, x = Linear(16, 20), torch.randn(2, 3, 16)
    out = layer(x)
    out[..., :2] = out[..., :2] + 1
    out.sum().backward()
    assert layer.bias.grad.tolist() == [6] * 20


@onednn
def test_nan_spreads_to_its_row_alone():
    x, weight = torch.ones(4, 16), torch.ones(16, 16)
    x[2, 5] = float("nan")
    assert linear(x, weight).isnan().any(-1).tolist() == [False, False, True, False]


@onednn
def test_only_float32_outside_autocast_and_export_is_ours(monkeypatch):
    calls = []
    own = module._product
    monkeypatch.setattr(module, "_product", lambda *args: calls.append(args) or own(*args))
    layer, x = Linear(16, 16), torch.randn(2, 16)
    layer(x)
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.double()(x.double())
    exported = torch.export.export(Linear(16, 16), (x,))
    assert any("linear" in str(node.target) for node in exported.graph.nodes)
    assert len(calls) == 1
    torch.autograd.gradcheck(layer, x.double().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_relu_may_follow_at_once(shape, with_bias, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(SHAPES[shape], dtype=dtype), torch.randn(40, 24, dtype=dtype)
    bias = torch.randn(40, dtype=dtype) if with_bias else None
    found = gradients(lambda *given: linear(*given, relu=True), x, weight, bias)
    expected = gradients(lambda *given: linear(*given).relu(), x, weight, bias)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_relu_hides_no_nan():
    x = torch.full((2, 16), float("nan"))
    for dtype in (torch.float32, torch.float64):
        assert linear(x.to(dtype), torch.ones(16, 16, dtype=dtype), relu=True).isnan().all()


class Copies(TorchDispatchMode):
    """Counts operations that only move numbers."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.clone, torch.ops.aten.new_zeros):
            self.seen.append(function)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_relu_costs_no_copies_backwards(dtype):
    """As changing a view in place does."""
    layer, x = Linear(16, 20).to(dtype), torch.randn(2, 3, 16, dtype=dtype, requires_grad=True)
    weighting = torch.randn(2, 3, 20, dtype=dtype)
    with Copies() as plain:
        layer(x).relu_().backward(weighting)
    with Copies() as copies:
        layer(x, relu=True).backward(weighting)
    assert plain.seen and not copies.seen


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_wanted_gradients_are_computed(wanted, monkeypatch):
    calls, own = [], module.weight_gradients
    monkeypatch.setattr(module, "weight_gradients", lambda *given: calls.append(given) or own(*given))
    leaves = [torch.randn(*size, requires_grad=i in wanted) for i, size in enumerate(((5, 24), (40, 24), (40,)))]
    linear(*leaves, relu=True).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [i in wanted for i in range(3)]
    assert len(calls) == (1 in wanted)


@pytest.fixture
def half_on_a_cpu(monkeypatch):
    """Half-precision layers with a bias take a GPU's way here."""

    def half(x, weight):
        return x.dtype if x.dtype == torch.bfloat16 and x.numel() else None

    monkeypatch.setattr(module, "half_precision", half)


SUBSETS = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]


def check_half(x, weight, bias, relu, wanted=(0, 1, 2), spread=None):
    """Result and wanted gradients within bfloat16's rounding of float64 with the same ReLU's mask."""
    leaves = [value.detach().requires_grad_(i in wanted) for i, value in enumerate((x, weight, bias))]
    out = linear(*leaves, relu=relu)
    exact = [value.detach().double().requires_grad_(i in wanted) for i, value in enumerate((x, weight, bias))]
    plain = F.linear(*exact)
    expected = plain.relu() if relu else plain
    assert out.dtype == x.dtype and out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    grad = torch.randn_like(out) if spread is None else spread(torch.randn_like(out))
    found = torch.autograd.grad(out, [leaves[i] for i in wanted], grad)
    masked = grad.double().where(out.double() > 0, 0.0) if relu else grad.double()
    for a, b in zip(found, torch.autograd.grad(plain, [exact[i] for i in wanted], masked), strict=True):
        assert a.dtype == x.dtype
        torch.testing.assert_close(
            a.double(), b, rtol=2e-2, atol=2e-2 * max(b.abs().max().item(), 1) if b.numel() else 0
        )


def half_inputs(shape, outputs=40, device="cpu", dtype=torch.bfloat16):
    torch.manual_seed(0)
    sizes = (shape, (outputs, 24), (outputs,))
    return [torch.randn(*size, device=device).to(dtype) for size in sizes]


@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
@pytest.mark.parametrize("relu", [True, False])
def test_half_precision(half_on_a_cpu, relu, wanted):
    check_half(*half_inputs((2, 70, 24)), relu, wanted)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_of_any_shape(half_on_a_cpu, shape, relu):
    check_half(*half_inputs(SHAPES[shape]), relu)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    "spread", [lambda g: g[:1, :1].expand_as(g), lambda g: g.transpose(0, 1).contiguous().transpose(0, 1)]
)
def test_half_precision_takes_gradients_of_any_strides(half_on_a_cpu, spread, relu):
    check_half(*half_inputs((5, 7, 24)), relu, spread=spread)


def test_half_precision_behind_a_relu_hides_no_nan(half_on_a_cpu):
    x, weight, bias = half_inputs((64, 24))
    x[3, 5] = float("nan")
    assert linear(x, weight, bias, relu=True).isnan().any(-1).nonzero().tolist() == [[3]]


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


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", [(2, 70, 24), (24,), (2, 0, 24), (5000, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu(dtype, shape, relu, wanted):
    for outputs in (4, 40, 256):
        check_half(*half_inputs(shape, outputs, "cuda", dtype), relu, wanted)


@pytest.mark.gpu
def test_autocast_on_a_gpu_gives_gradients_of_the_leaves():
    x, weight, bias = half_inputs((2, 70, 24), device="cuda", dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        found = gradients(lambda *given: linear(*given, relu=True), x, weight, bias)
        expected = gradients(lambda *given: F.linear(*given).relu(), x, weight, bias)
    assert [a.dtype for a in found] == [torch.bfloat16, *[torch.float32] * 3]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_relu_on_a_gpu_hides_no_nan(dtype):
    x, weight, bias = half_inputs((64, 24), device="cuda", dtype=dtype)
    x[3, 5] = float("nan")
    assert linear(x, weight, bias, relu=True).isnan().any(-1).nonzero().tolist() == [[3]]
