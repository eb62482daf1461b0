import importlib
import itertools
import math
from unittest import mock

import pytest
import torch
from ahead_of_time import build
from architectures import on_architectures

from dndetr.ops import frozen_norm

# The package exports the function under the module's name.
op = importlib.import_module("dndetr.ops.frozen_norm")

NAMES = ("y", "grad x", "grad shortcut")
ADDED = ("nothing", "shortcut", "normed shortcut")
FORMS = list(itertools.product(ADDED, (False, True)))  # what is added, with a ReLU


def given_as(added, relu, x, scale, shift, shortcut, *norm):
    """Arguments of the op: of a case, what a form takes."""
    taken = None if added == "nothing" else shortcut
    return x, scale, shift, taken, relu, *(norm if added == "normed shortcut" else (None, None))


def run(case, backend, dtype=None, added="shortcut", relu=True, needs=(True, True), taken=None):
    """The result and the gradients by name, of what needs one; ``taken``: once, or which of two results are."""
    case = [tensor.detach().to(dtype or tensor.dtype) for tensor in case]
    maps = (case[0],) if added == "nothing" else (case[0], case[3])
    asked = [each.requires_grad_() for each, needed in zip(maps, needs, strict=False) if needed]
    results = frozen_norm(*given_as(added, relu, *case), backend, taken is not None)
    y = results if taken is None else results[0]
    names = [name for name, needed in zip(NAMES[1 : 1 + len(maps)], needs, strict=False) if needed]
    slant = torch.linspace(-2, 3, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    if taken is None:
        grads = torch.autograd.grad(y, asked, slant) if asked else ()
    else:
        assert torch.equal(*results) and results[0].data_ptr() == results[1].data_ptr()
        slants = slant, slant.flip(0, 1).square()  # of another layout, too
        grads = torch.autograd.grad([results[i] for i in taken], asked, [slants[i] for i in taken])
    return {"y": y.detach()} | dict(zip(names, grads, strict=True))


def error(given, exact):
    return ((given.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-6)).item() if exact.numel() else 0.0


def check_precision(name, device="cpu", roundings=None):
    """The kernel is at most twice as far from float64 as the specification in the case's dtype."""
    roundings = {torch.float64: 1e-13, torch.float32: 1e-6} | (roundings or {})
    case = op.make_case(name, device)
    for added, relu in FORMS:
        ways = (("reference", torch.float64), ("reference",), ("triton",))
        exact, plain, given = (run(case, *way, added=added, relu=relu) for way in ways)
        assert given.keys() == plain.keys() and len(given) == 2 + (added != "nothing")
        for part, found in given.items():
            assert found.dtype == plain[part].dtype and found.shape == plain[part].shape
            bound = max(2 * error(plain[part], exact[part]), roundings.get(found.dtype, 0.0))
            assert error(found, exact[part]) <= bound, (name, added, relu, part)


def check_twice(device="cpu", roundings=None):
    """The gradients of two that take the result are added before they are rounded, and either may be missing."""
    roundings = {torch.float64: 1e-13, torch.float32: 1e-6} | (roundings or {})
    for name, (added, relu), taken in itertools.product(("tiny", "eights", "no-images"), FORMS, ((0, 1), (0,), (1,))):
        case = op.make_case(name, device)
        ways = (("reference", torch.float64), ("reference",), ("triton",))
        exact, plain, given = (run(case, *way, added=added, relu=relu, taken=taken) for way in ways)
        for part, found in given.items():
            bound = max(2 * error(plain[part], exact[part]), roundings.get(found.dtype, 0.0))
            assert found.dtype == plain[part].dtype and error(found, exact[part]) <= bound, (name, added, taken, part)
    x, scale, shift, *_ = op.make_case("tiny", device)
    with torch.no_grad():
        assert not any(
            y.requires_grad for y in frozen_norm(x.requires_grad_(), scale, shift, backend="triton", twice=True)
        )
    y, twin = frozen_norm(x, scale, shift, backend="triton", twice=True)
    (grad,) = torch.autograd.grad((y * twin).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def check_strides(device="cpu"):
    """Maps in any layout give what channels-last ones do, which is what all results are."""
    x, scale, shift, shortcut, *norm = case = op.make_case("uneven", device)
    wide = x.new_zeros(*x.shape[:3], 2 * x.shape[3])
    wide[..., ::2] = x
    scattered = [values.repeat_interleave(2)[::2] for values in (scale, *norm)]
    for added, relu in FORMS:
        expected = run(case, "triton", added=added, relu=relu)
        for layout in (x.contiguous(), wide[..., ::2], x.transpose(2, 3).contiguous().transpose(2, 3)):
            other = layout, scattered[0], shift, shortcut.contiguous(), *scattered[1:]
            given = run(other, "triton", added=added, relu=relu)
            for part, found in given.items():
                # A shortcut's gradient that is y's itself comes as that was given.
                as_given = (part, added, relu) == ("grad shortcut", "shortcut", False)
                assert as_given or found.is_contiguous(memory_format=torch.channels_last)
                assert torch.equal(found, expected[part]), part
    x.requires_grad_()
    y = frozen_norm(x, scale, shift, shortcut, True, backend="triton")
    (grad,) = torch.autograd.grad(y.sum(), x)  # an expanded gradient
    torch.testing.assert_close(grad, (y > 0) * scale[:, None, None])
    y = frozen_norm(x, scale, shift, None, True, backend="triton")
    (grad,) = torch.autograd.grad(y, x, torch.ones(x.shape).to(device))
    assert grad.is_contiguous(memory_format=torch.channels_last)  # of one that has its channels first


def check_edges(device="cpu"):
    """What is not a number, and exact zeros, as in torch."""
    nan, inf = math.nan, math.inf
    x = torch.tensor([nan, 0.0, -0.0, 1.0, -1.0, inf, -inf, 2.0], device=device).view(1, 1, 2, 4)
    one, none = torch.ones(1, device=device), torch.zeros(1, device=device)
    for added, relu in FORMS:
        for shortcut, own in itertools.product((torch.zeros_like(x), x.flip(3), -x), (one, -one, none)):
            case = x, one, none, shortcut, own, none
            expected, given = (run(case, backend, added=added, relu=relu) for backend in ("reference", "triton"))
            for part, found in given.items():
                torch.testing.assert_close(found, expected[part], rtol=0, atol=0, equal_nan=True)
    check_zero("triton", device)


def check_zero(backend, device="cpu"):
    """A ReLU passes no gradient at zero, whatever its sign and whatever was added."""
    x, shortcut = torch.tensor([[0.0, 1.0], [-0.0, 0.0], [1.0, -1.0], [2.0, -1.0]], device=device).T.view(2, 1, 1, 1, 4)
    x.requires_grad_(), shortcut.requires_grad_()
    y = frozen_norm(x, x.new_ones(1), x.new_zeros(1), shortcut, True, backend=backend)
    y.sum().backward()
    assert y.flatten().tolist() == [1, 0, 0, 1]
    assert x.grad.flatten().tolist() == shortcut.grad.flatten().tolist() == [1, 0, 0, 1]


def check_needs(device="cpu"):
    """What needs no gradient gets none, nor is it written."""
    from dndetr.kernels import frozen_norm as kernels

    case = x, *rest = op.make_case("tiny", device)
    for (added, relu), needs in itertools.product(FORMS, ((True, True), (True, False), (False, True))):
        if added == "nothing" and not needs[0]:
            continue
        expected = run(case, "reference", added=added, relu=relu, needs=needs)
        with mock.patch.object(kernels, "frozen_norm_backward", wraps=kernels.frozen_norm_backward) as backward:
            given = run(case, "triton", added=added, relu=relu, needs=needs)
        assert given.keys() == expected.keys()
        for part, found in given.items():
            torch.testing.assert_close(found, expected[part])
        written = [tuple(grad is not None for grad in call.args[-2:]) for call in backward.call_args_list]
        changes = {"nothing": False, "shortcut": relu, "normed shortcut": True}[added]
        asked = (needs[0], needs[1] and changes)
        assert written == ([asked] if any(asked) else [])
    given = given_as("normed shortcut", True, x, *rest)
    assert not frozen_norm(*given, "triton").requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert not frozen_norm(*given, "triton").requires_grad
    weighting = torch.ones_like(x).requires_grad_()
    (grad,) = torch.autograd.grad(frozen_norm(*given, "triton"), x, weighting, create_graph=True)
    with pytest.raises(RuntimeError, match="frozen_norm can be differentiated once"):
        grad.sum().backward()


def check_the_shortcuts_norm_is_tested():
    """The self-test sees a shortcut's norm that is left out, taken in the wrong order, or that of x."""
    from spoilt_kernels import check_refused

    for instead in (
        lambda scale, shift, *norm: (None, None),
        lambda scale, shift, *norm: norm[::-1],
        lambda scale, shift, *norm: (norm[0], 0 * norm[1]),
        lambda scale, shift, *norm: (norm[0] ** 0, norm[1]),
        lambda scale, shift, *norm: (scale, shift),
    ):

        def forward(launcher, x, scale, shift, shortcut, *given, instead=instead):
            norm = given[:2] if given[0] is None else instead(scale, shift, *given[:2])
            launcher(x, scale, shift, shortcut, *norm, *given[2:])

        check_refused("frozen_norm", "frozen_norm_forward", forward)
    for instead in (lambda scale: None, lambda scale: scale):

        def backward(launcher, grad_y, twin, y, scale, own_scale, *grads, instead=instead):
            launcher(grad_y, twin, y, scale, None if own_scale is None else instead(scale), *grads)

        check_refused("frozen_norm", "frozen_norm_backward", backward)

    def alone(launcher, grad_y, twin, *given):
        launcher(grad_y, None, *given)

    check_refused("frozen_norm", "frozen_norm_backward", alone)


@pytest.mark.parametrize(("added", "relu"), FORMS)
def test_formula(added, relu):
    x, scale, shift, shortcut, own_scale, own_shift = case = op.make_case("f64")
    if added != "normed shortcut":
        own_scale, own_shift = torch.ones_like(own_scale), torch.zeros_like(own_shift)
    summed = added != "nothing"
    found = run(case, "reference", added=added, relu=relu)
    slant = torch.linspace(-2, 3, x.numel(), dtype=x.dtype).view(x.shape)
    for place in itertools.product(*(range(size) for size in x.shape)):
        channel = place[1]
        y = (x[place] * scale[channel] + shift[channel]).item()
        y += (shortcut[place] * own_scale[channel] + own_shift[channel]).item() if summed else 0
        grad = 0 if relu and y <= 0 else slant[place].item()
        expected = max(y, 0) if relu else y, grad * scale[channel].item(), grad * own_scale[channel].item()
        assert [found[part][place].item() for part in found] == pytest.approx(expected[: 2 + summed], abs=1e-14)


def test_nothing_passes_a_relu_at_zero():
    check_zero("reference")


def test_wrong_input_is_an_error():
    x, scale, shift, shortcut, *norm = op.make_case("tiny")
    with pytest.raises(ValueError, match=r"frozen_norm: x must be \[B, C, H, W\]"):
        frozen_norm(x[0], scale, shift)
    with pytest.raises(ValueError, match=r"scale and shift \[C\]; got \[2, 3, 2, 3\], \[2\], \[3\]"):
        frozen_norm(x, scale[:2], shift)
    with pytest.raises(ValueError, match=r"shortcut must be \[2, 3, 2, 3\] of torch.float32"):
        frozen_norm(x, scale, shift, shortcut[:1])
    with pytest.raises(ValueError, match=r"got \[2, 3, 2, 3\] of torch.float64"):
        frozen_norm(x, scale, shift, shortcut.double())
    wanted = r"shortcut_scale and shortcut_shift must be \[C\] and come together, with a shortcut; got "
    with pytest.raises(ValueError, match=wanted + r"\[3\], \[3\] without one"):
        frozen_norm(x, scale, shift, None, True, *norm)
    for other, told in (
        ((norm[0], None), r"\[3\], None$"),
        ((None, norm[1]), r"None, \[3\]$"),
        ((norm[0], norm[1][:2]), r"\[3\], \[2\]$"),
        ((norm[0][:2], norm[1][:2]), r"\[2\], \[2\]$"),
    ):
        with pytest.raises(ValueError, match=wanted + told):
            frozen_norm(x, scale, shift, shortcut, True, *other)


def test_fake_tensors(fake_cuda):
    x = torch.empty(2, 64, 5, 6, device="cuda", dtype=torch.bfloat16)
    channel = torch.empty(64, device="cuda")
    for added, relu in FORMS:
        y = torch.ops.dndetr.frozen_norm(*given_as(added, relu, x, channel, channel, x, channel, channel))
        assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
        assert y.is_contiguous(memory_format=torch.channels_last)
    for own, twin in itertools.product((None, channel), (None, x)):
        grad_x, grad_shortcut = torch.ops.dndetr.frozen_norm_backward(x, twin, y, channel, own, True, False)
        assert grad_x.stride() == y.stride() and grad_shortcut.shape == (0,)
        grad_x, grad_shortcut = torch.ops.dndetr.frozen_norm_backward(x, twin, None, channel, own, False, True)
        assert grad_x.shape == (0,) and grad_shortcut.stride() == y.stride()


AS_TRAINED = """
from spoilt_kernels import check_self_test

check_precision("bf16", roundings={torch.bfloat16: 8e-3})  # bfloat16 is truncated here
check_precision("tiny")
check_edges()
check_twice(roundings={torch.bfloat16: 8e-3})
check_self_test("frozen_norm", frozen_norm_forward=(7,), frozen_norm_backward=(5, 6))
check_the_shortcuts_norm_is_tested()
"""

INTERPRETED = """
for name in op.CASES:
    if name != "resnet":  # slow, and like the others
        check_precision(name, roundings={torch.bfloat16: 8e-3})
check_strides()
check_needs()
"""

REGISTERED = """
function = torch.ops.dndetr.frozen_norm.default
quick = ("test_schema", "test_faketensor", "test_autograd_registration")
def asked_for(case):
    return [tensor.requires_grad_(tensor.dim() == 4) for tensor in case]
case = asked_for(op.make_case("bf16"))
for added in ADDED[1:]:
    torch.library.opcheck(function, given_as(added, True, *case))
for added, relu in FORMS:
    torch.library.opcheck(function, given_as(added, relu, case[0].contiguous(), *case[1:]), test_utils=quick)
small = asked_for(tensor[:1, :2, :1, :2] if tensor.dim() == 4 else tensor[:2] for tensor in op.make_case("f64"))
for added, relu in FORMS:
    assert torch.autograd.gradcheck(lambda *small: frozen_norm(*given_as(added, relu, *small), "triton"), small)
def step(added, *case):
    return frozen_norm(*given_as(added, True, *case), "triton")
def twice(added, *case):
    y, twin = frozen_norm(*given_as(added, True, *case), "triton", True)
    return y + 2 * twin
def thrice(added, *case):
    return 3 * step(added, *case)
weighting = torch.randn(case[0].shape, dtype=case[0].dtype)
small32 = [tensor.float().requires_grad_(tensor.dim() == 4) for tensor in op.make_case("tiny")]
for way in (twice, torch.compile(twice, fullgraph=True, backend="aot_eager")):
    asked = small32[0], small32[3]
    results = [torch.autograd.grad(each("shortcut", *small32).sum(), asked) for each in (way, thrice)]
    torch.testing.assert_close(*results)
for added in ADDED[1:]:
    ways = step, torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, found = (torch.autograd.grad(way(added, *case), (case[0], case[3]), weighting) for way in ways)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
"""


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(AS_TRAINED, id="as-trained"),
        pytest.param(INTERPRETED, id="values", marks=pytest.mark.slow),
        pytest.param(REGISTERED, id="registration", marks=pytest.mark.slow),
    ],
)
def test_triton_in_the_interpreter(interpreter, program):
    interpreter("from test_frozen_norm import *\n" + program)


@pytest.mark.gpu
@pytest.mark.parametrize("name", op.CASES)
def test_gpu_is_as_precise_as_the_reference(name):
    check_precision(name, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("check", [check_strides, check_edges, check_needs, check_twice])
def test_gpu_in_awkward_cases(check):
    check("cuda")


@pytest.mark.gpu
def test_gpu_counts_beyond_31_bits():
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free memory")
    shape, ones = (1, 64, 2**13, 2**12 + 1), torch.ones(64, device="cuda")  # a little more than 2**31 numbers
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=torch.channels_last).fill_(-1)
    x[..., -1, -2:] = 3
    y = frozen_norm(x, 2 * ones, ones, None, True, backend="triton")
    assert (y[..., -1, -2:] == 7).all() and y.sum(dtype=torch.float64) == 7 * 2 * 64
    other = frozen_norm(x.requires_grad_(), 2 * ones, ones, None, True, backend="triton")
    (grad,) = torch.autograd.grad(other, x, y)
    assert (grad[..., -1, -2:] == 14).all() and grad.sum(dtype=torch.float64) == 14 * 2 * 64


@pytest.mark.gpu
@pytest.mark.parametrize("added", ADDED[1:])
def test_gpu_replays_in_a_graph(added):
    x, _, _, shortcut, *_ = case = op.make_case("bf16", "cuda")
    inputs = [x.requires_grad_(), shortcut.requires_grad_()]
    weighting = torch.randn_like(x)

    def work():
        y = frozen_norm(*given_as(added, True, *case), "triton")
        return y, *torch.autograd.grad(y, inputs, weighting)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = work()
    with torch.no_grad():
        x.mul_(-1)
    graph.replay()
    for found, expected in zip(captured, work(), strict=True):
        assert torch.equal(found, expected)


@on_architectures(90)
@pytest.mark.parametrize(
    ("twice", "added", "channels", "dtype"),
    [
        (False, "shortcut", 24, "bf16"),
        (False, "normed shortcut", 24, "fp32"),
        (False, "shortcut", 91, "fp32"),
        (True, "normed shortcut", 91, "bf16"),
        (True, "normed shortcut", 256, "bf16"),
        (True, "shortcut", 256, "fp32"),
    ],
)
def test_triton_compiles_for_gpus_without_spilling(twice, added, channels, dtype, arch, tmp_path):
    triton = pytest.importorskip("triton")
    from dndetr.kernels import frozen_norm as kernels

    constants = {"RELU": True, "PRECISE": triton.language.float32, **kernels.tile(channels)}
    own = "shortcut_scale", "shortcut_shift"
    if added == "shortcut":
        constants |= dict.fromkeys(own)
    if not twice:
        constants["grad_twin"] = None
    types = {"rows": "i32", "packs": "i32"} | dict.fromkeys(("scale", "shift", *own), "*fp32")
    for function in (kernels.frozen_norm_forward_kernel, kernels.frozen_norm_backward_kernel):
        compiled, usage = build(function, types, constants, arch, tmp_path, other=f"*{dtype}", num_warps=4)
        # Where channels fill vectors of 16 bytes these are read and written, and nothing goes through shared memory.
        whole = channels % 8 == 0
        assert compiled.metadata.shared == 0 or not whole
        for access in ("ld.global.v4.b32", "st.global.v4.b32"):
            assert (access in compiled.asm["ptx"]) == whole, access
        assert "STACK:0" in usage and "LOCAL:0" in usage, usage
