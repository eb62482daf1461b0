"""A second set of queries, trained with repeated targets: apart from the first in training, gone in evaluation."""

import json
from dataclasses import replace
from unittest import mock

import detectors
import numpy as np
import pytest
import torch
from per_layer_losses import per_layer_losses
from short_runs import short_run
from torch.nn.functional import pad

from dndetr import evaluate, export, load
from dndetr.batch import Targets
from dndetr.models.build import build_model
from dndetr.models.dn_detr import Predictions
from dndetr.models.queries import QueryTable
from dndetr.ops import CostWeights, GroupLayout, LossWeights, images_of
from dndetr.training import criterion, loss_window
from dndetr.training.criterion import Criterion, repeated

every_hybrid = pytest.mark.parametrize("name", detectors.HYBRID)


def tables(model) -> list[QueryTable]:
    return [module for module in model.queries.modules() if isinstance(module, QueryTable)]


def decoded(model, batch, groups=2):
    step = detectors.make_step(model, groups)
    return model(images_of(batch), batch.sizes, step.noised(batch, step.draw(batch)))


@every_hybrid
def test_evaluation_is_that_of_the_model_without(name):
    model, batch = detectors.build(name), detectors.make_batch([3, 1], 8)
    plain = build_model(replace(detectors.HYBRID[name], one_to_many=0), detectors.CLASSES).eval()
    own = model.state_dict()
    plain.load_state_dict({key: own[key] for key in plain.state_dict()})
    assert [key for key in own if key not in plain.state_dict()] == [key for key in own if key.endswith(".many")]
    trained = decoded(model, batch)
    for other in (model.eval().infer(batch, torch.float32), plain.infer(batch, torch.float32)):
        assert other.one_to_many is None and other.logits.shape[2] == 12
        torch.testing.assert_close(trained.logits[:, :, trained.layout.denoising :], other.logits, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(model.predict(images_of(batch), batch.sizes), (other.logits, other.boxes), strict=True):
        assert torch.equal(found, wanted[-1])
    assert [x.shape[2] for x in trained.one_to_many] == [20, 20]


@every_hybrid
@pytest.mark.parametrize("anchors", ["normal", "uniform"])
def test_a_seed_makes_the_first_set_and_all_else_the_same_with_it_and_without(name, anchors):
    """So that runs of ``compare`` differ in nothing but the second set."""
    config, weights = replace(detectors.HYBRID[name], anchors=anchors), []
    for one_to_many in (20, 0):
        torch.manual_seed(3)
        weights.append(build_model(replace(config, one_to_many=one_to_many), detectors.CLASSES).state_dict())
    assert all(torch.equal(weights[0][key], value) for key, value in weights[1].items())


@pytest.mark.parametrize("kind", ["uniform", "grid"])
def test_anchors_of_the_second_set_are_placed_as_those_of_the_first(kind):
    model = build_model(replace(detectors.HYBRID["hybrid-dn-detr"], anchors=kind, one_to_many=12), detectors.CLASSES)
    table = model.queries.refpoint_embed
    assert table.many.shape == table.weight.shape and (table.many[:, :2].sigmoid() < 1).all()
    assert torch.equal(table.many, table.weight) == (kind == "grid")


@pytest.mark.parametrize("name", ["hybrid-dn-deformable-detr", "hybrid-dn-detr", "hybrid-dino"])
def test_neither_set_sees_the_other(name):
    """Not by the smallest gradient: of the first set's and the noised queries' outputs by what the second has learned,
    nor of the second's by what the first has, or by the labels of noise."""
    model = detectors.build(name, torch.float64)
    predictions = decoded(model, detectors.make_batch([3, 5], 8, torch.float64))
    first, second = (
        torch.stack([(x * torch.linspace(1, 2, x.numel()).view(x.shape)).sum() for x in of]).sum()
        for of in (predictions[:2], predictions.one_to_many)
    )
    own, many = [table.weight for table in tables(model)], [table.many for table in tables(model)]
    for outputs, seen, hidden in ((first, own, many), (second, many, own)):
        found = torch.autograd.grad(outputs, [*seen, *hidden], retain_graph=True)
        assert all((grad != 0).any() for grad in found[: len(seen)])
        assert all((grad == 0).all() for grad in found[len(seen) :])
    if name != "hybrid-dn-detr":  # whose queries all start from a row of this table
        assert (torch.autograd.grad(second, model.queries.label_enc.weight)[0] == 0).all()


@pytest.mark.parametrize("name", ["hybrid-dino", "hybrid-deformable-detr-two-stage"])
def test_proposals_learn_from_single_targets_alone(name):
    """By copies of targets they would learn to propose every object several times, and a detector has room for few."""
    model, batch = detectors.build(name), detectors.make_batch([3, 5], 8)
    predictions, layers = decoded(model, batch), len(model.decoder.layers)
    assert [len(x) for x in predictions.one_to_many] == [layers, layers]
    heads = list(model.proposals.parameters())
    total = Criterion()(predictions, batch.targets).total
    alone = Criterion()(predictions._replace(one_to_many=None), batch.targets).total
    grads = [torch.autograd.grad(x, heads, retain_graph=True) for x in (total, alone)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_copies_are_beside_each_other_and_objects_come_first():
    targets = repeated(detectors.make_targets([2, 0, 3], 4), 3)
    once = detectors.make_targets([2, 0, 3], 4)
    assert targets.counts.tolist() == [6, 0, 9] and targets.counts.dtype == torch.int32
    rows = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert torch.equal(targets.labels, once.labels[:, rows]) and torch.equal(targets.boxes, once.boxes[:, rows])
    assert targets.valid.sum() == 15


@pytest.mark.parametrize("queries", [20, 7])  # 7 are fewer than there are copies
def test_the_loss_is_that_of_repeated_targets_layer_by_layer(queries):
    draw = torch.Generator().manual_seed(0)
    targets = detectors.make_targets([2, 0, 4], 8, torch.float64)

    def outputs(count, layers=2):
        logits = torch.randn(layers, 3, count, detectors.CLASSES, generator=draw, dtype=torch.float64)
        boxes = torch.rand(layers, 3, count, 4, generator=draw, dtype=torch.float64) * 0.5 + 0.2
        return logits.requires_grad_(), boxes.requires_grad_()

    first, second = outputs(6), outputs(queries)
    predictions = Predictions(*first, GroupLayout(0, 0, 6), one_to_many=second)
    losses = Criterion(one_to_many=0.5, repeats=3)(predictions, targets)
    expected = [
        per_layer_losses(Predictions(*of, GroupLayout(0, 0, of[0].shape[2])), its, CostWeights(), LossWeights())
        for of, its in ((first, targets), (second, repeated(targets, 3)))
    ]
    total = expected[0][0] + 0.5 * expected[1][0]
    torch.testing.assert_close(losses.total, total)
    torch.testing.assert_close(losses.parts, torch.cat([parts for _, parts in expected]))
    assert losses.matches.finite.shape == (4, 3) and losses.matches.target.shape == (2, 3, 6)
    inputs = (*first, *second)
    torch.testing.assert_close(torch.autograd.grad(losses.total, inputs), torch.autograd.grad(total, inputs))


def test_crowded_batches_get_fewer_copies():
    model, batch = detectors.build("hybrid-dn-detr"), detectors.make_batch([3, 1], 8)
    predictions = decoded(model, batch, groups=0)
    with mock.patch.object(criterion, "MOST", 23):
        crowded = Criterion(repeats=6)(predictions, batch.targets).total
    assert torch.equal(crowded, Criterion(repeats=2)(predictions, batch.targets).total)
    assert not torch.equal(crowded, Criterion(repeats=6)(predictions, batch.targets).total)


@every_hybrid
def test_a_step_without_objects_reaches_every_parameter_of_the_second_set(name):
    """Also without noise, and in every row: several processes would wait for what is left out."""
    model = detectors.build(name)
    before = [table.many.clone() for table in tables(model)]
    step = detectors.make_step(model, groups=0)
    losses, norm = step(detectors.make_batch([0, 0], 8))
    assert losses.total.isfinite() and norm > 0
    for table, was in zip(tables(model), before, strict=True):
        assert (table.many != was).any(1).all()


def test_accumulated_batches_give_the_loss_and_gradient_of_one():
    whole = detectors.make_batch([3, 0, 5, 1], 8, torch.float64)
    ends = []
    for batches in ([whole], [detectors.part(whole, slice(0, 1)), detectors.part(whole, slice(1, 4))]):
        losses, norm = detectors.make_step(detectors.build("hybrid-dino", torch.float64), groups=0)(*batches)
        ends.append((losses.total, losses.parts, norm))
    assert losses.parts.shape == (7, 6)
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)


def test_what_is_not_finite_is_named_by_its_set():
    model, batch = detectors.build("hybrid-dino"), detectors.make_batch([3, 1], 8)
    step = detectors.make_step(model)
    with torch.no_grad():
        model.queries.tgt_embed.many[0] = torch.nan
    step(batch)
    with pytest.raises(loss_window.Diverged, match="label of layer 1 of the one-to-many queries") as error:
        loss_window.demand_finite(step.record.first(1), [[7, 8]], 1, 1, 3)
    assert "predictions of layer 1 of the one-to-many queries in image id 7" in str(error.value)
    assert "proposals" not in str(error.value) and "layer 1 in" not in str(error.value)


def run_with(folder, *flags):
    """A run of two steps with the option, and the rows of its log."""
    option = ["--model.one-to-many", "12", "--loss.one-to-many", "0.5", "--loss.repeats", "2", "--log-every", "1"]
    run = short_run(folder, *option, *flags)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return run, [row for row in rows if row["event"] == "train"]


def test_a_run_logs_its_part_and_makes_a_detector(tmp_path):
    run, rows = run_with(tmp_path / "run")
    assert len(rows) == 2 and all(row["one_to_many"] > 0 for row in rows)
    for row in rows:
        assert row["loss"] == pytest.approx(row["matching"] + row["denoising"] + row["one_to_many"], rel=1e-4)
    detector = load(run, "cpu")
    assert detector.model.one_to_many == 12
    (found,) = detector.predict(np.zeros((64, 64, 3), np.uint8), threshold=0)
    assert len(found.scores) > 0


@pytest.mark.slow
def test_a_run_with_proposals_is_evaluated_and_exported(tmp_path, capsys):
    run, rows = run_with(tmp_path / "run", "--model.proposals", "selected")
    for row in rows:
        assert row["loss"] == pytest.approx(row["matching"] + row["denoising"] + row["one_to_many"], rel=1e-4)
    assert evaluate.main([str(run), "--device", "cpu", "--output", str(tmp_path / "evaluation")]) == 0
    assert export.main([str(run), "--output", str(tmp_path / "model.pt2")]) == 0
    assert "the same as the model" in capsys.readouterr().out


def test_slots_without_objects_weigh_nothing():
    """However many there are: labels and boxes there are not looked at, and more of them change nothing."""
    model = detectors.build("hybrid-dn-detr")
    batch = detectors.make_batch([3, 1], 8)
    predictions, targets = decoded(model, batch, groups=0), batch.targets
    wide = Targets(pad(targets.labels, (0, 8)), pad(targets.boxes, (0, 0, 0, 8)), targets.counts)
    assert torch.equal(Criterion()(predictions, targets).total, Criterion()(predictions, wide).total)
