"""Linear layers: float32 products against torch's own in float64, and activations that follow at once."""

import re

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dndetr.models import linear as module
from dndetr.models.activations import PReLU
from dndetr.models.layers import MLP
from dndetr.models.linear import Linear, linear, onednn_is_faster

SHAPES = {"tokens": (2, 70, 24), "one-row": (24,), "nobody": (2, 0, 24), "wide-batch": (3, 2, 5, 24)}
onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def _onednn_wherever_it_is(monkeypatch):
    """Whoever made the processor."""
    monkeypatch.setattr(module, "onednn_is_faster", torch.backends.mkldnn.is_available)


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


def traced_by_fx(layer):
    tracer = torch.fx.Tracer()
    tracer.is_leaf_module = lambda *_: False
    return torch.fx.GraphModule(layer, tracer.trace(layer))


def forward_derivative(layer, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.flip(0)))).tangent


TRANSFORMS = {
    "jit-trace": lambda layer, x: torch.jit.trace(layer, x)(x),
    "fx": lambda layer, x: traced_by_fx(layer)(x),
    "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).sin().sum())(x),
    "jacobian": lambda layer, x: torch.func.jacrev(layer)(x),
    "vmap": lambda layer, x: torch.func.vmap(layer)(x),
    "forwards": forward_derivative,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("activation", ["", "relu", "slope"])
def test_whatever_torch_traces_or_transforms_is_torchs(transform, activation):
    torch.manual_seed(0)
    layer, x = Linear(24, 20), torch.randn(5, 24)
    plain = nn.Linear(24, 20)
    plain.load_state_dict(layer.state_dict())
    ours, theirs = nn.Sequential(layer), plain
    if activation == "relu":
        ours = MLP(24, 20, 16)
        theirs = nn.Sequential(ours.layers[0], nn.ReLU(), ours.layers[1])
    elif activation == "slope":
        ours = nn.Sequential(layer, PReLU(init=0.3))
        theirs = nn.Sequential(plain, nn.PReLU(init=0.3))
    torch.testing.assert_close(transform(ours, x), transform(theirs, x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_trace_holds_plain_operations():
    traced = torch.jit.trace(MLP(24, 20, 16), torch.randn(5, 24))
    assert not {"mkldnn", "dndetr"} & set(re.findall(r"(\w+)::", str(traced.inlined_graph)))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantisation_that_passes_over_the_layer_does_not_do_so_silently():
    with pytest.warns(UserWarning, match=r"converts no dndetr.models.linear.Linear.*after undo\(\)"):
        made = torch.ao.quantization.quantize_dynamic(nn.Sequential(Linear(24, 20)), {nn.Linear})
    assert type(made[0]) is Linear and not hasattr(made[0], "qconfig")
    made[0](torch.randn(3, 24)).sum().backward()


def test_weights_of_another_kind_are_torchs():
    class Weight(torch.Tensor):
        """As quantisation and sharding put in a parameter's place; the kernels see its memory alone."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            assert function is not module._Linear.apply and "mkldnn" not in str(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    torch.manual_seed(0)
    layer, x = Linear(24, 20), torch.randn(5, 24)
    expected = F.linear(x, layer.weight, layer.bias)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Weight))
    torch.testing.assert_close(layer(x).as_subclass(torch.Tensor), expected)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("slope", [None, 0.25])
def test_at_zero_a_relu_has_slope_zero_and_a_prelu_its_own(slope, dtype):
    x, weight = torch.ones(2, 16, dtype=dtype), torch.zeros(16, 16, dtype=dtype)
    bias = torch.zeros(16, dtype=dtype, requires_grad=True)
    given = None if slope is None else torch.tensor([slope], dtype=dtype, requires_grad=True)
    linear(x, weight, bias, slope is None, given).sum().backward()
    assert bias.grad.tolist() == [2 * (slope or 0)] * 16
    assert given is None or given.grad == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_prelu_that_follows_at_once_is_the_module(shape, with_bias, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(SHAPES[shape], dtype=dtype), torch.randn(40, 24, dtype=dtype)
    bias = torch.randn(40, dtype=dtype) if with_bias else None
    found, expected = PReLU().to(dtype), PReLU().to(dtype)
    pairs = zip(
        gradients(lambda *given: linear(*given, slope=found.weight), x, weight, bias),
        gradients(lambda *given: expected(linear(*given)), x, weight, bias),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    for activation in (found, expected):
        out = linear(x, weight, bias, slope=found.weight) if activation is found else expected(linear(x, weight, bias))
        out.sum().backward()
    assert torch.equal(found.weight.grad, expected.weight.grad)


def test_one_activation_follows_at_most():
    with pytest.raises(ValueError, match="a ReLU or a slope may follow, not both"):
        linear(torch.ones(2, 16), torch.ones(16, 16), None, True, torch.ones(1))


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


@pytest.mark.parametrize(
    ("about", "mkl", "onednn", "expected"),
    [
        ("vendor_id\t: GenuineIntel\n\n", True, True, False),
        ("vendor_id\t: AuthenticAMD\n\n", True, True, True),
        ("vendor_id\t: GenuineIntel\n\n", False, True, True),
        ("vendor_id\t: AuthenticAMD\n\n", True, False, False),
    ],
)
def test_mkl_keeps_the_products_of_its_makers_processors(monkeypatch, about, mkl, onednn, expected):
    monkeypatch.setattr(module.Path, "is_file", lambda path: True)
    monkeypatch.setattr(module.Path, "read_text", lambda path: about)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    assert onednn_is_faster.__wrapped__() is expected
