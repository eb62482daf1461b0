"""Proposals of the encoder: which are selected, what their loss reaches, and images that have few of them."""

from dataclasses import replace

import detectors
import pytest
import torch

from dndetr.models.build import build_model
from dndetr.models.features import Features, places_of_tokens
from dndetr.models.proposals import ProposalHead, proposed_logits

WIDTH, CLASSES = 16, 5


def features(shapes, sizes, seed=0, canvas=None) -> Features:
    """Random tokens; sizes: (height, width) of each image on each level; on other canvases the same inside."""
    valid_sizes = torch.tensor(sizes)
    levels = []
    for level, (shape, (h, w)) in enumerate(zip(canvas or shapes, shapes, strict=True)):
        values = torch.full((len(sizes), *shape, WIDTH), 9.0, dtype=torch.float64)
        draw = torch.Generator().manual_seed(seed + level)
        values[:, :h, :w] = torch.randn(len(sizes), h, w, WIDTH, generator=draw, dtype=torch.float64)
        levels.append(values.flatten(1, 2))
    shapes = tuple(canvas or shapes)
    return Features(
        torch.cat(levels, dim=1), None, shapes, valid_sizes, *places_of_tokens(valid_sizes, shapes, torch.float64)
    )


def head(count: int, **options) -> ProposalHead:
    """A head in which nothing is zero."""
    torch.manual_seed(0)
    made = ProposalHead(WIDTH, CLASSES, count, **options).double()
    for parameter in made.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return made


SHAPES = ((8, 12), (4, 6))
SIZES = [[(8, 12), (4, 6)], [(5, 7), (3, 4)]]


def straightforward(made: ProposalHead, given: Features):
    """All heads on all tokens, then the best of them, image by image."""
    places, sound = proposed_logits(given, torch.float64)
    content = made.enc_output_norm(made.enc_output(given.tokens * sound[..., None]))
    logits, corrected = made.class_embed(content), made.bbox_embed(content) + places
    found = []
    for image in range(len(logits)):
        scores = logits[image].max(dim=1).values
        if not made.official:
            scores = torch.where(sound[image], scores, -torch.inf)
        best = sorted(range(len(scores)), key=lambda token: -scores[token].item())[: made.count]
        found.append((logits[image, best], corrected[image, best].sigmoid(), corrected[image, best]))
    return [torch.stack(part) for part in zip(*found, strict=True)]


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("objects", [False, True])
def test_equal_to_heads_on_all_tokens(objects, official):
    given, results = features(SHAPES, SIZES), []
    draw = torch.Generator().manual_seed(5)
    for way in (lambda made, x: made(x), straightforward):
        made = head(10, official=official)
        tokens = given.tokens.clone().requires_grad_()
        made_of = way(made, given._replace(tokens=tokens))
        logits, boxes, anchors = (
            (made_of.logits, made_of.boxes, made_of.anchors) if hasattr(made_of, "logits") else made_of
        )
        weights = [torch.randn(x.shape, generator=draw.manual_seed(5), dtype=x.dtype) for x in (logits, boxes)]
        ((logits * weights[0]).sum() + (boxes * weights[1]).sum()).backward()
        results.append([logits, boxes, anchors.detach(), tokens.grad, *(p.grad for p in made.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_scored_for_being_an_object_all_tokens_have_a_loss():
    given, made = features(SHAPES, SIZES), head(10, objects=True)
    proposals = made(given)
    assert proposals.logits.shape == (2, 8 * 12 + 4 * 6, CLASSES) and proposals.boxes.shape == (2, 120, 4)
    _, sound = proposed_logits(given, torch.float64)
    scores = proposals.logits[..., 0].masked_fill(~sound, -torch.inf)
    assert torch.equal(proposals.index, scores.topk(10).indices)
    chosen = proposals.boxes.gather(1, proposals.index[..., None].expand(-1, -1, 4))
    torch.testing.assert_close(proposals.anchors.sigmoid(), chosen)


def test_queries_start_without_a_gradient():
    proposals = head(10)(features(SHAPES, SIZES))
    assert not proposals.content.requires_grad and not proposals.anchors.requires_grad
    assert proposals.logits.requires_grad and proposals.boxes.requires_grad


def test_the_canvas_does_not_matter():
    made = head(12)
    small, large = (made(features(SHAPES, SIZES, canvas=canvas)) for canvas in (None, ((11, 16), (6, 8))))
    for field in ("content", "anchors", "logits", "boxes"):
        torch.testing.assert_close(getattr(small, field), getattr(large, field))


def test_only_where_there_are_no_others_a_token_without_a_place_is_selected():
    shapes, sizes = ((3, 4),), [[(3, 4)], [(1, 2)]]
    for count, inside in ((2, (2, 2)), (8, (8, 2)), (12, (12, 2))):
        proposals = head(count)(features(shapes, sizes))
        whole = (proposals.boxes == 1).all(-1)
        assert [count - n for n in whole.sum(1).tolist()] == list(inside)
        assert (proposals.anchors.isinf() == whole[..., None]).all()


def test_the_official_code_also_selects_tokens_without_a_place():
    given = features(((60, 60),), [[(60, 60)]])  # 1 % of its columns and rows are too close to the border
    ours, theirs = head(20), head(20, official=True)
    for made in (ours, theirs):
        made.enc_output_norm.bias.data = made.class_embed.weight.data[0] * 10  # the score of an empty token
        made.enc_output_norm.weight.data.zero_()
    _, sound = proposed_logits(given, torch.float64)
    assert not sound.all() and not sound[0, :60].any()
    picked = [sound.gather(1, made(given).index).all().item() for made in (ours, theirs)]
    assert picked == [True, False]


@pytest.mark.parametrize("objects", [False, True])
def test_fewer_tokens_than_queries(objects):
    proposals = head(30, objects=objects)(features(((3, 4),), [[(3, 4)]]))
    assert proposals.index.shape == (1, 30) and proposals.anchors.shape == (1, 30, 4)
    assert (proposals.boxes.isfinite()).all() and (proposals.anchors.isinf().all(-1).sum() == 18)


def test_a_tiny_image_through_a_whole_detector():
    model = build_model(replace(detectors.CONFIGS["dino"], queries=100), CLASSES).eval()
    logits, boxes = model.predict(torch.randn(1, 3, 64, 128), torch.tensor([[20, 33]]))
    assert logits.shape == (1, 100, CLASSES) and logits.isfinite().all() and boxes.isfinite().all()


@pytest.mark.parametrize("objects", [False, True])
def test_a_token_that_is_no_number_is_told_by_the_matching(objects):
    config = replace(detectors.CONFIGS["two-stage" if objects else "dino"])
    model = build_model(config, CLASSES)
    step = detectors.make_step(model)
    batch = detectors.make_batch([3, 5], 8)
    batch.colours[0, 0, 3] = torch.nan
    losses, _ = step(batch)
    assert losses.matches.finite.shape == (4, 2)
    assert not losses.matches.finite[:, 0].any() and losses.matches.finite[:, 1].all()


@pytest.mark.parametrize(("classes", "counts"), [(1, [3, 5]), (1203, [3, 0]), (5, [8, 40])])
@pytest.mark.parametrize("name", ["dino", "two-stage"])
def test_classes_and_crowds(name, classes, counts):
    model = build_model(detectors.CONFIGS[name], classes)
    step = detectors.make_step(model)
    step.classes = classes
    batch = detectors.make_batch(counts, 64)
    batch.targets.labels.remainder_(classes)
    for _ in range(2):
        losses, norm = step(batch)
    assert losses.total.isfinite() and norm.isfinite() and losses.matches.finite.all()


@pytest.mark.parametrize(
    "part",
    [
        {"proposals": "selected"},
        {"proposals": "objects"},
        {"proposals": "selected", "content": "selected"},
        {"look_forward_twice": True},
        {"shared_heads": True},
        {"decoder_norm": True},
        {"query_scale": False},
        {"label_indicator": False},
    ],
    ids=str,
)
def test_each_part_alone(part):
    torch.manual_seed(0)
    model = build_model(replace(detectors.CONFIGS["dn-deformable-detr"], **part), CLASSES)
    step = detectors.make_step(model)
    batch = detectors.make_batch([3, 5], 8)
    history = [step(batch)[0].total.item() for _ in range(40)]
    assert sum(history[-5:]) < 0.9 * sum(history[:5])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter in step.optimizer.state}


@pytest.mark.parametrize(("inside", "outside"), [(0.011, 0.01), (0.989, 0.99)])
def test_sizes_of_which_no_proposal_is_sound_are_refused(inside, outside):
    config = detectors.CONFIGS["dino"]
    with pytest.raises(ValueError, match=rf"--model.proposal-size {outside}: give a share between 0.01 and 0.99"):
        replace(config, proposal_size=outside)
    given = features(SHAPES[:1], [SIZES[0][:1]])
    assert proposed_logits(given, torch.float32, replace(config, proposal_size=inside).proposal_size)[1].all()
    assert not proposed_logits(given, torch.float32, outside)[1].any()
