import math

import pytest
import torch
from architectures import on_architectures

from dndetr.batch import Targets
from dndetr.ops import CostWeights, match_cost
from dndetr.ops.match_cost import CASES, compiled_inputs, make_case, match_cost_reference

POSITIONS = (0.0, 0.5, 1.0, 0.3)


def generalised_iou(a, b):
    """Of two boxes, in Python floats."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (
        (x - width / 2, y - height / 2, x + width / 2, y + height / 2) for x, y, width, height in (a, b)
    )
    inside = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inside
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return inside / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def pair_cost(logit, a, b, w):
    """Cost of one query and one target, written out in Python floats."""
    giou = generalised_iou(a, b)
    p = 1 / (1 + math.exp(-logit)) * (0.5 * giou + 0.5) ** w.position
    focal = w.alpha * (1 - p) ** 2 * -math.log(p + 1e-8) - (1 - w.alpha) * p**2 * -math.log(1 - p + 1e-8)
    return w.label * focal + w.l1 * sum(abs(x - y) for x, y in zip(a, b, strict=True)) - w.giou * giou


@pytest.mark.parametrize("position", POSITIONS)
def test_formula(position):
    logits, boxes, targets = make_case("f64")
    weights = CostWeights(1.5, 4.0, 3.0, 0.3, position)
    cost = match_cost_reference(logits, boxes, targets, weights)
    for y, n, t in [(0, 0, 0), (1, 16, 15), (1, 5, 7)]:
        logit = logits[y, 0, n, targets.labels[0, t]].item()
        expected = pair_cost(logit, boxes[y, 0, n].tolist(), targets.boxes[0, t].tolist(), weights)
        assert cost[y, 0, n, t].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_the_formula_of_stable_dino(extension, backend):
    """Section 3.3 of arXiv 2304.04742: |1 - p f|^2 BCE(p f, 1) - (p f)^2 BCE(1 - p f, 1), f = s'^0.5."""
    logits, boxes, targets = make_case("f64")
    cost = match_cost(logits, boxes, targets, CostWeights(2.0, 0.0, 0.0, 0.5, 0.5), backend)
    for n, t in [(0, 0), (16, 15), (5, 7), (9, 2)]:
        p = 1 / (1 + math.exp(-logits[1, 0, n, targets.labels[0, t]].item()))
        rescaled = (1 + generalised_iou(boxes[1, 0, n].tolist(), targets.boxes[0, t].tolist())) / 2
        score = p * math.sqrt(rescaled)
        expected = abs(1 - score) ** 2 * -math.log(score) - score**2 * -math.log(1 - score)
        assert cost[1, 0, n, t].item() == pytest.approx(expected, rel=1e-5)  # without the official code's 1e-8


@pytest.mark.parametrize("name", CASES)
def test_shape_dtype_padding(name):
    layers, batch, queries, _, counts, slots, dtype = CASES[name]
    logits, boxes, targets = make_case(name)
    cost = match_cost(logits, boxes, targets)
    assert cost.shape == (layers, batch, queries, slots)
    assert cost.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    padded = torch.arange(slots) >= torch.tensor(counts)[:, None]
    assert torch.equal(cost.isinf(), padded[None, :, None].expand_as(cost))
    assert cost.transpose(-1, -2).is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_cost_is_the_reference(name):
    logits, boxes, targets = make_case(name, "cuda")
    for position in POSITIONS:
        weights = CostWeights(position=position)
        cost = match_cost(logits, boxes, targets, weights, backend="triton")
        expected = match_cost_reference(logits, boxes, targets, weights)
        torch.testing.assert_close(cost, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_low_precision_logits_are_used_in_float32(name):
    logits, boxes, targets = make_case(name)
    assert torch.equal(match_cost(logits, boxes, targets), match_cost(logits.float(), boxes, targets))


def test_no_gradient_flows():
    logits, boxes, targets = make_case("tiny")
    assert not match_cost(logits.requires_grad_(), boxes.requires_grad_(), targets).requires_grad


def test_a_query_does_not_see_other_images_targets():
    logits, boxes, targets = make_case("uneven")
    cost = match_cost(logits, boxes, targets)
    alone = Targets(targets.labels[1:2], targets.boxes[1:2], targets.counts[1:2])
    assert torch.equal(cost[:, 1:2], match_cost(logits[:, 1:2], boxes[:, 1:2], alone))


def test_wrong_input_is_an_error():
    logits, boxes, targets = make_case("tiny")
    with pytest.raises(ValueError, match="match_cost: logits must be"):
        match_cost(logits[0], boxes, targets)
    with pytest.raises(ValueError, match="images in logits"):
        match_cost(logits[:, :1], boxes[:, :1], targets)
    with pytest.raises(ValueError, match="labels must be int64"):
        match_cost(logits, boxes, Targets(targets.labels.int(), targets.boxes, targets.counts))
    for position in (-0.5, float("nan")):
        with pytest.raises(ValueError, match=f"match_cost: weights.position must be 0 or more, got {position}"):
            match_cost(logits, boxes, targets, CostWeights(position=position))


def test_opcheck(extension):
    logits, boxes, targets = make_case("uneven")
    inputs = (logits, boxes, targets.labels, targets.boxes, targets.counts, list(CostWeights()), "cpp")
    torch.library.opcheck(torch.ops.dndetr.match_cost.default, inputs)


def compiled_cost(extension, logits, boxes, targets, weights, simd):
    """The C++ cost on one instruction set (narrower ones exist on every machine)."""
    cost = torch.full((*logits.shape[:2], targets.labels.shape[1], logits.shape[2]), -7.0).to(
        torch.promote_types(logits.dtype, torch.float32)
    )
    inputs = (logits, boxes, targets.labels, targets.boxes, targets.counts, list(weights))
    with compiled_inputs(extension, *inputs) as given:
        extension.match_cost(given, cost.data_ptr(), 1, simd)
    return cost.transpose(-1, -2)


@pytest.mark.parametrize("simd", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_reference(extension, name, simd):
    logits, boxes, targets = make_case(name)
    logits = logits * 4
    for position in POSITIONS:
        weights = CostWeights(1.5, 4.0, 3.0, 0.3, position)
        cost = compiled_cost(extension, logits, boxes, targets, weights, simd)
        tolerance = 1e-13 if cost.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(
            cost, match_cost_reference(logits, boxes, targets, weights), rtol=tolerance, atol=tolerance
        )
        assert torch.equal(cost, compiled_cost(extension, logits, boxes, targets, weights, "plain"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("position", [0.1, 0.5, 1.0])
def test_scores_of_boxes_far_away_and_equal_ones(extension, dtype, position):
    """GIoU from -1, where the score becomes nothing, to 1."""
    places = torch.tensor([[0.5, 0.5, 0.2, 0.2], [1e9, -1e9, 0.1, 0.1], [0.5, 0.5, 0.0, 0.0], [1e3, 1e3, 1e4, 1e4]])
    boxes = places.to(dtype).expand(1, 1, 4, 4)
    logits = torch.tensor([-1.0, 2.0, 3.0, 4.0], dtype=dtype).view(1, 1, 4, 1)
    targets = Targets(torch.zeros(1, 4, dtype=torch.int64), boxes[0], torch.tensor([4], dtype=torch.int32))
    weights = CostWeights(1.0, 0.0, 0.0, 0.25, position)
    cost, expected = (match_cost(logits, boxes, targets, weights, name) for name in ("cpp", "reference"))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(cost, expected, rtol=tolerance, atol=tolerance)
    assert cost[0, 0, 0, 1] == pytest.approx(0.25 * -math.log(1e-8), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_logit(extension, dtype):
    """From saturated to saturated: exponential and logarithm over their whole range."""
    logits = torch.linspace(-120, 120, 4096, dtype=dtype).view(1, 1, -1, 1)
    boxes = torch.full((1, 1, 4096, 4), 0.25, dtype=dtype)
    targets = Targets(torch.zeros(1, 1, dtype=torch.int64), boxes[0, :, :1], torch.ones(1, dtype=torch.int32))
    tolerance = 1e-14 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(
        match_cost(logits, boxes, targets, backend="cpp"),
        match_cost(logits, boxes, targets, backend="reference"), rtol=tolerance, atol=tolerance
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_broken_prediction_has_no_finite_cost(extension, backend, bad):
    logits, boxes, targets = make_case("uneven")
    logits[0, 0, 3], boxes[1, 0, 4, 2], boxes[2, 2, 5, 0] = bad, bad, bad
    expected = targets.valid[None, :, None].expand(3, 3, 37, 8).clone()
    expected[0, 0, 3] = expected[1, 0, 4] = expected[2, 2, 5] = False
    for position in POSITIONS:
        cost = match_cost(logits, boxes, targets, CostWeights(position=position), backend)
        assert torch.equal(cost.isfinite(), expected)


def test_layouts(extension):
    logits, boxes, targets = make_case("uneven")
    expected = match_cost(logits, boxes, targets, backend="cpp")
    wide_logits, wide_boxes = torch.randn(3, 3, 50, 11), torch.randn(3, 3, 50, 4)
    wide_logits[:, :, 13:], wide_boxes[:, :, 13:] = logits, boxes
    assert torch.equal(match_cost(wide_logits[:, :, 13:], wide_boxes[:, :, 13:], targets, backend="cpp"), expected)
    turned = logits.transpose(-1, -2).contiguous().transpose(-1, -2), boxes.transpose(-1, -2).contiguous().mT
    assert torch.equal(match_cost(*turned, targets, backend="cpp"), expected)


def test_boxes_of_another_precision(extension):
    logits, boxes, targets = make_case("bf16")
    for dtype in (torch.bfloat16, torch.float64):
        given = match_cost(logits, boxes.to(dtype), targets, backend="cpp")
        expected = match_cost(logits, boxes.to(dtype), targets, backend="reference")
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", [-1, 11, 2**40])
def test_a_label_that_does_not_exist_reads_nothing(extension, label):
    logits, boxes, targets = make_case("uneven")
    targets.labels[0, 1] = label
    cost = match_cost(logits, boxes, targets, backend="cpp")
    assert cost[:, 0, :, 1].isnan().all() and cost[:, 0, :, 0].isfinite().all()


def test_compiles_without_a_graph_break():
    logits, boxes, targets = make_case("uneven")
    compiled = torch.compile(match_cost, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, boxes, targets), match_cost(logits, boxes, targets))


def test_fake_tensors(fake_cuda):
    targets = Targets(
        torch.empty(2, 8, dtype=torch.int64, device="cuda"),
        torch.empty(2, 8, 4, device="cuda"),
        torch.empty(2, dtype=torch.int32, device="cuda"),
    )
    cost = match_cost(torch.empty(3, 2, 30, 5, device="cuda"), torch.empty(3, 2, 30, 4, device="cuda"), targets)
    assert cost.shape == (3, 2, 30, 8) and cost.device.type == "cuda"


INTERPRETED = """
import torch
from dndetr.ops import CostWeights, match_cost
from dndetr.ops.match_cost import CASES, compiled_inputs, make_case, match_cost_reference

weights = CostWeights(1.5, 4.0, 3.0, 0.3)
positions = [(name, 0.0) for name in CASES]
positions += [(name, position) for name in ("uneven", "bf16", "f64") for position in (0.5, 0.3)]
for name, position in positions:
    logits, boxes, targets = make_case(name)
    weights = weights._replace(position=position)
    given = match_cost(logits, boxes, targets, weights, backend="triton")
    expected = match_cost_reference(logits, boxes, targets, weights)
    tolerance = 1e-12 if given.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance)
    assert given.stride() == expected.stride(), name

logits, boxes, targets = make_case("uneven")
wide_logits, wide_boxes = torch.randn(3, 3, 50, 11), torch.randn(3, 3, 50, 4)
wide_logits[:, :, 13:], wide_boxes[:, :, 13:] = logits, boxes
torch.testing.assert_close(
    match_cost(wide_logits[:, :, 13:], wide_boxes[:, :, 13:], targets, backend="triton"),
    match_cost(logits, boxes, targets, backend="reference"), rtol=1e-5, atol=1e-5)

labels, target_boxes, counts = targets.labels, targets.boxes, targets.counts
inputs = (logits, boxes, labels, target_boxes, counts, list(weights))
torch.library.opcheck(torch.ops.dndetr.match_cost.default, (*inputs, "triton"))

logits[0, 0, 3], boxes[0, 0, 4] = float("inf"), float("nan")
for position in (0.0, 0.5, 0.3):
    cost = match_cost(logits, boxes, targets, CostWeights(position=position), backend="triton")
    assert cost[0, 0, 3:5, :8].isnan().all() and cost[0, 0, 5].isfinite().all()
"""


def test_triton_in_the_interpreter(interpreter):
    interpreter(INTERPRETED)


@on_architectures(90)
@pytest.mark.parametrize(
    ("logits", "precise", "position"),
    [("*bf16", "fp32", 0.0), ("*fp32", "fp32", 0.5), ("*fp32", "fp32", 0.3), ("*fp64", "fp64", 0.5)],
)
def test_triton_compiles_for_gpus(arch, logits, precise, position, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dndetr.kernels.match_cost import match_cost_kernel

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    floats = "*fp64" if precise == "fp64" else "*fp32"
    signature = {name: "i32" for name in match_cost_kernel.arg_names}
    signature |= dict.fromkeys(("boxes", "target_boxes", "cost"), floats)
    signature |= {"logits": logits, "labels": "*i64", "counts": "*i32"}
    signature |= dict.fromkeys(("label_weight", "l1_weight", "giou_weight", "alpha"), "fp32")
    constants = {"POSITION": position, "PRECISE": triton.language.dtype(precise), "BLOCK_N": 128, "BLOCK_T": 8}
    signature |= dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(match_cost_kernel, signature, constants), target=GPUTarget("cuda", arch, 32), options={"num_warps": 4}
    )
    assert compiled.metadata.shared <= 48 * 1024
    assert f"sm_{arch}" in compiled.asm["ptx"] and compiled.asm["cubin"]
