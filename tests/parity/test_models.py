"""Whole models against the official code: outputs, matching, losses, gradients, optimiser steps, evaluation."""

import functools

import goldens
import pytest
import torch

from dndetr.ops import PARTS, CostWeights, GroupLayout, LossWeights, Matches, set_loss
from dndetr.scoring.coco import postprocess
from dndetr.training.criterion import Criterion
from dndetr.training.optim import build_optimizer

FILES = goldens.model_files()
CASES = [(file, case) for file, content in FILES.items() for case in content["cases"]]
ENCODED = [(file, case) for file, case in CASES if "encoder_memory" in FILES[file]["cases"][case]]
TRAINED = [file for file, content in FILES.items() if "train" in content]

if not FILES:
    pytest.skip(f"no golden models at {goldens.GOLDEN} (set DNDETR_GOLDEN or DNDETR_SHARED)", allow_module_level=True)


def golden(file: str) -> dict:
    content = FILES[file]
    if content["meta"]["variant"] not in goldens.VARIANTS:
        pytest.skip(f"{content['meta']['variant']} is not one of our models")
    return content


def criterion(meta: dict) -> Criterion:
    cost, alpha = meta["cost"], meta["focal_alpha"]
    return Criterion(
        CostWeights(float(cost["class"]), float(cost["bbox"]), float(cost["giou"]), alpha), LossWeights(alpha=alpha)
    )


def forward(model, content, case, draws, dtype, slots=None):
    """One training forward with recorded draws -> predictions, targets, losses."""
    meta = content["meta"]
    targets = goldens.case_targets(case, dtype, slots)
    noised = goldens.recorded_queries(content, case, draws, targets)
    predictions = model(*goldens.images(content, dtype), noised)
    losses = criterion(meta)(predictions, targets)
    if meta["variant"] == "dn_dab_dino_deformable_detr":
        losses = with_boxes_of_first_half(predictions, targets, losses)
    return predictions, targets, losses


def with_boxes_of_first_half(predictions, targets, losses):
    """The losses as the DINO in DN-DETR's repository has them: boxes of the first half of a batch's entries.

    These are the positives where there is one image. Of more, objects of the later ones are restored by nobody, and of
    the first ones also from their negatives.
    """
    layout = predictions.layout
    first = torch.full((len(targets.counts), layout.denoising), -1, dtype=torch.int32)
    image, group, number, second, negative = goldens.concatenated_entries(targets, layout.groups)
    rows = group * layout.slots + 2 * number + second
    first[image[~negative], rows[~negative]] = number[~negative].to(torch.int32)
    layers = len(predictions.logits)
    matches = Matches(None, first.expand(layers, -1, -1), None)
    noised = (x[:, :, : layout.denoising] for x in predictions[:2])
    divisors = targets.counts.sum().clamp(min=1).to(predictions.boxes.dtype).repeat(2) * layout.groups
    _, parts = set_loss(*noised, matches, GroupLayout(0, 0, layout.denoising), targets, divisors)
    own = losses.parts[-layers:, 4:]
    weights = own.new_tensor(LossWeights()[1:3])
    total = losses.total + ((parts[:, 1:3] - own) * weights).sum()
    decoder = torch.cat((losses.parts[-layers:, :4], parts[:, 1:3]), dim=1)
    return losses._replace(total=total, parts=torch.cat((losses.parts[:-layers], decoder)))


@functools.cache
def run(file: str, name: str, dtype: torch.dtype, slots: int | None = None):
    content = golden(file)
    model = goldens.load_model(content, dtype)
    case = content["cases"][name]
    predictions, targets, losses = forward(model, content, case, case["dn"], dtype, slots)
    losses.total.backward()
    return model, predictions, targets, losses


def close(actual, expected, dtype, tight=1e-9, loose=1e-4):
    """Relative to the largest magnitude: 1e-9 in float64, 1e-4 in float32."""
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    tolerance = (tight if dtype == torch.float64 else loose) * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=tolerance)


both = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
every_case = pytest.mark.parametrize(("file", "name"), CASES, ids=[f"{file}-{case}" for file, case in CASES])


@both
@every_case
def test_every_layer(file, name, dtype):
    _, predictions, targets, _ = run(file, name, dtype)
    case = FILES[file]["cases"][name]
    expected, own = case["outputs"], predictions.layout.denoising
    logits, boxes = predictions.logits[predictions.proposals :], predictions.boxes[predictions.proposals :]
    close(logits[:, :, own:], expected["pred_logits"], dtype)
    close(boxes[:, :, own:], expected["pred_boxes"], dtype)
    if expected["dn_logits"].shape[2]:
        rows = goldens.rows_of(FILES[file], case, targets)
        images = torch.arange(len(rows))[:, None]
        close(logits[:, images, rows], expected["dn_logits"], dtype)
        close(boxes[:, images, rows], expected["dn_boxes"], dtype)
    proposed = {0: (), 1: (predictions.logits[0, :, own:], predictions.boxes[0, :, own:])}[predictions.proposals]
    proposed = proposed if predictions.tokens is None else [x[0] for x in predictions.tokens]
    recorded = [value for key, value in expected.items() if key.startswith(("interm_pred", "enc_pred"))]
    for ours, theirs in zip(proposed, recorded, strict=True):
        close(ours, theirs, dtype)


@both
@every_case
def test_matching(file, name, dtype):
    case = FILES[file]["cases"][name]
    if dtype == torch.float32 and not case.get("fp32_official", {}).get("matcher_equal", True):
        pytest.skip("the official matching is not the same in float32 either")
    _, _, _, losses = run(file, name, dtype)
    for layer, images in enumerate(([case["matcher_interm"]] if "matcher_interm" in case else []) + case["matcher"]):
        for image, (queries, targets) in enumerate(images):
            ours = losses.matches.target[layer, image]
            expected = torch.full_like(ours, -1)
            expected[queries] = targets.to(ours.dtype)
            assert torch.equal(ours, expected)


def terms_of(recorded: dict, layer: int, decoder_layers: int) -> dict[str, str]:
    """Our parts of a layer, counted from the first of the decoder -> official names of the terms."""
    kinds = ("ce", "bbox", "giou")
    if layer < 0:
        suffix = "interm" if "loss_ce_interm" in recorded else "enc"
        return {part: f"loss_{kind}_{suffix}" for part, kind in zip(PARTS, kinds, strict=False)}
    suffix = "" if layer == decoder_layers - 1 else f"_{layer}"
    noised = "loss_{}_dn" if "loss_ce_dn" in recorded else "tgt_loss_{}"
    names = [f"loss_{kind}" for kind in kinds] + [noised.format(kind) for kind in kinds]
    return {part: name + suffix for part, name in zip(PARTS, names, strict=True)}


@both
@every_case
def test_losses(file, name, dtype):
    _, predictions, targets, losses = run(file, name, dtype)
    recorded = FILES[file]["cases"][name]["losses"]
    compared = set()
    layers = FILES[file]["meta"]["dec_layers"]
    for layer, parts in enumerate(losses.parts, start=layers - len(losses.parts)):
        names = terms_of(recorded, layer, layers)
        for part, value in zip(PARTS, parts, strict=True):
            close(value, recorded[names[part]] if part in names else 0.0, dtype)
        compared |= set(names.values())
        if layer >= 0:
            suffix = "" if layer == layers - 1 else f"_{layer}"
            for term, value in logged_terms(predictions, targets, losses, layer - layers).items():
                if term + suffix in recorded:
                    close(value, recorded[term + suffix], dtype)
    close(losses.total, FILES[file]["cases"][name]["total_loss"], dtype)
    weighted = {term for term in FILES[file]["cases"][name]["weight_dict"] if not term.endswith(("interm", "enc"))}
    assert compared >= weighted


def logged_terms(predictions, targets, losses, layer: int) -> dict:
    """What the official code only logs: parts of the L1 loss, class and cardinality errors, in per cent and objects."""
    matched, own = losses.matches.target[layer].long(), predictions.layout.denoising
    logits, boxes = predictions.logits[layer], predictions.boxes[layer]
    image, query = (matched >= 0).nonzero(as_tuple=True)
    target = matched[image, query]
    l1 = (boxes[image, query + own] - targets.boxes[image, target]).abs()
    objects = targets.counts.sum().clamp(min=1)
    wrong = logits[image, query + own].argmax(-1) != targets.labels[image, target]
    predicted = (logits[:, own:].argmax(-1) != logits.shape[-1] - 1).sum(1)
    terms = {
        "loss_xy": l1[:, :2].sum() / objects,
        "loss_hw": l1[:, 2:].sum() / objects,
        "cardinality_error": (predicted - targets.counts).abs().double().mean(),
        "class_error": 100 * wrong.double().mean() if len(wrong) else torch.tensor(100.0),
    }
    if targets.counts.any() and predictions.layout.slots == targets.labels.shape[1]:
        groups = predictions.layout.groups
        guess = logits[:, :own].argmax(-1).view(len(logits), groups, -1)
        missed = (guess != targets.labels[:, None])[targets.valid[:, None].expand_as(guess)]
        terms["tgt_class_error"] = 100 * missed.double().mean()
    return terms


@both
@every_case
def test_gradients(file, name, dtype):
    model, *_ = run(file, name, dtype)
    case = FILES[file]["cases"][name]
    ours = goldens.names(FILES[file], model)
    parameters = dict(model.named_parameters())
    compared = 0
    for theirs, norm in case["grad_norm"].items():
        gradient = parameters[ours[theirs]].grad
        if norm == -1:
            assert gradient is None, theirs
            continue
        gradient = torch.zeros(()) if gradient is None else gradient
        assert abs(gradient.norm().item() - norm) <= (1e-9 if dtype == torch.float64 else 1e-4) * max(1.0, norm), theirs
        close(gradient.sum(), case["grad_sum"][theirs], dtype, tight=1e-9 * max(1.0, norm), loose=1e-4 * max(1.0, norm))
        compared += 1
    assert compared == sum(parameter.requires_grad for parameter in parameters.values())
    for theirs, gradient in case.get("grads", {}).items():
        close(parameters[ours[theirs]].grad, gradient, dtype)


@every_case
def test_generous_slots_change_nothing(file, name):
    """More slots than objects, as with bucketed targets, give the official loss and gradients all the same."""
    content, dtype = golden(file), torch.float64
    case = content["cases"][name]
    most = max(len(target["labels"]) for target in case["targets"])
    model, predictions, _, losses = run(file, name, dtype, slots=max(16, most + 3))
    close(losses.total, case["total_loss"], dtype)
    own = predictions.layout.denoising
    close(predictions.logits[predictions.proposals :, :, own:], case["outputs"]["pred_logits"], dtype)
    parameters = dict(model.named_parameters())
    for theirs, ours in goldens.names(content, model).items():
        norm = case["grad_norm"].get(theirs, -1)
        if norm >= 0 and parameters[ours].grad is not None:
            assert abs(parameters[ours].grad.norm().item() - norm) <= 1e-9 * max(1.0, norm), theirs


@pytest.mark.parametrize("file", TRAINED)
def test_four_optimizer_steps(file):
    content, dtype = golden(file), torch.float64
    record = content["train"]
    case = content["cases"][record["case"]]
    model = goldens.load_model(content, dtype)
    model.load_state_dict({k: v.to(dtype) for k, v in model.state_dict().items()})
    optimizer = build_optimizer(
        model, record["lr"], record["lr_backbone"] / record["lr"], record["weight_decay"], tuple(record["betas"])
    )
    for step, draws in enumerate(record["draws"]):
        _, _, losses = forward(model, content, case, draws, dtype)
        close(losses.total, record["total_loss"][step], dtype)
        optimizer.zero_grad()
        losses.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), record["clip_max_norm"])
        close(norm, record["grad_norm_preclip"][step], dtype)
        optimizer.step()
    state, names = model.state_dict(), goldens.names(content, model)
    for theirs, ours in names.items():
        if theirs not in record["param_norm_after"]:
            continue  # another name of a tensor that was compared
        close(state[ours].norm(), record["param_norm_after"][theirs], dtype)
        before = content["state_dict"][theirs].to(dtype)
        close((state[ours] - before).norm(), record["param_delta_norm"][theirs], dtype)
    for theirs, value in record["params_after"].items():
        close(state[names[theirs]], value, dtype)


@both
@every_case
def test_evaluation(file, name, dtype):
    content = golden(file)
    case = content["cases"][name]
    model = goldens.load_model(content, dtype).eval()
    logits, boxes = model.predict(*goldens.images(content, dtype))
    close(logits, case["eval"]["pred_logits"], dtype)
    close(boxes, case["eval"]["pred_boxes"], dtype)
    sizes = torch.stack([target["orig_size"] for target in case["targets"]])
    keep = len(case["eval"]["postprocess"][0]["scores"])
    detections = postprocess(logits, boxes, sizes, keep)
    for image, expected in enumerate(case["eval"]["postprocess"]):
        close(detections.scores[image], expected["scores"], dtype)
        if dtype == torch.float64:  # in float32 near-equal scores may change places
            assert torch.equal(detections.labels[image], expected["labels"])
            close(detections.boxes_xyxy[image], expected["boxes"], dtype)


@pytest.mark.parametrize(("file", "name"), ENCODED, ids=[f"{file}-{case}" for file, case in ENCODED])
def test_encoder_memory(file, name):
    case = golden(file)["cases"][name]
    model = goldens.load_model(FILES[file], torch.float64).eval()
    images, sizes = goldens.images(FILES[file], torch.float64)
    with torch.no_grad():
        maps = model.backbone(images)
        for ours, theirs in zip(maps, case["backbone"]["features"], strict=False):
            close(ours, theirs, torch.float64)
        features = model.encoder(model.projection(maps, sizes, tuple(images.shape[-2:])))
    close(features.tokens, case["encoder_memory"], torch.float64)
