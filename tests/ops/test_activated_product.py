"""Products with activations: against autograd and the two steps, in Triton's interpreter and on a GPU."""

import importlib
import math
import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from dndetr.models import linear
from dndetr.models.layers import FeedForward, Stream
from dndetr.ops import _backend, activated_product, activated_product_backward

# The package exports the function under the module's name.
op = importlib.import_module("dndetr.ops.activated_product")

HALF = (torch.bfloat16, torch.float16)
NAMES = ("out", "kept", "masked", "sums", "grad slope")


def run(case, activation, backend, slope=None):
    """Results of both passes by name, None where there is none; the second is given what the first should keep."""
    x, weight, bias, its_slope, grad, after = case
    slope = {"relu": None, "prelu": its_slope if slope is None else torch.full_like(its_slope, slope)}[activation]
    out, kept = activated_product(x, weight, bias, slope, True, backend)
    _, given = op.activated_product_reference(x, weight, bias, slope)
    grads = activated_product_backward(grad, after, given, slope, backend)
    return dict(zip(NAMES, (out, kept, *grads), strict=True))


def rounded(case, activation):
    """The same by its definition in float64, rounded to the inputs' dtype where that says so."""
    x, weight, bias, slope, grad, after = (each.double() for each in case)
    dtype = case[0].dtype
    before = (x @ weight.t() + bias).to(dtype).double()
    hidden = (grad @ after).to(dtype).double()
    passes = before > 0
    if activation == "relu":
        masked = torch.where(passes, hidden, 0)
        return {"out": before.relu(), "kept": before.relu(), "masked": masked, "sums": masked.sum(0)}
    masked, below = torch.where(passes, hidden, hidden * slope), torch.where(passes, 0, hidden * before)
    out = torch.where(passes, before, before * slope)
    return {"out": out, "kept": before, "masked": masked, "sums": masked.sum(0), "grad slope": below.sum().view(1)}


def check_short(case, activation, truncates=False):
    """Of short numbers sums are exact, so results are rounded ones of exact sums, to the last bit."""
    found, again = (run(case, activation, "triton") for _ in range(2))
    expected = rounded(case, activation)
    for name, exact in expected.items():
        result = found[name]
        assert torch.equal(result, again[name]), f"{name} differs from run to run"
        dtype = torch.float32 if name == "grad slope" else case[0].dtype
        assert result.dtype == dtype and result.shape == exact.shape and result.is_contiguous(), name
        if name == "grad slope":
            bound = (1e-2 if truncates else 1e-5) * (case[4].double() @ case[5].double()).abs().sum().item() + 1e-6
            torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=bound)
        elif truncates:  # the interpreter does that to bfloat16, several times
            size = exact.abs().max().item() if exact.numel() else 0
            torch.testing.assert_close(result.double(), exact, rtol=2e-2, atol=2e-2 * size)
        else:
            assert torch.equal(result, exact.to(dtype)), name
    assert found["grad slope"] is None or activation == "prelu"


def check_awkward(device, dtype=torch.float16):
    """Any strides, slopes of any size and precision, several tiles, and what is not a number."""
    for activation in ("relu", "prelu"):
        case = [each.to(dtype) for each in op.make_case("uneven", device)]
        case[3] = case[3].float()
        expected = run(case, activation, "triton")
        turned = [each.t().contiguous().t() if each.dim() == 2 else each for each in case]
        wide = [each.repeat_interleave(2, -1)[..., ::2] if each.numel() > 1 else each for each in case]
        for layout in (turned, wide):
            found = run(layout, activation, "triton")
            assert all(found[name] is None or torch.equal(found[name], expected[name]) for name in NAMES)
        x, weight, bias, slope, grad, after = case
        x[3, 5], x[66, 7], grad[4, 6], grad[66, 8] = math.nan, math.inf, math.nan, -math.inf
        for value in (0.25, 0.0, -0.5, 3.0, math.inf, math.nan):
            found, wanted = (run(case, activation, backend, value) for backend in ("triton", "reference"))
            for name in ("out", "kept", "masked"):
                torch.testing.assert_close(found[name], wanted[name], rtol=2e-3, atol=1e-4, equal_nan=True)
            for name in ("sums", "grad slope"):
                assert found[name] is None or torch.equal(found[name].isfinite(), wanted[name].isfinite()), name
        # An infinite slope leaves columns alone that are all above zero, and what is beyond the last row.
        sound = [each.to(dtype) for each in op.make_case("uneven", device)]
        sound[1][0], sound[2][0], sound[3] = 0, 1, slope
        assert run(sound, activation, "triton", math.inf)["sums"][0].isfinite()
        # One row's numbers are that row's.
        assert not run(case, activation, "triton")["out"][torch.arange(67, device=device) % 63 != 3].isnan().any()
    x, weight, bias, slope, grad, after = op.make_case("queries", device)
    for its_dtype in HALF:
        _, _, of_slope = activated_product_backward(
            grad.half(), after.half(), (x.half() @ weight.half().t()), slope.to(its_dtype), "triton"
        )
        assert of_slope.dtype == its_dtype and of_slope.shape == (1,)
    half = [each.half() for each in (x, weight, bias)]
    out, kept = activated_product(*half, slope, False, "triton")
    assert kept is None and torch.equal(out, activated_product(*half, slope, True, "triton")[0])
    out, kept = activated_product(*half, None, False, "triton")
    assert kept is out


def check_feed_forward_block(activation):
    """A model's block on the kernels has the result and the gradients that it has in two steps."""
    torch.manual_seed(0)
    block = FeedForward(24, 40, activation).half()
    x, weighting = torch.randn(2, 35, 24).half().requires_grad_(), torch.randn(2, 35, 24).half()
    launched, own = [], torch.ops.dndetr.activated_product_backward

    def outcome(backend):
        _backend.forget()
        with (
            mock.patch.dict(os.environ, {"DNDETR_BACKEND_ACTIVATED_PRODUCT": backend}),
            mock.patch.object(linear, "half_precision", lambda x, _: x.dtype),
            mock.patch.object(torch.ops.dndetr, own.__name__, lambda *given: launched.append(backend) or own(*given)),
        ):
            out = block(Stream.of(x)).full
            return [out, *torch.autograd.grad(out, (x, *block.parameters()), weighting)]

    for found, expected in zip(outcome("triton"), outcome("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=2e-3 * expected.abs().max().item())
    assert "triton" in launched and "reference" not in launched
    _backend.forget()


@pytest.mark.parametrize("slope", [None, 0.3, 0.0, -0.5, 3.0])
@pytest.mark.parametrize("name", op.CASES)
def test_the_reference_is_what_autograd_gives(name, slope):
    x, weight, bias, _, grad, after = (each.double() for each in op.make_case(name))
    before = F.linear(x, weight, bias).requires_grad_()
    slope = None if slope is None else torch.tensor([slope], dtype=torch.float64, requires_grad=True)
    out = before.relu() if slope is None else F.prelu(before, slope)
    found, kept = activated_product(x, weight, bias, None if slope is None else slope.detach())
    assert torch.equal(found, out) and torch.equal(kept, out if slope is None else before)
    (of_before, *of_slope) = torch.autograd.grad(out @ after.t(), [before] + [slope] * (slope is not None), grad)
    masked, sums, grad_slope = activated_product_backward(grad, after, kept, slope)
    torch.testing.assert_close(masked, of_before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums, of_before.sum(0), rtol=1e-12, atol=1e-12)
    assert (grad_slope is None) == (slope is None)
    torch.testing.assert_close([grad_slope] * len(of_slope), of_slope, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_reference_hides_no_nan(dtype):
    x, weight, bias, slope, *_ = (each.to(dtype) for each in op.make_case("uneven"))
    x[3, 5] = math.nan
    for given in (None, slope):
        out, _ = activated_product(x, weight, bias, given)
        assert out.isnan().any(1).nonzero().tolist() == [[3]]


def test_wrong_input_is_an_error():
    x, weight, bias, _, grad, after = op.make_case("queries")
    with pytest.raises(
        ValueError, match=r"activated_product: must be x \[M, K\].* got \[70, 63\], \[128, 64\], \[128\]"
    ):
        activated_product(x[:, 1:], weight, bias)
    with pytest.raises(ValueError, match=r"activated_product: .* got \[70, 64\], \[128, 64\], \[127\]"):
        activated_product(x, weight, bias[1:])
    with pytest.raises(ValueError, match=r"x, weight and bias must be of one dtype, got torch.bfloat16, torch.float16"):
        activated_product(x, weight.half(), bias)
    with pytest.raises(ValueError, match=r"activated_product: slope must be \[1\], got \[128\]"):
        activated_product(x, weight, bias, bias)
    with pytest.raises(ValueError, match=r"activated_product_backward: must be grad .* got .*\[69, 128\]"):
        activated_product_backward(grad, after, torch.ones(69, 128, dtype=grad.dtype))
    with pytest.raises(ValueError, match="grad, weight and kept must be of one dtype"):
        activated_product_backward(grad, after, torch.ones(70, 128))


@pytest.mark.parametrize("slope", [None, 0.25])
def test_fake_tensors(fake_cuda, slope):
    x, weight = (torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in ((40, 91), (30, 91)))
    bias, slope = x.new_empty(30), None if slope is None else torch.empty(1, device="cuda")
    out, before = torch.ops.dndetr.activated_product(x, weight, bias, slope, True)
    assert out.shape == (40, 30) and out.dtype == before.dtype == torch.bfloat16
    assert before.shape == ((0,) if slope is None else (40, 30))
    assert torch.ops.dndetr.activated_product(x, weight, bias, slope, False)[1].shape == (0,)
    masked, sums, grad_slope = torch.ops.dndetr.activated_product_backward(x, x.new_empty(91, 30), out, slope)
    assert masked.shape == (40, 30) and sums.shape == (30,) and masked.dtype == sums.dtype == torch.bfloat16
    assert grad_slope.shape == ((0,) if slope is None else (1,)) and masked.is_contiguous()
    assert slope is None or grad_slope.dtype == torch.float32


def test_the_kernel_takes_what_it_pays_for(fake_cuda, monkeypatch):
    """Half precision, up to 512 terms, more where it is asked for by name."""
    reasons = {None: "fastest that runs here", "triton": "asked for by the backend argument"}
    monkeypatch.setattr(_backend, "choose", lambda _, requested, __: ("triton", reasons[requested]))
    calls = []
    monkeypatch.setattr(op, "activated_product_reference", lambda x, *_: calls.append(x) or (x, x))
    monkeypatch.setattr(op, "activated_product_backward_reference", lambda x, *_: calls.append(x) or (x, x, None))

    def taken(rows, terms, dtype, backend=None):
        calls.clear()
        x, weight = (torch.empty(size, terms, dtype=dtype, device="cuda") for size in (rows, 24))
        activated_product(x, weight, x.new_empty(24), None, True, backend)
        activated_product_backward(x, weight.t(), x.new_empty(rows, 24), None, backend)
        assert len(calls) in (0, 2)
        return not calls

    assert taken(70, 512, torch.bfloat16) and taken(70, 4, torch.float16)
    assert not taken(70, 513, torch.bfloat16) and taken(70, 513, torch.bfloat16, "triton")
    assert not taken(70, 64, torch.float32) and not taken(70, 64, torch.float64, "triton")
    assert not taken(0, 64, torch.bfloat16)


AS_TRAINED = """
check_self_test("activated_product", torch.float16, activated_product=(4, 5), activated_product_backward=(4, 5))
check_self_test("activated_product", torch.float32, activated_product_backward=(6,))
for activation in ("relu", "prelu"):
    check_short(op.make_case("queries"), activation, truncates=True)
    check_short(op.make_case("uneven"), activation)
    check_feed_forward_block(activation)
"""

INTERPRETED = """
from dndetr.kernels import product_tiles, tiles
from dndetr.kernels.product_tiles import Tile

for tile in (None, Tile(128, 128, 64, 8, 3), Tile(32, 16, 32, 4, 1), Tile(16, 64, 16, 4, 1)):
    tiles._tuned.clear()
    if tile:
        tiles._tuned.update(dict.fromkeys(product_tiles.TABLES[90], tile))
    for name, (rows, *_, dtype) in op.CASES.items():
        if rows == 5000 and tile != Tile(128, 128, 64, 8, 3):
            continue
        for activation in ("relu", "prelu"):
            check_short(op.make_case(name), activation, truncates=dtype == torch.bfloat16)
    if tile in (None, Tile(32, 16, 32, 4, 1)):
        check_awkward("cpu")
tiles._tuned.clear()
x, weight, bias, slope, grad, after = op.make_case("uneven")
for given in (None, slope):
    for keep in (True, False):
        torch.library.opcheck(torch.ops.dndetr.activated_product.default, (x, weight, bias, given, keep))
    kept = activated_product(x, weight, bias, given)[1]
    torch.library.opcheck(torch.ops.dndetr.activated_product_backward.default, (grad, after, kept, given))
"""


@pytest.mark.parametrize(
    "program", [pytest.param(AS_TRAINED, id="as-trained"), pytest.param(INTERPRETED, id="all", marks=pytest.mark.slow)]
)
def test_triton_in_the_interpreter(interpreter, program):
    head = "import bfloat16_in_the_interpreter\nfrom spoilt_kernels import *\nfrom test_activated_product import *\n"
    interpreter(head + program)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", op.CASES)
def test_gpu_cases(name, dtype):
    *given, slope, grad, after = op.make_case(name, "cuda")
    for activation in ("relu", "prelu"):
        check_short([*(each.to(dtype) for each in given), slope, grad.to(dtype), after.to(dtype)], activation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
def test_gpu_in_awkward_cases(dtype):
    if dtype == torch.float16:
        check_awkward("cuda")
    x, weight, bias, slope, *_ = op.make_case("many-tiles", "cuda")
    x, weight, bias = (each.to(dtype) for each in (x, weight, bias))
    x[299, 3] = math.nan
    for given in (None, slope):
        assert activated_product(x, weight, bias, given, True, "triton")[0].isnan().any(1).nonzero().tolist() == [[299]]


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["relu", "prelu"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [(1000, 256, 2048), (16_800, 256, 2048), (4097, 100, 520)], ids=str)
def test_gpu_rounds_as_the_two_steps_do(size, dtype, activation):
    """Within a rounding more than what the two steps are off, of long numbers."""
    rows, terms, columns = size
    torch.manual_seed(0)
    shapes = (rows, terms), (columns, terms), (columns,), (1,), (rows, terms), (terms, columns)
    case = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    case[3] = torch.full((1,), 0.25, device="cuda")
    found, plain = (run(case, activation, backend) for backend in ("triton", "reference"))
    exact = rounded(case, activation)
    hidden, before = case[4].double() @ case[5].double(), F.linear(*(each.double() for each in case[:3]))
    size = {"sums": hidden.abs().sum(0), "grad slope": (hidden * before).abs().sum()}
    for name, wanted in exact.items():
        # Signs of results next to zero, which sums in another order may change, decide on parts of the gradients.
        error, theirs = ((results[name].double() - wanted).abs() for results in (found, plain))
        rounding = torch.finfo(found[name].dtype).eps * wanted.abs() + 1e-4 * size.get(name, 1)
        within = error <= 2 * theirs + 2 * rounding
        assert (within | (before.abs() < 1e-2) if name == "masked" else within).all(), name


@pytest.mark.gpu
def test_gpu_counts_beyond_32_bits():
    """More than 2^31 results: the last rows are what they are alone."""
    rows = 2**31 // 2048 + 70
    shapes = (rows, 16), (2048, 16), (2048,), (rows, 16), (16, 2048)
    # So short that sums are exact, in whichever order a tile has them.
    x, weight, bias, grad, after = ((4 * torch.randn(shape, device="cuda")).round().bfloat16() for shape in shapes)
    out, _ = activated_product(x, weight, bias, None, True, "triton")
    masked, _, _ = activated_product_backward(grad, after, out, None, "triton")
    last, _ = activated_product(x[-50:], weight, bias, None, True, "triton")
    assert torch.equal(out[-50:], last)
    assert torch.equal(masked[-50:], activated_product_backward(grad[-50:], after, last, None, "triton")[0])


@pytest.mark.gpu
def test_gpu_replays_in_a_graph():
    case = op.make_case("queries", "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(case, "prelu", "triton")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run(case, "prelu", "triton")
    case[0].mul_(-1)
    graph.replay()
    for name, result in run(case, "prelu", "triton").items():
        assert torch.equal(captured[name], result), name
