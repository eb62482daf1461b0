import math
import re

import pytest
import torch
from ahead_of_time import build
from architectures import on_architectures
from set_losses import NAMES, WEIGHTS, check_precision, run, weights_of

from dndetr.batch import Targets
from dndetr.ops import PARTS, GroupLayout, LossWeights, Matches, _backend, set_loss
from dndetr.ops import _set_loss_cases as cases

SIMD = ("plain", "avx2", "avx512")


@pytest.fixture
def on(extension, monkeypatch):
    """on(simd, threads=None): what the C++ path runs on from now."""

    def choose(simd="", threads=None):
        class Module:
            SetLoss = extension.SetLoss

            def __getattr__(self, name):
                function = getattr(extension, name)
                return lambda *args: function(*args[:-1], threads or args[-1], simd)

        monkeypatch.setattr(_backend, "compiled", Module)

    return choose


def one_query(logit, box, label, target, weights):
    """Loss terms of one query with one class and its target, written out in Python floats."""
    p = 1 / (1 + math.exp(-logit))
    focal = weights.alpha * (1 - p) ** 2 * -math.log(p) if label else (1 - weights.alpha) * p**2 * -math.log(1 - p)
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (
        (x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (box, target)
    )
    inside = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    union = box[2] * box[3] + target[2] * target[3] - inside
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    giou = inside / (union + 1e-6) - (hull - union) / (hull + 1e-6)
    return focal, sum(abs(a - b) for a, b in zip(box, target, strict=True)), 1 - giou


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_formula(backend, extension):
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.1], [0.5, 0.5, 0.3, 0.4], [0.7, 0.2, 0.1, 0.3]], dtype=torch.float64)
    truth = torch.tensor([0.45, 0.5, 0.3, 0.2], dtype=torch.float64)
    logits = torch.tensor([1.2, -0.7, 2.5], dtype=torch.float64)
    # One denoising query, then two matching ones of which the second has the target.
    matches = Matches(torch.tensor([[[[1]]]]), torch.tensor([[[-1, 0]]], dtype=torch.int32), torch.tensor([[True]]))
    targets = Targets(torch.zeros(1, 1, dtype=torch.int64), truth.view(1, 1, 4), torch.ones(1, dtype=torch.int32))
    normalizers = torch.tensor([2.0, 3.0], dtype=torch.float64)
    total, parts = set_loss(
        logits.view(1, 1, 3, 1),
        boxes.view(1, 1, 3, 4),
        matches,
        GroupLayout(1, 1, 2),
        targets,
        normalizers,
        WEIGHTS,
        backend,
    )
    noised, free, matched = (
        one_query(logits[i].item(), boxes[i].tolist(), label, truth.tolist(), WEIGHTS)
        for i, label in enumerate((True, False, True))
    )
    expected = [(matched[0] + free[0]) / 2, matched[1] / 2, matched[2] / 2, *(term / 3 for term in noised)]
    assert parts.tolist()[0] == pytest.approx(expected, rel=1e-12)
    coefficients = (1.5, 4.0, 3.0) * 2
    assert total.item() == pytest.approx(sum(c * part for c, part in zip(coefficients, expected, strict=True)))


@pytest.mark.parametrize("simd", SIMD)
@pytest.mark.parametrize("name", cases.CASES)
def test_as_precise_as_the_reference(on, name, simd):
    on(simd)
    check_precision(name, "cpp", 1e-13 if cases.CASES[name][-1] == torch.float64 else 2e-6)


@pytest.mark.parametrize("simd", SIMD)
def test_every_magnitude_of_logits(on, simd):
    """Relative error of the focal loss and its slope, logit by logit."""
    on(simd)
    values = torch.cat((torch.linspace(-80, 80, 3001), torch.tensor([-1e4, -0.0, 1e-30, 1e-8, 1e4])))
    for label in (-1, 0):
        loss, slope = {}, {}
        for backend, dtype in (("reference", torch.float64), ("cpp", torch.float32)):
            logits = values.to(dtype).view(-1, 1, 1, 1).requires_grad_()
            _, parts = set_loss(
                logits,
                torch.full((len(values), 1, 1, 4), 0.5),
                Matches(None, torch.full((len(values), 1, 1), label, dtype=torch.int32), None),
                GroupLayout(0, 1, 1),
                Targets(torch.zeros(1, 1).long(), torch.full((1, 1, 4), 0.5), torch.tensor([1], dtype=torch.int32)),
                torch.ones(2),
                WEIGHTS,
                backend,
            )
            loss[backend] = parts[:, 0].double()
            slope[backend] = torch.autograd.grad(parts[:, 0].sum(), logits)[0].flatten().double()
        for part in (loss, slope):
            torch.testing.assert_close(part["cpp"], part["reference"], rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize("name", ["uneven", "coco"])
def test_threads_change_no_bit(on, name):
    on(threads=1)
    alone = run(cases.make_case(name), "cpp")
    on(threads=3)
    together = run(cases.make_case(name), "cpp")
    assert all(torch.equal(alone[part], together[part]) for part in NAMES)


def fast_arguments(name, backend="cpp"):
    logits, boxes, matches, layout, targets, normalizers = cases.make_case(name)
    per_object, counted, proposals = cases.DENOISING.get(name, (1, None, 0))
    counted = targets.counts if counted is None else torch.tensor(counted, dtype=torch.int32)
    tensors = (logits.requires_grad_(), boxes.requires_grad_(), matches.target, targets.labels, targets.boxes)
    numbers = layout.groups, per_object, proposals
    weights = weights_of(name)
    return *tensors, targets.counts, counted, normalizers, *numbers, weights.floats, weights.kinds, backend


@pytest.mark.parametrize("name", ["f64", "contrastive-f64"])
def test_gradients_by_finite_differences(extension, name):
    logits, boxes, *rest = fast_arguments(name)
    assert torch.autograd.gradcheck(lambda *x: torch.ops.dndetr.set_loss(*x, *rest), (logits, boxes))


@pytest.mark.parametrize("name", ["tiny", "bf16", "no-groups", "no-images", "contrastive", "position-and-focal"])
def test_opcheck(extension, name):
    torch.library.opcheck(torch.ops.dndetr.set_loss.default, fast_arguments(name))


@pytest.mark.parametrize("name", ["uneven", "contrastive", "position-and-focal"])
def test_compiles_without_a_graph_break(extension, name):
    case, options = cases.make_case(name), cases.make_options(name)
    weights = weights_of(name)

    def loss(logits, boxes):
        return set_loss(logits, boxes, *case[2:], weights, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        inputs = [x.detach().requires_grad_() for x in case[:2]]
        total, parts = function(*inputs)
        results.append((total.detach(), parts.detach(), *torch.autograd.grad(total, inputs)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_any_strides(extension, backend):
    logits, boxes, *rest = cases.make_case("uneven")
    expected = run((logits, boxes, *rest), backend)
    strided = logits.transpose(0, 3).contiguous().transpose(0, 3), boxes.transpose(1, 2).contiguous().transpose(1, 2)
    given = run((*strided, *rest), backend)
    for part in NAMES:
        torch.testing.assert_close(given[part], expected[part])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_logit_shows_in_its_layer_and_term_alone(extension, backend, broken):
    case = cases.make_case("uneven")
    clean = run(case, backend)["parts"]
    logits = case[0]
    logits[1, 0, -1, 2] = broken  # a matching query
    logits[2, 0, 3, 1] = broken  # a denoising query with an object
    logits[0, 1, 5, 1] = math.nan  # one without: counts for nothing
    parts = run(case, backend)["parts"]
    bad = torch.zeros(3, 6, dtype=torch.bool)
    bad[1, PARTS.index("label")] = bad[2, PARTS.index("dn_label")] = True
    assert torch.equal(parts.isfinite(), ~bad)
    assert torch.equal(parts[~bad], clean[~bad])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_broken_box_shows_where_it_is_paired(extension, backend):
    case = cases.make_case("uneven")
    matches, layout = case[2:4]
    paired, free = (int((matches.target[1, 0] >= 0).int().argmax()), int((matches.target[1, 0] < 0).int().argmax()))
    case[1][1, 0, layout.denoising + free, 1] = math.nan
    assert run(case, backend)["parts"].isfinite().all()
    case[1][1, 0, layout.denoising + paired, 1] = math.nan
    parts = run(case, backend)["parts"]
    assert parts.isfinite().logical_not().nonzero().tolist() == [[1, PARTS.index("l1")], [1, PARTS.index("giou")]]


@pytest.mark.parametrize("sizes", [(0.0, 0.0), (0.0, 0.3), (-0.1, 0.2)])
@pytest.mark.parametrize("truth", [(0.5, 0.5, 0.2, 0.2), (0.5, 0.5, 0.0, 0.0), (0.9, 0.9, 0.1, 0.1)])
def test_degenerate_boxes(extension, sizes, truth):
    logits, _, matches, layout, targets, normalizers = cases.make_case("f64")
    boxes = torch.tensor((0.5, 0.5, *sizes), dtype=torch.float64).expand(3, 2, 15, 4).clone()
    targets = Targets(targets.labels, torch.tensor(truth, dtype=torch.float64).expand(2, 4, 4), targets.counts)
    case = (logits, boxes, matches, layout, targets, normalizers)
    expected, given = (run(case, backend) for backend in ("reference", "cpp"))
    for part in NAMES:
        assert given[part].isfinite().all()
        torch.testing.assert_close(given[part], expected[part], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_larger_bucket_changes_nothing(extension, backend):
    logits, boxes, matches, layout, targets, normalizers = cases.make_case("no-groups")
    grow = torch.nn.functional.pad
    wider = Targets(grow(targets.labels, (0, 24)), grow(targets.boxes, (0, 0, 0, 24)), targets.counts)
    narrow, wide = (
        set_loss(logits, boxes, matches, layout, t, normalizers, WEIGHTS, backend)[1] for t in (targets, wider)
    )
    assert torch.equal(narrow, wide)


def test_only_what_is_asked_for_gets_a_gradient(extension):
    logits, boxes, *rest = cases.make_case("tiny")
    total, parts = set_loss(logits.requires_grad_(), boxes, *rest)
    assert total.requires_grad and torch.autograd.grad(parts.sum(), logits)[0].shape == logits.shape
    assert not any(x.requires_grad for x in set_loss(logits.detach(), boxes, *rest))


def test_wrong_input_is_an_error():
    logits, boxes, matches, layout, targets, normalizers = cases.make_case("tiny")
    with pytest.raises(ValueError, match=r"set_loss: boxes must be \[2, 2, 11, 4\]"):
        set_loss(logits, boxes[:, :, 1:], matches, layout, targets, normalizers)
    with pytest.raises(ValueError, match="padded to 3 per image, but the denoising groups have 4 slots"):
        set_loss(logits, boxes, matches, GroupLayout(2, 4, 3), targets, normalizers)


def test_fake_tensors(fake_cuda):
    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="cuda")

    total, parts = torch.ops.dndetr.set_loss(
        empty(6, 2, 40, 91, dtype=torch.bfloat16),
        empty(6, 2, 40, 4),
        empty(6, 2, 24, dtype=torch.int32),
        empty(2, 8, dtype=torch.int64),
        empty(2, 8, 4),
        empty(2, dtype=torch.int32),
        empty(2, dtype=torch.int32),
        empty(2),
        2,
        1,
        0,
        WEIGHTS.floats,
        WEIGHTS.kinds,
        "triton",
    )
    assert (total.shape, total.dtype, parts.shape) == ((), torch.float32, (6, 6)) and parts.device.type == "cuda"


INTERPRETED = """
import math
import torch
from dndetr.ops import _set_loss_cases as cases
from set_losses import check_precision, run

for name in cases.CASES:
    if name in ("coco", "uneven", "no-targets", "more-targets", "f16") or name in cases.WEIGHTS:
        continue  # slow, and like the others; kinds have a test of their own
    # bfloat16 is truncated here
    check_precision(name, "triton", {torch.float64: 1e-13, torch.bfloat16: 8e-3}.get(cases.CASES[name][-1], 2e-6))

case = cases.make_case("tiny")
case[0][1, 0, -1, 2] = math.nan
case[0][0, 1, 5, 1] = math.nan  # a slot without an object
parts = run(case, "triton")["parts"]
assert parts.isfinite().logical_not().nonzero().tolist() == [[1, 0]]
"""


def test_triton_in_the_interpreter(interpreter):
    interpreter(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in cases.CASES if name not in cases.WEIGHTS])
def test_gpu_is_as_precise_as_the_reference(name):
    check_precision(name, "triton", 1e-12 if cases.CASES[name][-1] == torch.float64 else 4e-6, "cuda")


@on_architectures(90)
@pytest.mark.parametrize("logits", ["*bf16", "*fp32"])
@pytest.mark.parametrize("kernel", ["forward", "reduce", "backward"])
def test_triton_compiles_for_gpus_without_spilling(kernel, logits, arch, tmp_path):
    triton = pytest.importorskip("triton")
    from dndetr.kernels import set_loss as kernels

    function = getattr(kernels, f"set_loss_{kernel}_kernel")
    types = dict.fromkeys(("logits", "grad_logits"), logits)
    types |= {"target": "*i32", "labels": "*i64", "counts": "*i32", "counted": "*i32"}
    floats = ("boxes", "grad_boxes", "target_boxes", "normalizers", "sums", "total", "parts", "grad_total")
    types |= dict.fromkeys(floats, "*fp32")
    block_q, block_k = kernels._tile(91)
    constants = dict(zip(("LABEL", "L1", "GIOU", "ALPHA", "EPS"), LossWeights().floats, strict=True))
    constants |= {"KIND": "focal", "NOISED": "focal", "grad_parts": None}
    constants |= {"PRECISE": triton.language.float32, "BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK": 256}
    compiled, usage = build(function, types, constants, arch, tmp_path, divisible=(), num_warps=4)
    assert compiled.metadata.shared <= 48 * 1024
    most = 8 if (kernel, arch) == ("forward", 120) else 0  # there one number does not fit
    assert int(re.search(r"STACK:(\d+)", usage)[1]) <= most and "LOCAL:0" in usage, usage
