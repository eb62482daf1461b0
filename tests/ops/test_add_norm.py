import importlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from ahead_of_time import build
from architectures import on_architectures

from dndetr.ops import add_norm

# The package exports the function under the module's name.
op = importlib.import_module("dndetr.ops.add_norm")

RESULTS = ("out", "low", "positioned")
GRADIENTS = ("grad x", "grad y", "grad weight", "grad bias", "grad position")


def run(case, backend, dtype=None, used=RESULTS):
    """Results and gradients by name, of those that there are; gradients of what is ``used`` differ, and are exact."""
    x, y, weight, bias, eps, position = case
    tensors = (x, y, weight, bias) if position is None else (x, y, weight, bias, position)
    inputs = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]
    results = dict(zip(RESULTS, add_norm(*inputs[:4], eps, *inputs[4:], backend=backend), strict=True))
    results = {name: result for name, result in results.items() if result is not None}
    count = torch.arange(x.numel(), device=x.device).view(x.shape)
    slants = {name: (count % steps - 1) / 4 for name, steps in zip(RESULTS, (3, 5, 7), strict=True)}
    total = sum((slants[name] * result).sum() for name, result in results.items() if name in used)
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    found = {name: result.detach() for name, result in results.items()}
    return found | {name: grad for name, grad in zip(GRADIENTS, grads, strict=False) if grad is not None}


def error(given, exact):
    return ((given.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-6)).item() if exact.numel() else 0.0


def compare(case, used=RESULTS, truncated=0.0):
    """Triton's results against the reference and float64; ``truncated``: what bfloat16 may lose once more."""
    exact, plain = run(case, "reference", torch.float64, used), run(case, "reference", used=used)
    given = run(case, "triton", used=used)
    assert given.keys() == plain.keys()
    for name, found in given.items():
        assert found.dtype == plain[name].dtype and found.shape == plain[name].shape, name
        rounding = truncated if found.dtype == torch.bfloat16 else 0.0
        assert error(found, exact[name]) <= max(2 * error(plain[name], exact[name]), 2e-6, rounding), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", op.CASES)
def test_without_autocast_it_is_torchs_layer_norm_to_the_last_bit(name, dtype):
    *tensors, eps, position = op.make_case(name)
    x, y, weight, bias = (tensor.to(dtype) for tensor in tensors)
    out, low, positioned = add_norm(x, y, weight, bias, eps, position)
    expected = F.layer_norm(x + y, weight.shape, weight, bias, eps)
    assert torch.equal(out, expected) and low is out
    assert positioned is None if position is None else torch.equal(positioned, (expected + position).to(dtype))


@pytest.mark.parametrize("low_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_results_are_rounded_once(low_dtype):
    x, y, weight, bias, eps, position = op.make_case("encoder")
    y = y.to(low_dtype)
    out, low, positioned = add_norm(x, y, weight, bias, eps, position)
    assert out.dtype == torch.float32 and torch.equal(out, F.layer_norm(x + y, weight.shape, weight, bias, eps))
    assert torch.equal(low, out.to(low_dtype)) and torch.equal(positioned, (out + position).to(low_dtype))


def test_wrong_input_is_an_error():
    x, y, weight, bias, eps, position = op.make_case("tiny")
    with pytest.raises(ValueError, match=r"add_norm: y must be \[2, 5, 36\] with x \[2, 5, 36\], got \[1, 5, 36\]"):
        add_norm(x, y[:1], weight, bias, eps)
    with pytest.raises(ValueError, match=r"weight must be \[36\]"):
        add_norm(x, y, weight[1:], bias, eps)
    with pytest.raises(ValueError, match="position must be"):
        add_norm(x, y, weight, bias, eps, position[0])


@pytest.mark.parametrize("low_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fake_tensors(fake_cuda, low_dtype):
    x, position = (torch.empty(2, 9, 256, device="cuda") for _ in range(2))
    weight, bias = torch.empty(256, device="cuda"), torch.empty(256, device="cuda")
    results = torch.ops.dndetr.add_norm(x, x.to(low_dtype), weight, bias, position, 1e-5, True)
    out, low, positioned, normalized, rstd = results
    assert out.shape == positioned.shape == normalized.shape == x.shape and rstd.shape == (2, 9)
    assert out.dtype == normalized.dtype == rstd.dtype == torch.float32 and positioned.dtype == low_dtype
    assert low.shape == ((0,) if low_dtype == torch.float32 else x.shape) and low.device.type == "cuda"
    grads = torch.ops.dndetr.add_norm_backward(None, None, positioned, normalized, rstd, weight, x.dtype, low_dtype)
    assert [grad.dtype for grad in grads] == [torch.float32, low_dtype, torch.float32, torch.float32]


def as_trained():
    from spoilt_kernels import check_self_test

    for name in ("encoder", "no-position"):
        compare(op.make_case(name), truncated=1e-2)
    check_self_test("add_norm", add_norm_forward=(7, 8), add_norm_backward=(7,))


def every_case():
    for name in op.CASES:
        if name != "many-rows":  # slow
            compare(op.make_case(name), truncated=1e-2)


def every_use():
    subsets = [used for size in (1, 2, 3) for used in itertools.combinations(RESULTS, size)]
    for name, used in itertools.product(("encoder", "tiny"), subsets):
        compare(op.make_case(name), used, truncated=1e-2)


def many_rounds_of_few_programs():
    from dndetr.kernels import add_norm as kernels

    most, kernels._PROGRAMS = kernels._PROGRAMS, 2
    compare(op.make_case("encoder"), truncated=1e-2)
    the_same_twice()
    kernels._PROGRAMS = most


def any_strides():
    x, y, *rest, position = op.make_case("encoder")
    strided = [tensor.transpose(0, 2).contiguous().transpose(0, 2) for tensor in (x, y, position)]
    given, expected = run((*strided[:2], *rest, strided[2]), "triton"), run((x, y, *rest, position), "triton")
    assert all(torch.equal(given[name], expected[name]) for name in expected)
    # A position that is the same for all images, and a gradient that is the same everywhere.
    wide = [position[:1].expand_as(x).requires_grad_()]
    add_norm(x, y, *rest, *wide, backend="triton")[2].sum().backward(inputs=wide)


def a_broken_row():
    x, y, *rest = op.make_case("encoder")
    x[1, 7, 3] = math.nan
    whole = torch.ones(2, 9, dtype=torch.bool)
    whole[1, 7] = False
    for name, found in run((x, y, *rest), "triton").items():
        if name == "grad weight":
            assert not found.isfinite().any()
        elif name in ("grad bias", "grad position"):
            assert found.isfinite().all(), name
        else:
            assert torch.equal(found.isfinite().all(-1), whole) and not found[1, 7].isfinite().any(), name


def the_same_twice():
    once, again = (run(op.make_case("encoder"), "triton") for _ in range(2))
    assert all(torch.equal(once[part], again[part]) for part in once)


def as_torch_uses_it():
    from torch.utils.checkpoint import checkpoint

    case = op.make_case("encoder")
    *tensors, eps, position = case
    with torch.no_grad():
        assert not any(result.requires_grad for result in add_norm(*case, backend="triton"))

    def total(*inputs):
        return sum(result.float().square().sum() for result in add_norm(*inputs, eps, position, backend="triton"))

    def grads(function):
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(function(*inputs), inputs)

    expected = grads(total)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for function in (compiled, lambda *inputs: checkpoint(total, *inputs, use_reentrant=False)):
        for found, wanted in zip(grads(function), expected, strict=True):
            torch.testing.assert_close(found, wanted)
    for name in ("encoder", "tiny", "no-position"):
        *tensors, eps, position = op.make_case(name)
        given = [tensor.requires_grad_() for tensor in tensors]
        torch.library.opcheck(torch.ops.dndetr.add_norm.default, (*given, position, eps, True))


INTERPRETED = {
    "training": (as_trained,),
    "numbers": (every_case, every_use, many_rounds_of_few_programs),
    "inputs": (any_strides, a_broken_row),
    "torch": (as_torch_uses_it,),
}


@pytest.mark.parametrize(
    "name", ["training", *(pytest.param(name, marks=pytest.mark.slow) for name in ("numbers", "inputs", "torch"))]
)
def test_triton_in_the_interpreter(interpreter, name):
    interpreter(f"import test_add_norm as tests\nfor test in tests.INTERPRETED[{name!r}]:\n    test()")


@pytest.mark.gpu
@pytest.mark.parametrize("name", op.CASES)
def test_gpu_is_as_precise_as_the_reference(name):
    compare(op.make_case(name, "cuda"))


@pytest.mark.gpu
def test_gpu_repeats_every_bit_in_a_graph_too():
    *tensors, eps, position = op.make_case("many-rows", "cuda")
    inputs = [tensor.requires_grad_() for tensor in tensors]

    def step():
        results = add_norm(*inputs, eps, position, backend="triton")
        return *results, *torch.autograd.grad([result.float().square().sum() for result in results], inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@on_architectures(90)
@pytest.mark.parametrize("columns", [256, 1000])
@pytest.mark.parametrize("kernel", ["forward", "backward", "reduce"])
def test_triton_compiles_for_gpus_without_spilling(kernel, columns, arch, tmp_path):
    pytest.importorskip("triton")
    from dndetr.kernels import add_norm as kernels

    function = getattr(kernels, f"add_norm_{kernel}_kernel")
    types = dict.fromkeys(("y", "low", "positioned", "grad_low", "grad_positioned", "grad_y"), "*bf16")
    types |= {"rows": "i32", "programs": "i32", "eps": "fp32"}
    rows, block = (128, 16) if kernel == "reduce" else kernels._tile(columns)
    constants = {"COLUMNS": columns, "BLOCK_ROWS": rows, "BLOCK_PROGRAMS": rows, "BLOCK_C": block}
    compiled, usage = build(function, types, constants, arch, tmp_path, other="*fp32", num_warps=4)
    assert compiled.metadata.shared <= 48 * 1024
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage
    if kernel != "reduce" and columns == 256:
        # A thread's part of a row moves in words of 16 bytes.
        assert "ld.global.v4.b32" in compiled.asm["ptx"] and "st.global.v4.b32" in compiled.asm["ptx"]
