"""Federated annotations in the loss: exactly the sum without what nobody looked for, for every set of queries."""

from dataclasses import replace

import detectors
import pytest
import torch
from federated_losses import case_of, direct, federated_loss
from set_losses import weights_of

from dndetr.batch import Targets, blank_batch
from dndetr.models.dn_detr import Predictions
from dndetr.ops import GroupLayout, images_of, match, set_loss
from dndetr.ops import _set_loss_cases as cases
from dndetr.training.criterion import Criterion, repeated
from dndetr.training.federated import counted_logits
from dndetr.training.transfer import layout_of, pack, unpack

BACKENDS = ["reference", "cpp"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", cases.CASES)
def test_a_weighted_sum_to_the_last_digits(extension, name, backend):
    """Forward and gradient, every kind of class loss, slots and layer; boxes' losses are those of ever."""
    case, options, weights = case_of(name), cases.make_options(name), weights_of(name)
    per_object = cases.DENOISING.get(name, (1,))[0]
    parts = federated_loss(case, weights, backend, options)[1]
    expected, counts = direct(case, weights, options, per_object)
    torch.testing.assert_close(parts[:, [0, 3]], expected, rtol=1e-12, atol=1e-12)
    logits, boxes, matches, layout, targets, normalizers = case
    slant = torch.linspace(0.5, 2, expected.numel(), dtype=torch.float64).view_as(expected)
    found, wanted = (torch.autograd.grad((slant * x).sum(), logits)[0] for x in (parts[:, [0, 3]], expected))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert (found[~counts.expand_as(found)] == 0).all()
    plain = set_loss(logits, boxes, matches, layout, targets, normalizers, weights, backend, **options)[1]
    assert torch.equal(plain[:, [1, 2, 4, 5]], parts[:, [1, 2, 4, 5]])
    if targets.counts.sum() and logits.shape[3] > 1:
        assert (plain[:, 0] > parts[:, 0]).all() or name == "one-class"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["contrastive", "iou", "mal", "position-and-focal", "many-classes"])
def test_exactly_nothing_in_every_dtype(extension, name, dtype, backend):
    case, options, weights = case_of(name, dtype), cases.make_options(name), weights_of(name)
    total, parts = federated_loss(case, weights, backend, options)
    expected, counts = direct(
        (case[0].double(), case[1].double(), *case[2:]), weights, options, cases.DENOISING.get(name, (1,))[0]
    )
    torch.testing.assert_close(parts[:, [0, 3]].double(), expected, rtol=3e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(total, case[0])
    assert (grad[~counts.expand_as(grad)] == 0).all() and (grad[counts.expand_as(grad)] != 0).any()
    # So it is where nothing is verified and nobody is matched: the loss itself is zero.
    nobody = case[2]._replace(target=torch.full_like(case[2].target, -1))
    nothing = replace(case[4], unverified=torch.ones_like(case[4].unverified), counts=torch.zeros_like(case[4].counts))
    total, parts = federated_loss((*case[:2], nobody, case[3], nothing, case[5]), weights, backend, options)
    assert total == 0 and (parts == 0).all() and (torch.autograd.grad(total, case[0])[0] == 0).all()


INTERPRETED = """
import torch
from dndetr.ops import _set_loss_cases as cases
from set_losses import weights_of
from federated_losses import case_of, federated_loss

for name in ("contrastive", "iou-f16", "mal", "position-bf16"):
    dtype = cases.CASES[name][-1]
    case, options, weights = case_of(name, dtype), cases.make_options(name), weights_of(name)
    found = [federated_loss(case, weights, backend, options) for backend in ("triton", "reference")]
    grads = [torch.autograd.grad(total, case[0])[0] for total, _ in found]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)
    assert torch.equal(grads[0] == 0, grads[1] == 0) and (grads[0] == 0).any()
"""


def test_triton_in_the_interpreter(interpreter):
    interpreter(INTERPRETED)


def test_all_verified_is_as_ever_and_so_are_targets_without_the_field():
    logits, _, matches, layout, targets, _ = case_of("contrastive", torch.float32)
    verified = replace(targets, unverified=torch.zeros_like(targets.unverified))
    assert torch.equal(counted_logits(logits, matches, layout, verified), logits)
    assert counted_logits(logits, matches, layout, replace(targets, unverified=None)) is logits


def test_a_not_exhaustive_class_counts_for_its_matched_query_alone():
    """By hand: one image, class 1 annotated in full, class 2 verified to be absent, 0 not exhaustive, 3 never seen."""
    targets = Targets(
        torch.tensor([[0, 1]]),
        torch.rand(1, 2, 4),
        torch.tensor([2], dtype=torch.int32),
        unverified=torch.tensor([[True, False, False, True]]),
    )
    logits = torch.zeros(1, 1, 2 + 3, 4)
    matches = match(logits[:, :, 2:], torch.rand(1, 1, 3, 4), targets)
    matches = matches._replace(target=torch.tensor([[[-1, 1, 0]]], dtype=torch.int32))
    counts = counted_logits(logits, matches, GroupLayout(1, 2, 3), targets)[0, 0] == 0
    assert counts.tolist() == [
        [True, True, True, False],  # made of the object of class 0
        [False, True, True, False],  # of class 1
        [False, True, True, False],  # matched with nothing
        [False, True, True, False],  # with the object of class 1
        [True, True, True, False],  # with that of class 0
    ]


@pytest.mark.parametrize("name", ["hybrid-dn-detr", "hybrid-dino", "hybrid-deformable-detr-two-stage"])
def test_every_set_of_queries(name):
    """Selected proposals, one-to-many and noised queries leave out what is not verified; tokens of no class do not."""
    model, batch = detectors.build(name), detectors.make_batch([3, 5], 8)
    step = detectors.make_step(model, 2)
    predictions = model(images_of(batch), batch.sizes, step.noised(batch, step.draw(batch)))
    unverified = torch.tensor([[True, False, True, False, False], [False] * 5])
    targets, kept = replace(batch.targets, unverified=unverified), {}
    for which in ("logits", "tokens", "one_to_many"):
        of = getattr(predictions, which)
        if of is not None:
            kept[which] = of if which == "logits" else of[0]
    losses = Criterion()(predictions, targets)
    grads = dict(zip(kept, torch.autograd.grad(losses.total, [*kept.values()], retain_graph=True), strict=True))
    plain = Criterion()(predictions, batch.targets)
    before = dict(zip(kept, torch.autograd.grad(plain.total, [*kept.values()]), strict=True))
    objects = set(targets.labels[0, :3].tolist())
    for which, grad in grads.items():
        if which == "tokens":
            assert torch.equal(grad, before[which])
            continue
        assert torch.equal(grad[:, 1], before[which][:, 1])
        assert (before[which][:, 0, :, [0, 2]] != 0).any()
        for label in (0, 2):  # only queries that are to have such a class have a gradient, which is that of ever
            own = grad[:, 0, :, label] != 0
            assert torch.equal(grad[:, 0, :, label][own], before[which][:, 0, :, label][own])
            assert own.any() == (label in objects) and not own.all()
    assert losses.total < plain.total and torch.equal(losses.matches.target, plain.matches.target)


def test_copies_of_targets_keep_what_is_verified():
    targets = replace(detectors.make_targets([2, 0], 4), unverified=torch.rand(2, 5) < 0.5)
    assert repeated(targets, 3).unverified is targets.unverified


def test_it_travels_with_its_batch():
    batch = detectors.federated(detectors.make_batch([3, 1], 8))
    tensors = batch.tensors()
    assert len(tensors) == len(detectors.make_batch([3, 1], 8).tensors()) + 1
    layout = layout_of(tensors)
    arrived = batch.with_tensors(iter(unpack(pack(tensors), layout)))
    assert torch.equal(arrived.targets.unverified, batch.targets.unverified)
    assert batch.to("meta").targets.unverified.is_meta
    assert layout != layout_of(detectors.make_batch([3, 1], 8).tensors())  # another graph
    assert blank_batch(2, (64, 64), 8, federated=7).targets.unverified.shape == (2, 7)


def test_it_asks_nothing_of_the_device(fake_cuda):
    batch = detectors.empty_batch("cuda")
    unverified = torch.empty(2, detectors.CLASSES, dtype=torch.bool, device="cuda")
    targets = replace(batch.targets, unverified=unverified)
    logits, boxes = (torch.empty(3, 2, 2 * 16 + 7, last, device="cuda") for last in (detectors.CLASSES, 4))
    losses = Criterion()(Predictions(logits, boxes, GroupLayout(2, 16, 7)), targets)
    assert losses.total.device.type == "cuda" and losses.parts.shape == (3, 6)
