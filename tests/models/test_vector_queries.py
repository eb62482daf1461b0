"""Queries of position and content: what noise is made of, where queries start, and what a layer is shown of them."""

from dataclasses import replace

import detectors
import pytest
import torch

from dndetr.boxes import inverse_sigmoid
from dndetr.denoising import draw_noise, noised_queries
from dndetr.model_config import ModelConfig
from dndetr.models import deformable_decoder
from dndetr.models.proposals import Proposals
from dndetr.models.vector_queries import VectorQueries
from dndetr.ops import images_of
from dndetr.ops.anchor_encoding import anchor_encoding

WIDTH, CLASSES = 16, detectors.CLASSES


def noise(counts=(3, 0), groups=2):
    targets = detectors.make_targets(list(counts), 8)
    drawn = draw_noise(targets, groups, CLASSES, torch.Generator().manual_seed(0))
    return noised_queries(targets, drawn, 0.2, 0.4, False)


def proposals(count):
    draw = torch.Generator().manual_seed(1)
    anchors = torch.randn(2, count, 4, generator=draw)
    anchors[0, -1] = torch.inf  # none that is sound
    return Proposals(*4 * (anchors,), anchors)


def parts(queries, noised=None, proposed=None):
    both, places = queries(2, noised, proposed)
    return *both.chunk(2, dim=-1), places


def test_without_noise_a_query_is_its_rows_and_starts_at_a_point_of_its_position():
    queries = VectorQueries(WIDTH, 6, CLASSES)
    position, content, places = parts(queries)
    assert torch.equal(position[1], queries.position_embed.weight) and torch.equal(content[0], queries.tgt_embed.weight)
    assert torch.equal(places[1, :, :2], queries.reference_points(queries.position_embed.weight))
    assert (places[..., 2:] == 0).all() and places.shape == (2, 6, 4)


@pytest.mark.parametrize("proposed", [False, True])
def test_noised_queries_come_first_with_their_label_their_place_and_a_vector_of_it(proposed):
    queries, noised = VectorQueries(WIDTH, 6, CLASSES, proposed), noise()
    position, content, places = parts(queries, noised, proposals(6) if proposed else None)
    plain = parts(queries, None, proposals(6) if proposed else None)
    live = noised.live[:, None, :, None].expand(-1, 2, -1, -1).flatten(1, 2)
    boxes = noised.boxes.flatten(1, 2)
    assert live.any() and not live.all()
    assert torch.equal(content[:, :16], queries.label_enc(noised.labels).flatten(1, 2) * live)
    assert torch.equal(position[:, :16], queries.position_head(anchor_encoding(boxes, WIDTH // 2)))
    wanted = inverse_sigmoid(boxes) * live
    assert torch.equal(places[:, :16, :2], wanted[..., :2])
    assert torch.equal(places[:, :16, 2:], wanted[..., 2:] if proposed else torch.zeros(2, 16, 2))
    assert all(
        torch.equal(found[:, 16:], other) for found, other in zip((position, content, places), plain, strict=True)
    )


def test_proposals_are_encoded_x_first():
    queries, given = VectorQueries(WIDTH, 6, CLASSES, proposed=True), proposals(6)
    encoded = []
    queries.pos_trans.register_forward_pre_hook(lambda _, inputs: encoded.append(inputs[0]))
    *_, places = parts(queries, None, given)
    assert places is given.anchors
    by_coordinate = encoded[0].unflatten(-1, (4, -1))
    ours = anchor_encoding(given.anchors.sigmoid(), WIDTH // 2).unflatten(-1, (4, -1))  # y first
    assert torch.equal(by_coordinate[:, :, [1, 0, 2, 3]], ours) and by_coordinate.isfinite().all()


@pytest.mark.parametrize(
    ("name", "widths"),
    [("deformable-detr", [2, 2, 2]), ("deformable-detr-refined", [2, 4, 4]), ("deformable-detr-two-stage", [4, 4, 4])],
)
def test_layers_look_at_points_until_there_are_boxes(monkeypatch, name, widths):
    seen = []
    own = deformable_decoder.DeformableDecoderLayer.forward

    def forward(self, x, position, reference_points, *others):
        seen.append((position, reference_points))
        return own(self, x, position, reference_points, *others)

    monkeypatch.setattr(deformable_decoder.DeformableDecoderLayer, "forward", forward)
    model, batch = detectors.build(name).eval(), detectors.make_batch([3, 5], 8)
    for part in model.decoder.bbox_embed.parameters():
        torch.nn.init.normal_(part, std=0.3)
    predictions = model(images_of(batch), batch.sizes, noise((3, 5)))
    assert [points.shape[-1] for _, points in seen] == widths
    assert all(position is seen[0][0] for position, _ in seen)
    alike = [torch.equal(points[..., :2], seen[0][1][..., :2]) for _, points in seen]
    assert alike == ([True] * 3 if name == "deformable-detr" else [True, False, False])
    assert predictions.boxes[predictions.proposals :].shape == (3, 2, 28, 4)


@pytest.mark.parametrize("name", ["deformable-detr", "deformable-detr-refined", "deformable-detr-two-stage"])
def test_noise_trains_what_it_alone_has_a_use_for(name):
    for noised in (noise((3, 5)), None):
        model, batch = detectors.build(name).train(), detectors.make_batch([3, 5], 8)
        predictions = model(images_of(batch), batch.sizes, noised)
        outputs = (predictions.logits, predictions.boxes, *(predictions.tokens or ()))
        sum(output.sum() for output in outputs).backward()
        without = [weight for weight in model.parameters() if weight.requires_grad and weight.grad is None]
        wanted = model.queries.of_noise() if noised is None else []
        assert {*map(id, without)} == {*map(id, wanted)}


def test_settings_that_do_not_go_together():
    vectors = {
        "variant": "dn-deformable-detr",
        "query_positions": "vectors",
        "query_scale": False,
        "label_indicator": False,
    }
    assert ModelConfig(**vectors)
    wrong = {
        "--model.query-positions vectors: give --model.no-label-indicator": vectors | {"label_indicator": True},
        "--model.query-positions vectors: give --model.no-query-scale": vectors | {"query_scale": True},
        "--model.query-positions vectors: give --model.no-decoder-norm": vectors | {"decoder_norm": True},
        "--model.look-forward-twice needs": vectors | {"look_forward_twice": True, "box_refinement": False},
        "--model.proposals objects needs": vectors | {"proposals": "objects", "box_refinement": False},
        "--model.box-refinement False: give --model.query-positions vectors too": {
            "variant": "dn-deformable-detr",
            "box_refinement": False,
        },
        "--model.query-positions vectors: give --model.query-positions anchors with dn-detr": {
            "query_positions": "vectors"
        },
        "--model.box-eps 0.1: give": {"box_eps": 0.1},
        "--model.box-eps 0.0: give": {"box_eps": 0.0},
    }
    for message, settings in wrong.items():
        with pytest.raises(ValueError, match=message):
            ModelConfig(**settings)
    assert replace(ModelConfig(**vectors), box_refinement=False)
