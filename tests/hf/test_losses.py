"""Losses of noised queries: focal as transformers has it; what counts in DETR's softmax loss, and what does not."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dndetr.batch import Targets
from dndetr.hf.losses import focal, softmax

CONFIG = SimpleNamespace(eos_coefficient=0.1, bbox_loss_coefficient=5, giou_loss_coefficient=2)
LAYERS, GROUPS, SLOTS, CLASSES = 2, 2, 3, 4


def case(counts: tuple[int, ...], contrastive: bool, dtype: torch.dtype = torch.float64):
    """Logits, boxes and targets; logits are the transposed, so not contiguous."""
    draw = torch.Generator().manual_seed(0)
    batch, rows = len(counts), GROUPS * SLOTS * (1 + contrastive)
    logits = torch.randn(LAYERS, CLASSES + 1, batch, rows, generator=draw, dtype=torch.float64).permute(0, 2, 3, 1)
    boxes, true = (0.2 + 0.5 * torch.rand(*n, 4, generator=draw) for n in ((LAYERS, batch, rows), (batch, SLOTS)))
    labels = torch.randint(CLASSES, (batch, SLOTS), generator=draw)
    targets = Targets(labels, true.to(dtype), torch.tensor(counts, dtype=torch.int32))
    return logits.to(dtype).requires_grad_(), boxes.to(dtype).requires_grad_(), targets


def loss(logits, boxes, targets):
    return softmax(CONFIG, logits, boxes, targets, GROUPS, targets.counts.sum())


@pytest.mark.parametrize("alpha", [0.3, -1.0])
def test_focal_loss_is_that_of_transformers(alpha):
    theirs = pytest.importorskip("transformers.loss.loss_for_object_detection").sigmoid_focal_loss
    logits, boxes, targets = case((2, 0, 3), contrastive=False)
    config = SimpleNamespace(focal_alpha=alpha, bbox_loss_coefficient=0, giou_loss_coefficient=0)
    total, parts = focal(config, logits, boxes, targets, GROUPS, targets.counts.sum())
    alive = targets.valid[:, None].expand(-1, GROUPS, -1).flatten(1)
    wanted = F.one_hot(targets.labels[:, None].expand(-1, GROUPS, -1).flatten(1)[alive], CLASSES + 1).double()
    expected = [theirs(layer[alive][None], wanted[None], 5 * GROUPS, alpha) * len(wanted) for layer in logits]
    torch.testing.assert_close(parts[:, 0], torch.stack(expected))
    torch.testing.assert_close(total, sum(expected))


def test_without_negatives_the_class_loss_is_the_mean_over_copies():
    logits, boxes, targets = case((2, 0, 3), contrastive=False)
    _, parts = loss(logits, boxes, targets)
    alive = targets.valid[:, None].expand(-1, GROUPS, -1).flatten(1)
    wanted = targets.labels[:, None].expand(-1, GROUPS, -1).flatten(1)[alive]
    for layer in range(LAYERS):
        torch.testing.assert_close(parts[layer, 0], F.cross_entropy(logits[layer][alive], wanted))


@pytest.mark.parametrize("contrastive", [False, True])
def test_gradients_are_those_of_differences(contrastive):
    logits, boxes, targets = case((2, 0), contrastive)
    assert torch.autograd.gradcheck(lambda *given: loss(*given, targets), (logits, boxes))


@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize("counts", [(2, 0, 3), (0, 0)], ids=str)
def test_what_does_not_count_may_hold_anything(counts, contrastive):
    logits, boxes, targets = case(counts, contrastive)
    expected, _ = loss(logits, boxes, targets)
    each = 1 + contrastive
    slot = torch.arange(logits.shape[2]) % (each * SLOTS)
    counted = slot < each * targets.counts[:, None]
    with torch.no_grad():
        logits[:, ~counted] = torch.nan
        boxes[:, ~(counted & (slot % each == 0))] = torch.nan
    found, parts = loss(logits, boxes, targets)
    assert torch.equal(found, expected) and (sum(counts) > 0 or not parts.any())
    for gradient in torch.autograd.grad(found, (logits, boxes)):
        assert gradient.isfinite().all() and not gradient[:, ~counted].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_in_float32_at_least(dtype):
    given = case((3, 1), True, dtype)
    found, _ = loss(*given)
    expected, _ = loss(*(x.detach().double() for x in given[:2]), given[2])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
