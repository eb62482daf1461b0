"""Contrastive denoising in Hugging Face models: its loss, what its queries see, and where negatives start."""

import hf_models
import torch
import torch.nn.functional as F
from hf_models import every_model, labels, pixels, reference_points
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_for_object_detection import box_iou, generalized_box_iou

import dndetr
from dndetr.denoising import draw_noise, noised_queries
from dndetr.hf.labels import to_targets
from dndetr.ops import anchor_encoding

COUNTS, GROUPS = (3, 0, 1), 2
SLOTS = 2 * max(COUNTS)


def contrastive(name: str, shake: float = 0.2, **settings):
    """A denoised model whose weights make every query listen to every other."""
    model = hf_models.build(name)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += shake * torch.randn(parameter.shape, generator=draw)
    return dndetr.denoise(model, groups=GROUPS, contrastive=True, **settings).train()


def run(model):
    """A forward pass with seeded noise."""
    torch.manual_seed(0)
    return model(pixels(len(COUNTS)), labels=labels(*COUNTS))


def recorded(model) -> list:
    """Arguments that the loss function will have got: logits, labels, device, boxes, config and those of all layers."""
    calls, loss = [], model.loss_function

    def record(*args, **kwargs):
        calls.append(args)
        return loss(*args, **kwargs)

    model.loss_function = record
    return calls


def focal(logit, label, positive: bool, overlap, config):
    """Class loss of one query, and what it adds to the divisor."""
    wanted = F.one_hot(label, logit.shape[-1]).float() * positive
    away = (logit.sigmoid() - wanted).abs()
    balance = torch.where(wanted == 1, config.focal_alpha, 1 - config.focal_alpha)
    term = F.binary_cross_entropy_with_logits(logit, wanted, reduction="none")
    return (balance * away**2 * term).sum(), positive


def quality(logit, label, positive: bool, overlap, config):
    """The same for LW-DETR and RF-DETR: as transformers writes it, for one query."""
    p = logit.sigmoid()
    wanted, weight = torch.zeros_like(p), p**2
    if positive:
        wanted[label] = (p[label] ** config.focal_alpha * overlap ** (1 - config.focal_alpha)).clamp(min=0.01).detach()
        weight = torch.where(wanted > 0, 1 - wanted, weight)
    return -(wanted * p.log() + weight * (1 - p).log()).sum(), positive


def softmax(logit, label, positive: bool, overlap, config):
    """The same for DETR, whose last class is no object."""
    weight = 1.0 if positive else config.eos_coefficient
    return weight * F.cross_entropy(logit, label if positive else torch.tensor(len(logit) - 1)), weight


def one_by_one(logits, boxes, class_loss, config) -> list:
    """Class, L1 and GIoU loss of one layer's noised queries [B, GROUPS * SLOTS, ...], a query after the other."""
    sums, divisor = [0.0, 0.0, 0.0], 0.0
    for image, objects in enumerate(labels(*COUNTS)):
        for group in range(GROUPS):
            for number, (label, box) in enumerate(zip(objects["class_labels"], objects["boxes"], strict=True)):
                positive = group * SLOTS + 2 * number
                found = boxes[image, positive]
                corners = [center_to_corners_format(x[None]) for x in (found, box)]
                overlap = box_iou(*corners)[0][0, 0]
                for row in (positive, positive + 1):
                    term, share = class_loss(logits[image, row], label, row == positive, overlap, config)
                    sums[0], divisor = sums[0] + term, divisor + share
                sums[1] += (found - box).abs().sum()
                sums[2] += 1 - generalized_box_iou(*corners)[0, 0]
    objects = sum(COUNTS) * GROUPS
    return [sums[0] / divisor, sums[1] / objects, sums[2] / objects]


@every_model
def test_the_loss_is_that_of_the_definition(name):
    model = contrastive(name, weight=0.5)
    calls = recorded(model)
    output = run(model)
    ((logits, targets, device, boxes, config, all_logits, all_boxes, *of_encoder),) = calls
    class_loss = {"detr": softmax, "lw": quality, "rf": quality}.get(name, focal)
    noised = GROUPS * SLOTS
    own, _, _ = model.denoising.own_loss(
        *(logits[:, noised:], targets, device, boxes[:, noised:], config),
        *(all_logits[:, :, noised:], all_boxes[:, :, noised:], *of_encoder),
    )
    added = 0.0
    for layer, (some_logits, some_boxes) in enumerate(zip(all_logits, all_boxes, strict=True)):
        suffix = "" if layer == len(all_logits) - 1 else f"_{layer}"
        coefficients = {"ce": 1, "bbox": config.bbox_loss_coefficient, "giou": config.giou_loss_coefficient}
        parts = one_by_one(some_logits, some_boxes, class_loss, config)
        for (part, coefficient), value in zip(coefficients.items(), parts, strict=True):
            torch.testing.assert_close(output.loss_dict[f"dn_loss_{part}{suffix}"], value, rtol=1e-4, atol=1e-5)
            added += coefficient * value
    torch.testing.assert_close(output.loss, own + 0.5 * added, rtol=1e-4, atol=1e-4)


@every_model
def test_negatives_learn_a_class_and_no_box(name):
    model = contrastive(name)
    calls = recorded(model)
    loss = run(model).loss
    of_logits, of_boxes = torch.autograd.grad(loss, calls[0][5:7])
    noised = GROUPS * SLOTS
    for image, count in enumerate(COUNTS):
        trained = [
            gradient[:, image, :noised].unflatten(1, (GROUPS, SLOTS)).abs().sum(-1) > 0
            for gradient in (of_logits, of_boxes)
        ]
        assert trained[0][:, :, : 2 * count].all() and not trained[0][:, :, 2 * count :].any()
        assert trained[1][:, :, : 2 * count : 2].all() and not trained[1][:, :, 1::2].any()
        assert not trained[1][:, :, 2 * count :].any()


@every_model
def test_a_group_sees_its_negatives_and_nobody_else_does(name):
    model = contrastive(name)
    calls = recorded(model)
    run(model)

    def change(module, args, output):
        output = output.clone()
        output[:, 0, 1::2] += 1.0
        return output

    model.denoising.embedding.label.register_forward_hook(change)
    run(model)
    moved = (calls[1][0] - calls[0][0]).abs().amax(-1)  # [B, Q]
    groups = moved[:, : GROUPS * SLOTS].unflatten(1, (GROUPS, SLOTS))
    for image, count in enumerate(COUNTS):
        assert (groups[image, 0, : 2 * count] > 1e-4).all()
        assert (groups[image, 1:] < 1e-5).all()
        assert (moved[image, GROUPS * SLOTS :] < 1e-5).all()


def test_slots_without_an_object_are_seen_by_nobody():
    model = contrastive("deformable")
    run(model)
    noised, queries = GROUPS * SLOTS, GROUPS * SLOTS + hf_models.QUERIES
    for image, count in enumerate(COUNTS):
        expected = torch.tensor(
            [
                [
                    key >= noised or (key // SLOTS == query // SLOTS and key % SLOTS < 2 * count)
                    for key in range(queries)
                ]
                for query in range(queries)
            ]
        )
        assert torch.equal(model.denoising.step.mask[image, 0] == 0, expected)


@every_model
def test_corners_that_have_passed_each_other_make_small_boxes(name):
    model = contrastive(name, shake=0.0, label_noise=0.0, box_noise=1.0)
    outputs, encoded = [], []
    model.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    if (position := model.denoising.embedding.position) is not None:
        position.register_forward_hook(lambda module, args, output: encoded.append(args[0]))
    run(model).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    torch.manual_seed(0)
    targets = to_targets(labels(*COUNTS), torch.device("cpu"))
    noise = draw_noise(targets, GROUPS, hf_models.CLASSES, contrastive=True)
    raw = noised_queries(targets, noise, 0.0, 1.0, contrastive=True)
    assert (raw.boxes[..., 2:] < 0).any()
    expected = raw.boxes.clamp(0.001, 0.999).flatten(1, 2)
    (output,) = outputs
    live = raw.live[:, None].expand(-1, GROUPS, -1).flatten(1)
    if name != "detr":
        points = reference_points(name, output)[:, : GROUPS * SLOTS]
        torch.testing.assert_close(points[live], expected[..., : points.shape[-1]][live], rtol=0, atol=1e-5)
    if position is not None:
        torch.testing.assert_close(encoded[0][live], anchor_encoding(expected, 16)[live], rtol=0, atol=1e-4)


def test_it_can_be_turned_on_and_off_between_steps():
    plain, model = (dndetr.denoise(hf_models.build("deformable").train(), groups=GROUPS) for _ in range(2))
    model.denoising.load_state_dict(plain.denoising.state_dict())
    state = [(key, value.clone()) for key, value in model.denoising.state_dict().items()]
    expected = run(plain)
    for on in (True, False):
        model.denoising.contrastive = on
        output = run(model)
        assert model.denoising.step.layout == (GROUPS, (1 + on) * max(COUNTS), hf_models.QUERIES)
        assert torch.equal(output.loss, expected.loss) is not on
        assert output.logits.shape == expected.logits.shape and output.loss_dict.keys() == expected.loss_dict.keys()
        assert [key for key, _ in state] == list(model.denoising.state_dict())
        assert all(torch.equal(value, model.denoising.state_dict()[key]) for key, value in state)
        assert model.state_dict().keys() == plain.state_dict().keys()


def test_without_noise_both_copies_are_the_object():
    model = contrastive("deformable-two-stage", label_noise=0.0, box_noise=0.0)
    run(model)
    noised = model.denoising.step.noised
    for rows in (slice(0, 6, 2), slice(1, 6, 2)):
        torch.testing.assert_close(noised.boxes[0, 1, rows], labels(*COUNTS)[0]["boxes"])
        assert torch.equal(noised.labels[0, 1, rows], labels(*COUNTS)[0]["class_labels"])
