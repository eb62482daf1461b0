"""The CUDA kernels of deformable attention, run thread by thread on the host."""

import ctypes
import shutil

import pytest
import torch
from deform_attn_checks import DTYPES, NAMES, TAKEN, as_close_as_the_reference, error, flat, grad_of, op
from emulated_deform_attn import KINDS, Emulated, compiled

from dndetr.ops import _backend, _ms_deform_attn, ms_deform_attn_fused

LARGE = ("quarter-encoder", "decoder", "many-tiles")
SMALL = [name for name in TAKEN if not name.startswith("train") and name not in LARGE]
TILED = ["pixels", "tiles"]
HALF = [*TILED, "width-32", "few-queries"]


@pytest.fixture(scope="module")
def library(root, tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    return compiled(root, tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def emulated(library, monkeypatch):
    """The op's CUDA code on CPU tensors."""
    module = Emulated(library)
    monkeypatch.setattr(_backend, "compiled", lambda: module)
    monkeypatch.setattr(_backend, "cuda_stream", lambda tensor: (0, 0))
    return module


def run(arguments, forward=_ms_deform_attn._forward_cuda, backward=_ms_deform_attn._backward_cuda):
    """Output and gradients by name, straight from the op's two implementations."""
    value, shapes, *points, valid = arguments
    out = forward(value, flat(shapes), *points, valid)
    grads = backward(grad_of(out).to(out.dtype), value, flat(shapes), *points, valid, points[0] is not None)
    return dict(zip(NAMES, (out, *grads), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_emulated_kernels_are_as_precise_as_the_reference(emulated, deterministic, name, dtype, kind):
    if kind == "split" and op.CASES[name][3] not in (16, 32, 64):
        pytest.skip("rows are split at tuned widths only")
    if "tiles" in kind and not (dtype.itemsize == 2 and name in HALF):
        pytest.skip("tensor cores are used in half precision, at width 32")
    emulated.variant = KINDS[kind]
    deterministic("fixed" in kind)
    arguments = op.make_case(name, dtype)
    as_close_as_the_reference(run(arguments), arguments, dtype)


@pytest.fixture
def deterministic():
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("reach", [0, 0.2, 4, 30])
def test_emulated_sums_of_a_tile_whatever_the_reach(emulated, dtype, reach):
    """From all samples on a few pixels to most of them far from the tile's window."""
    emulated.variant = KINDS["tiles"]
    value, shapes, points, offsets, logits, valid = op.make_case("tiles", dtype)
    arguments = (value, shapes, points, offsets * reach + 0.3, 4 * logits, valid)
    as_close_as_the_reference(run(arguments), arguments, dtype)


@pytest.mark.parametrize("direction", [None, 0, 1])
def test_emulated_sums_of_a_tile_take_few_reductions(emulated, direction):
    """In an encoder as it starts out, each head looking in one direction, and with offsets of a pixel or so."""
    case = (1, 5600, 1, *op.CASES["quarter-encoder"][3:-1], False)
    value, shapes, points, offsets, logits, _ = op.make_inputs(case, torch.bfloat16)
    offsets = offsets / 2
    if direction is not None:
        side = torch.tensor([(1.0, 0.0), (1.0, 1.0)][direction])
        offsets = offsets / 2 + side * torch.arange(1, 5)[:, None]
    arguments = (value, flat(shapes), points, offsets.bfloat16(), logits, None)
    added = {}
    for kind in ("rows", "tiles"):
        emulated.variant = KINDS[kind]
        emulated.sums()
        _ms_deform_attn._backward_cuda(torch.ones(1, 5600, 32).bfloat16(), *arguments, False)
        added[kind] = emulated.sums()
    # Whole sectors each; where a lane's eight channels were two reductions, 32 bytes apart, a row's took twice as many.
    assert 0.05 < added["tiles"] / added["rows"] < 0.125


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_emulated_a_broken_gradient_stays_with_its_own_pixels(emulated, broken):
    value, shapes, *points, valid = op.make_case("tiles", torch.bfloat16)
    out = op.ms_deform_attn_fused_reference(value, shapes, *points, valid)
    grad_out = grad_of(out).bfloat16()
    grad_out[0, 66, 40] = broken  # one channel of the second head of a query in the midst of a tile
    found = {}
    for kind in ("rows", "tiles"):
        emulated.variant = KINDS[kind]
        found[kind] = _ms_deform_attn._backward_cuda(grad_out, value, flat(shapes), *points, valid, True)[0]
    wrong = ~found["rows"].isfinite()
    assert 8 <= wrong.sum() <= 64 and torch.equal(wrong, ~found["tiles"].isfinite())
    assert error(found["tiles"][~wrong], found["rows"][~wrong]) < 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tiny", "width-32", "width-64", "pixels"])
def test_emulated_threads_may_take_turns_in_any_order(emulated, deterministic, name, dtype, kind):
    if "tiles" in kind and (name not in HALF or dtype != torch.bfloat16):
        pytest.skip("tensor cores are used in half precision, at width 32")
    emulated.variant = KINDS[kind]
    deterministic("fixed" in kind)
    arguments = op.make_case(name, dtype)
    ascending = run(arguments)
    emulated.descending = True
    descending = run(arguments)
    for part in NAMES:
        if part == "value" and "fixed" not in kind:  # sums in another order
            assert error(ascending[part], descending[part]) < (1e-6 if dtype == torch.float32 else 1e-2)
        else:
            assert torch.equal(ascending[part], descending[part]), part


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, "rows"), (torch.bfloat16, "rows"), (torch.bfloat16, "tiles")],
    ids=str,
)
def test_emulated_locations_and_weights(emulated, deterministic, dtype, kind):
    emulated.variant = KINDS[kind]
    value, shapes, points, offsets, logits, _ = op.make_case("width-32", dtype)
    locations = op.sampling_locations(points.to(dtype), offsets, shapes)
    weights = (3 * logits).view(locations.shape[:-1])

    def exact(precise):
        inputs = [x.detach().to(precise).requires_grad_() for x in (value, locations, weights)]
        out = op.ms_deform_attn_reference(inputs[0], shapes, *inputs[1:])
        return out.detach(), *torch.autograd.grad(out, inputs, grad_of(out).to(dtype).to(precise))

    for fixed in (False, True):
        deterministic(fixed)
        given = run((value, shapes, None, locations, weights, None))
        for part, a, b in zip(("out", "value", "offsets", "logits"), exact(torch.float64), exact(dtype), strict=True):
            assert error(given[part], a) <= max(2 * error(b, a), 4e-6 if dtype == torch.float32 else 0), part


@pytest.mark.parametrize(("name", "kind"), [("one-point", "rows"), ("tiny", "rows"), ("pixels", "tiles")])
def test_emulated_offsets_and_logits_of_one_projection(emulated, name, kind):
    """As from two; "one-point" has an odd number of columns, so that pairs of offsets would lie badly."""
    emulated.variant = KINDS[kind]
    value, shapes, points, offsets, logits, valid = op.make_case(name, torch.bfloat16)
    two = run((value, shapes, points, offsets, logits, valid))
    projected = torch.cat((offsets.flatten(2), logits.flatten(2)), dim=-1)
    given = (value, flat(shapes), points, projected, None, valid)
    out = _ms_deform_attn._forward_cuda(*given)
    grad_value, grad_points, grad, none = _ms_deform_attn._backward_cuda(grad_of(out).bfloat16(), *given, True)
    grads = torch.cat((two["offsets"].flatten(2), two["logits"].flatten(2)), dim=-1)
    assert torch.equal(out, two["out"]) and torch.equal(grad, grads) and none.numel() == 0
    assert torch.equal(grad_points, two["reference_points"]) and error(grad_value, two["value"]) < 1e-2


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_emulated_a_broken_pixel_stays_in_its_channel(emulated, broken):
    value, shapes, points, offsets, logits, _ = op.make_case("pixels", torch.bfloat16)
    value[0, 40, 1, 7] = broken
    out = {}
    for kind in ("rows", "tiles"):
        emulated.variant = KINDS[kind]
        out[kind] = _ms_deform_attn._forward_cuda(value, flat(shapes), points, offsets, logits, None)
    wrong = ~out["rows"].isfinite()
    assert wrong[..., 32 + 7].any() and wrong.sum() == wrong[..., 32 + 7].sum()
    assert torch.equal(wrong, ~out["tiles"].isfinite())


def test_emulated_weights_beyond_the_range_of_float16(emulated):
    emulated.variant = KINDS["tiles"]
    value, shapes, points, offsets, logits, _ = op.make_case("width-32", torch.float16)
    locations = op.sampling_locations(points, offsets.float(), shapes)
    value, weights = value / 1000, (1e5 * logits.float()).view(locations.shape[:-1])
    given = _ms_deform_attn._forward_cuda(value, flat(shapes), None, locations, weights, None)
    exact = op.ms_deform_attn_reference(value.double(), shapes, locations.double(), weights.double())
    assert weights.max() > 1e5 and error(given, exact) < 1e-3


@pytest.mark.parametrize("kind", ["rows", "tiles"])
@pytest.mark.parametrize("place", [1e4, -1e4, 1e30, -1e30, float("inf"), -float("inf")])
def test_emulated_far_points_see_and_move_nothing(emulated, kind, place):
    emulated.variant = KINDS[kind]
    case = op.make_case("one-point") if kind == "rows" else op.make_case("pixels", torch.bfloat16)
    value, shapes, points, offsets, logits, _ = case
    value = torch.full_like(value, float("nan"))
    parts = run((value, shapes, points, torch.full_like(offsets, place), logits, None))
    for name in ("out", "value", "reference_points", "offsets"):
        assert (parts[name] == 0).all(), name


@pytest.mark.parametrize(("kind", "name"), [("rows", "tiny"), ("tiles", "pixels")])
def test_emulated_not_a_number_is_passed_on_and_reads_nothing_outside(emulated, kind, name):
    emulated.variant = KINDS[kind]
    dtype = torch.float32 if kind == "rows" else torch.bfloat16
    value, shapes, points, offsets, logits, valid = op.make_case(name, dtype)
    offsets[0, 3, 1, 1, 2, 0] = float("nan")
    logits[1, 5, 0, 2] = float("nan")
    clean = run(op.make_case(name, dtype))["out"].unflatten(-1, (2, -1))
    broken = run((value, shapes, points, offsets, logits, valid))["out"].unflatten(-1, (2, -1))
    assert broken[0, 3, 1].isnan().all() and broken[1, 5, 0].isnan().all()
    broken[0, 3, 1] = clean[0, 3, 1]
    broken[1, 5, 0] = clean[1, 5, 0]
    assert torch.equal(broken, clean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", [(), (1,), (0, 1)], ids=str)
def test_emulated_padding_is_not_read(emulated, deterministic, kind, empty):
    emulated.variant = KINDS[kind]
    deterministic("fixed" in kind)
    value, shapes, *points, valid = op.make_case("pixels", torch.bfloat16 if "tiles" in kind else torch.float32)
    for level in empty:
        valid[0, level, level] = 0  # no pixel of it is valid
    padded = ~op.valid_pixels(valid, shapes)[:, :, None, None]
    assert padded.any()
    given = run((value.masked_fill(padded, float("nan")), shapes, *points, valid))
    expected = run((value, shapes, *points, valid))
    assert all(torch.equal(given[part], expected[part]) for part in NAMES)
    assert (given["value"].masked_select(padded) == 0).all()


def test_too_many_blocks_are_an_error(library):
    sizes = [2**18, 2**16, 8, 32, 4, 2, 1, KINDS["rows"], 0, 2**14, 2**8, 2**5, 64, 32, 64, 32]
    arrays = [None] * 12
    message = library.emulate(
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_int * 2)(8, 8),
        (ctypes.c_void_p * 12)(*arrays),
        (ctypes.c_int * 12)(),
        (ctypes.c_int64 * 12)(),
    ).decode()
    assert message.endswith(" 8589934592 blocks for 262144 images, 65536 queries, 8 heads; CUDA starts 2147483647")


@pytest.mark.parametrize("size", [(0, 0), (4, 0), (99, 99), (-1, 3)])
def test_emulated_valid_sizes_out_of_range(emulated, size):
    value, shapes, *points, _ = op.make_case("one-point")
    arguments = (value, shapes, *points, torch.tensor(size).expand(3, 1, 2))
    as_close_as_the_reference(run(arguments), arguments, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "kind"), [("width-32", "rows"), ("many-levels", "rows"), ("pixels", "tiles")])
def test_emulated_strides(emulated, name, kind, dtype):
    emulated.variant = KINDS[kind]
    value, shapes, *points, valid = op.make_case(name, dtype)
    width = value.shape[-1]
    expected = run((value, shapes, *points, valid))
    wider = torch.cat((value, value), -1)
    views = (
        value.transpose(1, 2).contiguous().transpose(1, 2),
        wider[..., :width],
        value.transpose(1, 3).contiguous().transpose(1, 3),
        torch.cat((value[..., :1], value), -1)[..., 1:],  # starts where no vector may
    )
    for view in views:
        assert not view.is_contiguous() and torch.equal(view, value)
        given = run((view, shapes, *points, valid))
        assert all(torch.equal(given[part], expected[part]) for part in NAMES)


def test_emulator_sees_a_wild_read(emulated):
    emulated.unreadable = 4  # bytes at the end of value
    with pytest.raises(AssertionError, match="a read outside of value"):
        run(op.make_case("one-pixel"))


def test_fixed_point_is_a_power_of_two_that_no_sum_exceeds():
    grad_out = torch.tensor([3.0, -5.0, 1e-3]).expand(2, 1000, 4, 3)
    unit = _ms_deform_attn._fixed_point(grad_out, None).item()
    assert unit == 2 ** round(torch.tensor(unit).log2().item())
    assert 2**59 < 1000 * 5.0 * unit <= 2**62
    weights = torch.full((2, 1000, 4, 2, 8), 1e5)
    assert 2**56 < 1000 * 16 * 1e5 * 5.0 * _ms_deform_attn._fixed_point(grad_out, weights).item() <= 2**62
    assert _ms_deform_attn._fixed_point(grad_out * float("inf"), None).isnan()


def test_what_cuda_has_no_kernel_for_goes_to_the_reference_with_a_warning_once(monkeypatch):
    monkeypatch.setattr(_backend, "choose", lambda *_: ("cuda", "fastest that runs here"))
    op._warn_once.cache_clear()
    arguments = op.make_case("odd-width")
    with pytest.warns(UserWarning, match="widths that are a multiple of 4.*got width 13, 3 levels, 2 points"):
        out = ms_deform_attn_fused(*arguments)
    torch.testing.assert_close(out, op.ms_deform_attn_fused_reference(*arguments))
    monkeypatch.setattr(_backend, "choose", lambda *_: ("cuda", "asked for by the backend argument"))
    with pytest.raises(ValueError, match=r"ms_deform_attn_fused: CUDA takes .* got float64"):
        ms_deform_attn_fused(*op.make_case("tiny", torch.float64))
