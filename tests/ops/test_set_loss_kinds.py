"""Class losses that know the box: by their authors' formulas, at the ends of what may come, and as GPUs run them."""

from typing import get_type_hints

import pytest
import torch
from ahead_of_time import build
from architectures import on_architectures
from set_losses import NAMES, WEIGHTS, check_precision, run

from dndetr.batch import Targets
from dndetr.config import LossConfig
from dndetr.ops import GroupLayout, LossWeights, Matches, set_loss
from dndetr.ops import _set_loss_cases as cases
from dndetr.ops.class_loss import KINDS, class_loss

FAST = ("reference", "cpp")
AWARE = KINDS[1:]


def of_one_image(logits, boxes, truth, labels, partner, weights, backend):
    """Label loss of matching queries of one image, with targets of their own."""
    _total, parts = set_loss(
        logits[None, None],
        boxes[None, None],
        Matches(None, partner.int()[None, None], None),
        GroupLayout(0, 0, len(logits)),
        Targets(labels[None], truth[None], torch.tensor([len(labels)], dtype=torch.int32)),
        torch.ones(2, dtype=torch.float64),
        weights,
        backend,
    )
    return parts[0, 0]


def as_published(kind, logits, onehot, iou, alpha):
    """The losses as the papers and their authors' code put them: scores, weights and logarithms, class by class."""
    p = logits.sigmoid()
    hit, quality = onehot.bool(), iou[:, None].expand_as(p)
    if kind == "iou":  # Align-DETR: the score and the quality share the aim; what it leaves weighs the other side
        aim = (p.detach() ** alpha * quality ** (1 - alpha)).clamp_min(0.01)
        for_one, for_zero = torch.where(hit, aim, 0), torch.where(hit, 1 - aim, p**2)
        return -(for_one * p.log() + for_zero * (1 - p).log()).sum()
    if kind == "mal":  # DEIM: binary cross entropy with soft labels, and no focus at the target's class
        label = torch.where(hit, quality**1.5, 0)
        weight = torch.where(hit, 1, p.detach() ** 1.5)
        return torch.nn.functional.binary_cross_entropy(p, label, weight, reduction="sum")
    # Stable-DINO: the squared quality, raised until the best reaches 1, is the label, and what the focus aims at
    best = (iou**2).max()
    label = torch.where(hit, quality**2 * max(1, 1 / (best.item() + 1e-8)), 0)
    entropy = -(label * p.log() + (1 - label) * (1 - p).log())
    focus = torch.where(hit, alpha * (label - p).abs() ** 2, (1 - alpha) * p**2)
    return (focus * entropy).sum()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", AWARE)
def test_as_published(extension, kind, backend):
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(6, 4, generator=draw, dtype=torch.float64)
    truth = torch.rand(3, 4, generator=draw, dtype=torch.float64) * 0.2 + 0.4
    labels, partner = torch.tensor([2, 0, 3]), torch.tensor([-1, 1, 0, -1, 2, -1])
    boxes = truth[partner] + 0.05 * torch.rand(6, 4, generator=draw, dtype=torch.float64)
    low, high = (torch.stack([x[:, :2] + s * x[:, 2:] / 2 for x in (boxes, truth[partner])]) for s in (-1, 1))
    area = (high - low).prod(2)
    shared = (high.amin(0) - low.amax(0)).clamp_min(0).prod(1)
    iou = shared / (area.sum(0) - shared) * (partner >= 0)
    assert (iou > 0).sum() == 3
    onehot = torch.nn.functional.one_hot(labels[partner], 4) * (partner >= 0)[:, None]

    logits.requires_grad_()
    weights = LossWeights(alpha=0.3, kind=kind, eps=0.0)
    expected = as_published(kind, logits, onehot, iou, 0.3)
    given = of_one_image(logits, boxes.requires_grad_(), truth, labels, partner, weights, backend)
    torch.testing.assert_close(given, expected, rtol=1e-11, atol=0)
    by_logits, by_boxes = torch.autograd.grad(given, (logits, boxes))
    torch.testing.assert_close(by_logits, *torch.autograd.grad(expected, logits), rtol=1e-11, atol=1e-13)
    # The loss moves with the boxes, but does not move them.
    assert by_boxes.eq(0).all()
    assert of_one_image(logits, boxes * 1.01, truth, labels, partner, weights, backend) != given


@pytest.mark.parametrize("kind, labels", [("focal", (2, -1, 0)), ("position", (2, -1, 0)), ("iou", (-1, -1, -1))])
def test_slopes_of_the_reference_where_no_aim_moves(kind, labels):
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 3, generator=draw, dtype=torch.float64)).requires_grad_()
    overlap = torch.rand(3, generator=draw, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: class_loss(x, torch.tensor(labels), overlap, kind, 0.3), logits)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", AWARE)
def test_every_magnitude_of_logits(simd, kind, alpha):
    """Logit by logit, of the target's class and beside it; perfect boxes, some that overlap, some that touch."""
    values = torch.cat((torch.linspace(-80, 80, 401), torch.tensor([-1e4, -40.0, -0.0, 1e-30, 1e-8, 40.0, 1e4])))
    truth = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    for box in ((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.25, 0.5), (1.0, 0.5, 0.5, 0.5)):
        results = []
        for backend, dtype in (("reference", torch.float64), ("cpp", torch.float32)):
            logits = values.to(dtype)[:, None, None, None].expand(-1, 1, 1, 2).clone().requires_grad_()
            _, parts = set_loss(
                logits,
                torch.tensor(box).expand(len(values), 1, 1, 4),
                Matches(None, torch.zeros(len(values), 1, 1, dtype=torch.int32), None),
                GroupLayout(0, 1, 1),
                Targets(torch.zeros(1, 1).long(), truth[None], torch.tensor([1], dtype=torch.int32)),
                torch.ones(2),
                LossWeights(alpha=alpha, kind=kind, eps=0.0),
                backend,
            )
            results.append((parts[:, 0].double(), torch.autograd.grad(parts[:, 0].sum(), logits)[0].double()))
        torch.testing.assert_close(results[1], results[0], rtol=3e-6, atol=2e-7)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("kind", AWARE)
def test_boxes_without_area(extension, kind, eps):
    """With nothing added to divisors the overlap of two of them is no number, and the loss says so."""
    logits, _, *rest = cases.make_case("f64")
    matches, layout, targets, normalizers = rest
    for truth in ((0.5, 0.5, 0.2, 0.2), (0.5, 0.5, 0.0, 0.0)):
        boxes = torch.tensor((0.5, 0.5, 0.0, 0.0), dtype=torch.float64).expand(3, 2, 15, 4).clone()
        same = Targets(targets.labels, torch.tensor(truth, dtype=torch.float64).expand(2, 4, 4), targets.counts)
        weights = WEIGHTS._replace(kind=kind, noised=kind, eps=eps)
        case = logits, boxes, matches, layout, same, normalizers
        expected, given = (run(case, backend, weights=weights) for backend in FAST)
        torch.testing.assert_close(given["parts"], expected["parts"], rtol=1e-9, atol=1e-9, equal_nan=True)
        assert given["parts"].isnan().any() == (eps == 0 and truth[2] == 0)
        if not given["parts"].isnan().any():
            for part in NAMES:
                torch.testing.assert_close(given[part], expected[part], rtol=1e-9, atol=1e-9)


def check_what_is_broken_shows(kind, backend):
    """Which of all numbers a broken logit, or the box of a pair, makes none."""
    weights = WEIGHTS._replace(kind=kind)
    for what in ("target's logit", "other logit", "box"):
        case = cases.make_case("tiny")
        logits, boxes, matches, layout, targets, _ = case
        query = int((matches.target[1, 0] >= 0).int().argmax())
        label = int(targets.labels[0, matches.target[1, 0, query]])
        if what == "box":
            boxes[1, 0, layout.denoising + query, 0] = float("nan")
        else:
            logits[1, 0, layout.denoising + query, (label + (what == "other logit")) % 3] = float("nan")
        given = run(case, backend, weights=weights)
        broken = [[1, 0], [1, 1], [1, 2]] if what == "box" else [[1, 0]]
        assert given["parts"].isfinite().logical_not().nonzero().tolist() == broken, what
        fine = given["grad logits"].isfinite()
        assert not fine[1, 0].all() and fine[0].all() and fine[1, 1].all() and fine[1, 0, : layout.denoising].all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", AWARE)
def test_what_is_broken_shows(extension, kind, backend):
    check_what_is_broken_shows(kind, backend)


@pytest.mark.parametrize("backend", FAST)
def test_the_best_box_counts_for_its_own_half_image_and_layer(extension, backend):
    """position: a better box of an image lowers the aims of the others there, and of nobody else."""
    case = cases.make_case("position-and-focal")
    weights = LossWeights(kind="position", noised="position")
    plain = run(case, backend, weights=weights)["parts"]
    _, boxes, matches, layout, targets, _ = case
    query = int((matches.target[1, 0] >= 0).int().argmax())
    boxes[1, 0, layout.denoising + query] = targets.boxes[0, matches.target[1, 0, query]]
    moved = run(case, backend, weights=weights)["parts"]
    assert (moved != plain).nonzero().tolist() == [[1, 0], [1, 1], [1, 2]]
    mixed = run(case, backend, weights=weights._replace(noised="focal"))["parts"]
    focal = run(case, backend, weights=LossWeights())["parts"]
    assert torch.equal(mixed[:, :3], moved[:, :3]) and torch.equal(mixed[:, 3:], focal[:, 3:])


@pytest.mark.parametrize("kind", AWARE)
def test_threads_change_no_bit(extension, kind):
    case, weights, results = cases.make_case("coco"), WEIGHTS._replace(kind=kind, noised=kind), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(run(case, "cpp", weights=weights))
    assert all(torch.equal(results[0][part], results[1][part]) for part in NAMES)


def test_kinds_are_named_alike_everywhere(extension):
    hints = get_type_hints(LossConfig)
    assert hints["kind"].__args__ == KINDS and set(hints["noised"].__args__) == {"same", "focal"}
    case = cases.make_case("tiny")
    for field in ("kind", "noised"):
        with pytest.raises(ValueError) as told:
            set_loss(*case, LossWeights(**{field: "vfl"}))
        assert str(told.value) == f"set_loss: weights.{field} must be one of focal, iou, mal, position, got 'vfl'"


@pytest.mark.parametrize("field", ["kind", "noised"])
@pytest.mark.parametrize("alpha", [-0.25, 1.5, float("nan")])
def test_no_negative_exponent_of_an_overlap(field, alpha):
    case = cases.make_case("tiny")
    with pytest.raises(ValueError, match=f"weights.alpha must be 0 to 1 with iou, got {alpha}"):
        set_loss(*case, LossWeights(alpha=alpha, **{field: "iou"}))


INTERPRETED = """
import torch
from dndetr.ops import _set_loss_cases as cases
from set_losses import check_precision
from test_set_loss_kinds import check_what_is_broken_shows

for name in ("iou-f16", "focal-and-mal", "position-f64", "position-no-images", "position-and-focal"):
    check_precision(name, "triton", 1e-13 if cases.CASES[name][-1] == torch.float64 else 2e-6)
check_what_is_broken_shows("position", "triton")
"""


def test_triton_in_the_interpreter(interpreter):
    interpreter(INTERPRETED)


@pytest.mark.gpu
def test_gpu_is_as_precise_as_the_reference():
    for name in cases.WEIGHTS:
        check_precision(name, "triton", 1e-12 if cases.CASES[name][-1] == torch.float64 else 4e-6, "cuda")


@on_architectures(90)
@pytest.mark.parametrize("kernel, kind, noised", [("forward", "iou", "mal"), ("backward", "position", "focal")])
def test_triton_compiles_for_gpus_without_spilling(kernel, kind, noised, arch, tmp_path):
    compiles(kernel, kind, noised, arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kind", AWARE)
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_triton_compiles_every_kind(kernel, kind, arch, tmp_path):
    compiles(kernel, kind, kind, arch, tmp_path)


def compiles(kernel, kind, noised, arch, folder):
    triton = pytest.importorskip("triton")
    from dndetr.kernels import set_loss as kernels

    types = {"target": "*i32", "labels": "*i64", "counts": "*i32", "counted": "*i32"}
    floats = "logits grad_logits boxes grad_boxes target_boxes normalizers sums grad_total"
    types |= dict.fromkeys(floats.split(), "*fp32")
    block_q, block_k = kernels._tile(91)
    constants = dict(zip(("LABEL", "L1", "GIOU", "ALPHA", "EPS"), LossWeights().floats, strict=True))
    constants |= {"KIND": kind, "NOISED": noised, "grad_parts": None, "per_object": 1}
    constants |= {"PRECISE": triton.language.float32, "BLOCK_Q": block_q, "BLOCK_K": block_k}
    function = getattr(kernels, f"set_loss_{kernel}_kernel")
    warps = 4 if kernel == "forward" else kernels._warps_backward(kind, noised)
    compiled, usage = build(function, types, constants, arch, folder, divisible=(), num_warps=warps)
    assert compiled.metadata.shared <= 48 * 1024
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage
