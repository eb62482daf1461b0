"""Fused losses in place of those of transformers: equal values and gradients, by the same names."""

from types import SimpleNamespace

import hf_models
import pytest
import torch
import transformers.loss.loss_for_object_detection as loss_for_object_detection
import transformers.loss.loss_lw_detr as loss_lw_detr
from hf_models import CLASSES, GROUPS, QUERIES, labels
from hf_steps import assert_equal_steps, look_far, step
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_lw_detr import LwDetrForObjectDetectionLoss

import dndetr
from dndetr.hf import criterion
from dndetr.hf.matching import MatchedLoss

LAYERS = 3
LOSSES = {"lw": LwDetrForObjectDetectionLoss, "deformable": DeformableDetrForObjectDetectionLoss}
every_loss = pytest.mark.parametrize("name", LOSSES)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def configuration(**changed) -> SimpleNamespace:
    """What the loss functions read of a model's configuration; 3 groups leave 2 of 20 queries over."""
    settings = {
        "class_cost": 1.5,
        "bbox_cost": 5,
        "giou_cost": 2,
        "num_labels": CLASSES,
        "focal_alpha": 0.3,
        "group_detr": GROUPS,
        "auxiliary_loss": True,
        "class_loss_coefficient": 1.3,
        "bbox_loss_coefficient": 4.0,
        "giou_loss_coefficient": 2.5,
        "decoder_layers": LAYERS,
    }
    return SimpleNamespace(**(settings | changed))


def predictions(name: str, images: int, dtype=torch.float32) -> list[torch.Tensor]:
    """Logits and boxes as a loss is given them: of the last layer, of all layers, LW-DETR's also of its encoder."""
    draw = torch.Generator().manual_seed(5)
    sizes = [(), (LAYERS,), ()] if name == "lw" else [(), (LAYERS,)]
    made = []
    for size in sizes:
        shape = (*size, images, QUERIES)
        made.append(2 * torch.randn(*shape, CLASSES, generator=draw, dtype=dtype))
        made.append(0.1 + 0.5 * torch.rand(*shape, 4, generator=draw, dtype=dtype))
    return [x.requires_grad_() for x in made]


def evaluate(loss, inputs, truth, config):
    """The loss function's results, and the gradients of its loss and of every one of its parts in different weights."""
    logits, boxes, *layers = inputs
    total, parts, auxiliary = loss(logits, truth, logits.device, boxes, config, *layers)
    differentiable = [part for part in parts.values() if part.requires_grad]
    mixed = total + sum(number * part for number, part in enumerate(differentiable, 1))
    return total, parts, auxiliary, torch.autograd.grad(mixed, inputs, allow_unused=True)


def assert_equal_losses(name, truth, config, dtype=torch.float32):
    inputs = predictions(name, len(truth), dtype)
    truth = [{**image, "boxes": image["boxes"].to(dtype)} for image in truth]
    theirs, ours = (evaluate(loss, inputs, truth, config) for loss in (LOSSES[name], MatchedLoss(LOSSES[name])))
    close = {"rtol": TOLERANCE[dtype], "atol": 1e-3 * TOLERANCE[dtype]}
    torch.testing.assert_close(ours[0], theirs[0], **close)
    assert list(ours[1]) == list(theirs[1])
    for key, value in theirs[1].items():
        torch.testing.assert_close(ours[1][key], value, **close, msg=key)
    assert str(ours[2]) == str(theirs[2])
    for found, expected in zip(ours[3], theirs[3], strict=True):
        if expected is not None:
            largest = float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=close["rtol"], atol=close["rtol"] * largest)


@every_loss
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0), (12, 1, QUERIES + 4)], ids=str)
def test_losses_and_gradients_are_equal(name, counts, dtype):
    assert_equal_losses(name, labels(*counts), configuration(), dtype)


@every_loss
def test_losses_of_the_last_layer_alone(name):
    assert_equal_losses(name, labels(3, 0, 2), configuration(auxiliary_loss=False))


def test_queries_that_no_group_has_room_for_are_background():
    for groups in (7, QUERIES):
        assert_equal_losses("lw", labels(2, 4), configuration(group_detr=groups))


@every_loss
def test_boxes_without_an_extent_and_boxes_that_are_their_targets(name):
    truth = labels(3, 2)
    inputs = predictions(name, 2)
    with torch.no_grad():
        inputs[1][0, 0, 2:] = 1e-4
        inputs[1][1, :2] = truth[1]["boxes"]
    config = configuration(auxiliary_loss=False)
    theirs, ours = (evaluate(loss, inputs, truth, config) for loss in (LOSSES[name], MatchedLoss(LOSSES[name])))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[3][1], theirs[3][1], rtol=1e-5, atol=1e-4)


@every_loss
def test_what_is_not_a_number_makes_the_loss_none_and_nothing_else(name):
    for broken in (0, 1):
        inputs = predictions(name, 2)
        with torch.no_grad():
            inputs[broken][:] = torch.nan
        total, parts, *_ = evaluate(MatchedLoss(LOSSES[name]), inputs, labels(3, 0), configuration())
        assert total.isnan() and parts["loss_ce" if broken == 0 else "loss_giou"].isnan()
        assert parts["loss_ce_0"].isfinite() and parts["loss_giou_0"].isfinite()


@every_loss
def test_all_layers_and_groups_are_matched_and_summed_in_one_call(name, monkeypatch):
    calls = []
    for op in ("match", "set_loss"):
        monkeypatch.setattr(criterion, op, _noting(calls, getattr(criterion, op)))
    evaluate(MatchedLoss(LOSSES[name]), predictions(name, 2), labels(3, 1), configuration())
    (_, (logits, *_, groups)), (_, (all_logits, *_)) = calls
    assert [op for op, _ in calls] == ["match", "set_loss"]
    assert (logits.shape[0], groups) == ((LAYERS + 1, GROUPS) if name == "lw" else (LAYERS, 1))
    assert logits.shape[2] == QUERIES // groups * groups and all_logits.shape[2] == QUERIES


def _noting(calls, op):
    def call(*arguments):
        calls.append((op.__name__, arguments))
        return op(*arguments)

    return call


@every_loss
def test_the_number_of_objects_is_that_of_transformers_over_processes(name, monkeypatch):
    def single():
        return MatchedLoss(LOSSES[name])(*_arguments(name))[0]

    alone = single()
    if name == "lw":
        monkeypatch.setattr(loss_lw_detr, "_is_torch_distributed_initialized", lambda: True)
        monkeypatch.setattr(loss_lw_detr.dist, "all_reduce", lambda count, op: count.add_(60))
        monkeypatch.setattr(loss_lw_detr.dist, "get_world_size", lambda: 2)
    else:
        state = type("PartialState", (), {"_shared_state": {"some": 1}, "num_processes": 2})
        monkeypatch.setattr(loss_for_object_detection, "PartialState", state, raising=False)
        monkeypatch.setattr(loss_for_object_detection, "reduce", lambda count: count + 60, raising=False)
        monkeypatch.setattr(loss_for_object_detection, "is_accelerate_available", lambda: True)
    theirs = LOSSES[name](*_arguments(name))[0]
    assert abs(theirs - alone) > 0.1 * alone
    torch.testing.assert_close(single(), theirs, rtol=1e-5, atol=0)


def _arguments(name: str):
    logits, boxes, *layers = (x.detach() for x in predictions(name, 2))
    return logits, labels(3, 1), logits.device, boxes, configuration(), *layers


def test_labels_of_no_class_are_named():
    truth = labels(3, 1)
    truth[1]["class_labels"][0] = CLASSES
    with pytest.raises(ValueError, match=f"class_labels must be at least 0 and below {CLASSES}"):
        evaluate(MatchedLoss(LwDetrForObjectDetectionLoss), predictions("lw", 2), truth, configuration())


def test_an_alpha_that_switches_weighting_off_leaves_losses_to_transformers():
    model = hf_models.build("dab", focal_alpha=-1.0)
    before = step(model)
    done = dndetr.accelerate(model)
    assert done.losses is None and str(done).endswith("and the matcher of DeformableDetrHungarianMatcher")
    assert_equal_steps(before, step(model))


@pytest.mark.parametrize("name", ["lw", "rf", "dab", "conditional"])
def test_whole_steps_are_equal(name):
    in_groups = {"num_queries": 16} if name in ("lw", "rf") else {}  # fewer than pixels, and 5 for each of 3 groups
    plain, model = (look_far(hf_models.build(name, **in_groups)) for _ in range(2))
    done = dndetr.accelerate(model)
    assert done.losses == plain.loss_function.__name__ and str(done).endswith(f"the losses of {done.losses}")
    assert len(done.attention) == (2 if in_groups else 0)
    for training in (True, False):  # in evaluation, too, transformers splits the queries into groups to match
        assert_equal_steps(*(step(each.train(training)) for each in (plain, model)))
    done.undo()
    assert model.loss_function is plain.loss_function
