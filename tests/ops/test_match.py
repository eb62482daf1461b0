import pytest
import torch

from dndetr.batch import Targets
from dndetr.ops import CostWeights, assign, match, match_cost
from dndetr.ops.match_cost import CASES, make_case


@pytest.mark.parametrize("name", CASES)
def test_both_directions_agree(name):
    logits, boxes, targets = make_case(name)
    matches = match(logits, boxes, targets, CostWeights())
    layers, batch, queries, _, counts, slots, _ = CASES[name]
    assert matches.query.shape == (layers, batch, 1, slots) and matches.query.dtype == torch.int32
    assert matches.target.shape == (layers, batch, queries) and matches.target.dtype == torch.int32
    assert matches.finite.all()
    for y in range(layers):
        for b in range(batch):
            found = {(q, t) for t, q in enumerate(matches.query[y, b, 0].tolist()) if q >= 0}
            assert found == {(q, t) for q, t in enumerate(matches.target[y, b].tolist()) if t >= 0}
            assert len(found) == min(counts[b], queries)


def test_every_set_is_matched_on_its_own():
    logits, boxes, targets = make_case("coco")
    matches = match(logits, boxes, targets, CostWeights(), sets=3)
    assert matches.query.shape == (6, 2, 3, 32)
    for s in range(3):
        part = slice(s * 100, s * 100 + 100)
        alone = match(logits[:, :, part], boxes[:, :, part], targets, CostWeights())
        shifted = torch.where(alone.query < 0, -1, alone.query + s * 100)
        assert torch.equal(matches.query[:, :, s : s + 1], shifted)
        assert torch.equal(matches.target[:, :, part], alone.target)


def test_more_targets_than_queries():
    logits, boxes, targets = make_case("bf16")
    matches = match(logits[:, :, :4], boxes[:, :, :4], targets, CostWeights())
    assert (matches.query[0, 1] >= 0).sum() == 4 and (matches.target[0, 1] >= 0).all()


def test_padding_does_not_change_the_matches():
    logits, boxes, targets = make_case("uneven")
    grow = torch.nn.functional.pad
    wider = Targets(grow(targets.labels, (0, 24)), grow(targets.boxes, (0, 0, 0, 24)), targets.counts)
    narrow, wide = match(logits, boxes, targets, CostWeights()), match(logits, boxes, wider, CostWeights())
    assert torch.equal(narrow.target, wide.target)
    assert torch.equal(narrow.query, wide.query[..., :8]) and (wide.query[..., 8:] == -1).all()


def test_a_broken_prediction_is_flagged_and_matched_last():
    logits, boxes, targets = make_case("uneven")
    broken = match(logits, boxes, targets, CostWeights()).query[1, 0, 0, 2]
    boxes[1, 0, broken] = float("nan")
    matches = match(logits, boxes, targets, CostWeights())
    assert matches.finite.logical_not().nonzero().tolist() == [[1, 0]]
    assert matches.target[1, 0, broken] == -1
    assert (matches.query[1, 0, 0] >= 0).all()


def test_indivisible_sets_are_an_error():
    logits, boxes, targets = make_case("tiny")
    with pytest.raises(ValueError, match="5 queries do not divide into 2"):
        match(logits, boxes, targets, CostWeights(), sets=2)


def test_compiles_without_a_graph_break():
    logits, boxes, targets = make_case("uneven")
    compiled = torch.compile(match, fullgraph=True, backend="aot_eager")
    for given, expected in zip(compiled(logits, boxes, targets), match(logits, boxes, targets), strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("sets", [1, 3])
def test_nothing_is_asked_of_the_device(fake_cuda, sets):
    logits, boxes = torch.empty(6, 2, 300, 91, device="cuda"), torch.empty(6, 2, 300, 4, device="cuda")
    targets = Targets(
        torch.empty(2, 32, dtype=torch.int64, device="cuda"),
        torch.empty(2, 32, 4, device="cuda"),
        torch.empty(2, dtype=torch.int32, device="cuda"),
    )
    matches = match(logits, boxes, targets, CostWeights(), sets)
    assert [tuple(x.shape) for x in matches] == [(6, 2, sets, 32), (6, 2, 300), (6, 2)]
    assert all(x.device.type == "cuda" and x.fake_mode is fake_cuda for x in matches)


def test_is_cost_then_assign():
    logits, boxes, targets = make_case("uneven")
    cost = match_cost(logits, boxes, targets, CostWeights())
    query = assign(cost.flatten(0, 1), targets.counts.repeat(3))
    assert torch.equal(match(logits, boxes, targets, CostWeights()).query.flatten(0, 2), query)
