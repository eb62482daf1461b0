"""The method: what a denoising query may depend on, and what must never depend on it."""

from dataclasses import replace

import detectors
import pytest
import torch
from torch.nn.functional import pad

from dndetr.batch import Targets
from dndetr.boxes import cxcywh_to_xyxy
from dndetr.denoising import Noise, denoising_loss, draw_noise, noised_queries
from dndetr.ops import images_of, match, set_loss
from dndetr.training.criterion import Criterion

every_model = pytest.mark.parametrize("name", detectors.CONFIGS)
GROUPS = 3
COUNTS = [3, 0, 6, 1]


def fixed_noise(batch: int, slots: int, contrastive: bool = False, classes: int = detectors.CLASSES) -> Noise:
    """Noise whose draws for a slot do not depend on the number of slots or images."""
    slots *= 2 if contrastive else 1
    draws = []
    for image in range(batch):
        generator = torch.Generator().manual_seed(7 + image)
        largest = 128
        flip, box = (torch.rand(GROUPS, largest, n, generator=generator, dtype=torch.float64) for n in (1, 4))
        label = torch.randint(classes, (GROUPS, largest), generator=generator)
        draws.append((flip[..., 0], label, box))
    flip, label, box = (torch.stack(part)[:, :, :slots] for part in zip(*draws, strict=True))
    return Noise(flip, label, box)


def run(name: str, counts=COUNTS, slots: int = 8, only: int | None = None, batch_active: bool = False):
    """A training forward in float64 on a fixed canvas -> predictions, targets; of one image alone with ``only``."""
    model = detectors.build(name, dtype=torch.float64).eval()
    batch = detectors.make_batch(counts, slots, torch.float64)
    contrastive = name == "dino"
    noise = fixed_noise(len(counts), slots, contrastive)
    images, sizes, targets = images_of(batch), batch.sizes, batch.targets
    if only is not None:
        one = slice(only, only + 1)
        images, sizes, noise = images[one], sizes[one], Noise(*(part[one] for part in noise))
        targets = Targets(targets.labels[one], targets.boxes[one], targets.counts[one])
    noised = noised_queries(targets, noise, batch_active=batch_active, contrastive=contrastive)
    with torch.no_grad():
        return model(images, sizes, noised), targets


def per_image(predictions, targets):
    """Un-normalised loss terms of each image: [B, Y, 6]."""
    terms = []
    for image in range(len(targets.counts)):
        one = slice(image, image + 1)
        logits, boxes = predictions.logits[:, one], predictions.boxes[:, one]
        alone = Targets(targets.labels[one], targets.boxes[one], targets.counts[one])
        noised = predictions.layout.denoising
        matches = match(logits[:, :, noised:], boxes[:, :, noised:], alone)
        unit = torch.ones(2, dtype=logits.dtype)
        counted = predictions.counted[one]
        terms.append(
            set_loss(
                logits,
                boxes,
                matches,
                predictions.layout,
                alone,
                unit,
                Criterion().weights,
                counted=counted,
                proposals=predictions.proposals,
            )[1]
        )
    return torch.stack(terms)


def live_rows(predictions, targets, image: int):
    """Outputs of an image's live denoising queries, group by group, then of its matching queries."""
    layout = predictions.layout
    count = int(targets.counts[image]) * (layout.slots // targets.labels.shape[1])
    rows = []
    for x in (predictions.logits[:, image], predictions.boxes[:, image]):
        noised = x[:, : layout.denoising].unflatten(1, (layout.groups, layout.slots))[:, :, :count].flatten(1, 2)
        rows.append(torch.cat((noised, x[:, layout.denoising :]), dim=1).flatten())
    return torch.cat(rows)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@every_model
@pytest.mark.parametrize("slots", [6, 16, 64])
def test_the_bucket_does_not_matter(name, slots):
    small, targets = run(name, slots=8)
    large, padded = run(name, slots=slots)
    for image in range(len(COUNTS)):
        close(live_rows(small, targets, image), live_rows(large, padded, image))
    close(per_image(small, targets), per_image(large, padded))
    close(Criterion()(small, targets).total, Criterion()(large, padded).total)


@every_model
def test_the_other_images_do_not_matter(name):
    together, targets = run(name)
    losses = per_image(together, targets)
    for image in range(len(COUNTS)):
        alone, own = run(name, only=image)
        close(live_rows(together, targets, image), live_rows(alone, own, 0))
        close(losses[image], per_image(alone, own)[0])


def test_official_padding_does_depend_on_the_others():
    """The quirk that the default leaves out; if this fails, the two settings are one."""
    together, targets = run("dn-detr", batch_active=True)
    alone, own = run("dn-detr", only=0, batch_active=True)
    assert (live_rows(together, targets, 0) - live_rows(alone, own, 0)).abs().max() > 1e-6


@every_model
def test_matching_queries_do_not_see_the_ground_truth(name):
    model = detectors.build(name, dtype=torch.float64).eval()
    batch = detectors.make_batch(COUNTS, 8, torch.float64)
    contrastive = name == "dino"
    noise = fixed_noise(len(COUNTS), 8, contrastive)
    other = Targets((batch.targets.labels + 1) % detectors.CLASSES, 1 - batch.targets.boxes, batch.targets.counts)
    outputs = []
    with torch.no_grad():
        for targets in (batch.targets, other):
            noised = noised_queries(targets, noise, contrastive=contrastive)
            predictions = model(images_of(batch), batch.sizes, noised)
            noised = predictions.layout.denoising
            outputs.append((predictions.logits[:, :, noised:], predictions.boxes[:, :, noised:]))
        outputs.append(model(images_of(batch), batch.sizes)[:2])
    for changed in outputs[1:]:
        close(outputs[0][0], changed[0])
        close(outputs[0][1], changed[1])


@every_model
def test_groups_do_not_see_each_other(name):
    model = detectors.build(name, dtype=torch.float64).eval()
    batch = detectors.make_batch(COUNTS, 8, torch.float64)
    contrastive = name == "dino"
    noise = fixed_noise(len(COUNTS), 8, contrastive)
    order = torch.tensor([2, 0, 1])
    permuted = Noise(*(part[:, order] for part in noise))
    with torch.no_grad():
        plain, turned = (
            model(images_of(batch), batch.sizes, noised_queries(batch.targets, each, contrastive=contrastive))
            for each in (noise, permuted)
        )
    noised = plain.layout.denoising
    for a, b in zip(plain[:2], turned[:2], strict=True):
        grouped = a[:, :, :noised].unflatten(2, (GROUPS, -1))[:, :, order].flatten(2, 3)
        close(grouped, b[:, :, :noised])
        close(a[:, :, noised:], b[:, :, noised:])


def test_padding_the_canvas_does_not_matter_to_the_encoder():
    """dn-detr hides every padded pixel (group norm and strided levels of the other models see the padding)."""
    model = detectors.build("dn-detr", dtype=torch.float64).eval()
    width = model.projection.projections[0].in_channels
    small = torch.randn(2, width, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sizes = torch.tensor([[96, 128], [96, 128]])
    with torch.no_grad():
        plain = model.encoder(model.projection([small], sizes, (96, 128)))
        large = model.encoder(model.projection([pad(small, (0, 4, 0, 6), value=9.0)], sizes, (192, 192)))
    close(plain.tokens[plain.valid], large.tokens[large.valid])


def test_noise_is_what_the_paper_says():
    targets = detectors.make_targets([8] * 64, 8)
    noise = draw_noise(targets, 40, detectors.CLASSES, torch.Generator().manual_seed(0))
    noised = noised_queries(targets, noise, label_noise=0.2, box_noise=0.4)
    clean_labels, clean = targets.labels[:, None], targets.boxes[:, None]
    changed = (noised.labels != clean_labels).double().mean()
    assert abs(changed - 0.2 * (1 - 1 / detectors.CLASSES)) < 0.01  # a random label may be the right one
    shift = (noised.boxes - clean)[..., :2] / (clean[..., 2:] / 2)
    scale = noised.boxes[..., 2:] / clean[..., 2:]
    assert shift.abs().max() <= 0.4 + 1e-5 and shift.abs().max() > 0.39
    assert scale.min() >= 0.6 - 1e-5 and scale.max() <= 1.4 + 1e-5
    assert noised.active.tolist() == [8] * 64 and noised.live.all()


def test_contrastive_noise_is_what_the_paper_says():
    targets = detectors.make_targets([8] * 64, 8)
    noise = draw_noise(targets, 40, detectors.CLASSES, torch.Generator().manual_seed(0), contrastive=True)
    noised = noised_queries(targets, noise, label_noise=0.25, box_noise=0.4, contrastive=True)
    assert noised.active.tolist() == noised.counted.tolist() == [16] * 64 and noised.live.all()
    labels, boxes, valid = noised.positives(targets)
    assert torch.equal(valid, targets.valid)
    negative_labels, negative_boxes = noised.labels[:, :, 1::2], noised.boxes[:, :, 1::2]
    clean = targets.boxes[:, None]
    for some in (labels, negative_labels):
        assert abs((some != targets.labels[:, None]).double().mean() - 0.25 * (1 - 1 / detectors.CLASSES)) < 0.01
    # Moved corners, in halves of the size: up to the bound for positives, from there to twice as much for negatives.
    near, far = (
        ((cxcywh_to_xyxy(some) - cxcywh_to_xyxy(clean)).abs() / (clean[..., 2:] / 2).repeat(1, 1, 1, 2))
        for some in (boxes, negative_boxes)
    )
    assert near.max() <= 0.4 + 1e-4 and near.max() > 0.39 and near.min() < 0.01
    assert far.max() <= 0.8 + 1e-4 and far.max() > 0.79 and far.min() >= 0.4 - 1e-4
    assert ((cxcywh_to_xyxy(negative_boxes) > cxcywh_to_xyxy(clean)).double().mean() - 0.5).abs() < 0.01


def test_corners_may_pass_each_other_but_not_the_border():
    targets = detectors.make_targets([8] * 16, 8)
    noise = draw_noise(targets, 10, detectors.CLASSES, torch.Generator().manual_seed(0), contrastive=True)
    boxes = noised_queries(targets, noise, box_noise=1.0, contrastive=True).boxes
    corners = cxcywh_to_xyxy(boxes)
    assert corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6
    assert (boxes[:, :, 1::2, 2:] < 0).any() and (boxes[:, :, ::2, 2:] >= -1e-6).all()


def test_noise_for_other_slots_is_refused():
    targets = detectors.make_targets([2], 8)
    noise = draw_noise(targets, 2, detectors.CLASSES)
    with pytest.raises(ValueError, match="noise for 8 slots of a group, but there are 16"):
        noised_queries(targets, noise, contrastive=True)


@pytest.mark.parametrize("name", ["dn-detr", "dino"])
def test_more_slots_do_not_move_the_noise(name):
    narrow, wide = (detectors.make_step(detectors.build(name)) for _ in range(2))
    each = narrow.denoising.copies
    for counts in ([3, 8], [0, 1]):
        few, many = (detectors.make_batch(counts, slots) for slots in (8, 32))
        many = replace(many, targets=replace(many.targets, needed=8))
        for a, b in zip(narrow.draw(few), wide.draw(many), strict=True):
            assert b.shape[2] == 32 * each and torch.equal(a, b[:, :, : 8 * each]) and not b[:, :, 8 * each :].any()
    assert torch.equal(narrow.noise_generator.get_state(), wide.noise_generator.get_state())


@pytest.mark.parametrize("contrastive", [False, True])
def test_without_noise_the_targets_come_back(contrastive):
    targets = detectors.make_targets([2, 0], 8)
    noise = draw_noise(targets, 2, detectors.CLASSES, contrastive=contrastive)
    noised = noised_queries(targets, noise, 0.0, 0.0, contrastive=contrastive)
    assert noised.labels.shape[2] == 8 * (1 + contrastive)
    labels, boxes, valid = noised.positives(targets)
    assert torch.equal(valid, targets.valid)
    assert torch.equal(labels, targets.labels[:, None].expand(-1, 2, -1))
    close(boxes, targets.boxes[:, None].expand(-1, 2, -1, -1))


@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize(("counts", "slots"), [([], 8), ([0, 0], 0)], ids=["no-images", "no-slots"])
def test_nothing_to_noise(counts, slots, contrastive):
    full = detectors.make_targets([1, 1], 8)
    targets = replace(
        full, **{name: getattr(full, name)[: len(counts), :slots] for name in ("labels", "boxes")},
        counts=torch.tensor(counts, dtype=torch.int32),
    )  # fmt: skip
    noise = draw_noise(targets, 2, detectors.CLASSES, contrastive=contrastive)
    noised = noised_queries(targets, noise, batch_active=True, contrastive=contrastive)
    assert noised.active.shape == (len(counts),) and not noised.active.any()
    labels, boxes, valid = noised.positives(targets)
    assert torch.equal(valid, targets.valid)
    assert labels.shape == (len(counts), 2, slots) and boxes.shape == (len(counts), 2, slots, 4)


@every_model
def test_no_objects_at_all_still_trains(name):
    model = detectors.build(name)
    step = detectors.make_step(model)
    losses, norm = step(detectors.make_batch([0, 0], 8))
    assert losses.total.isfinite() and norm.isfinite()
    assert torch.equal(losses.parts[:, 1:], torch.zeros(3 + (model.proposals is not None), 5))


@pytest.mark.parametrize("name", ["dn-detr", "dino"])
@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 0, 0]], ids=str)
def test_the_denoising_loss_alone_is_its_part_of_the_whole(name, counts):
    predictions, targets = run(name, counts)
    first = predictions.proposals
    noised = predictions.layout.denoising
    whole = Criterion()(predictions, targets)
    logits, boxes = predictions.logits[first:, :, :noised], predictions.boxes[first:, :, :noised]
    total, parts = denoising_loss(logits, boxes, targets, GROUPS)
    close(parts, whole.parts[first:, 3:])
    close(total, (parts * torch.tensor([1.0, 5.0, 2.0])).sum())
    halved, _ = denoising_loss(logits, boxes, targets, GROUPS, objects=2 * targets.counts.sum())
    close(halved, total / 2)


def test_the_denoising_loss_of_other_groups_is_refused():
    """Three groups of one slot for an object are not one group of three."""
    targets = detectors.make_targets([2], 4)
    with pytest.raises(ValueError, match="1 groups of 4 slots have 4 queries, or 8 in contrastive denoising, got 12"):
        denoising_loss(torch.zeros(1, 1, 12, detectors.CLASSES), torch.zeros(1, 1, 12, 4), targets, 1)
