"""Matching cost and assignment against recordings of the official matcher."""

import goldens
import pytest
import torch

from dndetr.ops import CostWeights, match, match_cost

CASES = goldens.unit("matcher.pt")["cases"]
IDS = [f"{k}-{'x'.join(map(str, case['pred_logits'].shape))}" for k, case in enumerate(CASES)]


def inputs(case):
    targets = goldens.pad_targets(case["labels"], case["boxes"], torch.float64)
    weights = CostWeights(case["cost_class"], case["cost_bbox"], case["cost_giou"], case["focal_alpha"])
    return case["pred_logits"][None], case["pred_boxes"][None], targets, weights


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_cost(case):
    cost = match_cost(*inputs(case))[0]
    for b, recorded in enumerate(case["cost"]):
        torch.testing.assert_close(cost[b, :, : recorded.shape[1]], recorded, rtol=1e-12, atol=1e-12)
        assert cost[b, :, recorded.shape[1] :].isinf().all()


@pytest.mark.parametrize("sets", [1, 2], ids=["once", "two-sets"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_matches(case, sets):
    logits, boxes, targets, weights = inputs(case)
    queries = logits.shape[2]
    matches = match(logits.repeat(1, 1, sets, 1), boxes.repeat(1, 1, sets, 1), targets, weights, sets=sets)
    for b, (query, target) in enumerate(case["indices"]):
        for s in range(sets):
            found = matches.query[0, b, s]
            target_of = matches.target[0, b, s * queries : (s + 1) * queries]
            total = sum(case["cost"][b][q, t] for q, t in enumerate(target_of.tolist()) if t >= 0)
            assert float(total) == pytest.approx(case["total_cost"][b], rel=1e-12, abs=1e-12)
            assert (target_of >= 0).sum() == len(query)
            if len(set(case["cost"][b].flatten().tolist())) == case["cost"][b].numel():  # no ties: one optimum
                assert torch.equal(found[target].long(), query + s * queries)
                assert torch.equal(target_of[query].long(), target)
