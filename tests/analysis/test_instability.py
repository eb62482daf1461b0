"""Matching instability against a plain recomputation with scipy, image by image and query by query."""

import json

import detectors
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from short_runs import stopped_after

from dndetr import train
from dndetr.analysis import instability
from dndetr.analysis.instability import MatchingProbe
from dndetr.batch import Targets
from dndetr.models.dn_detr import Predictions
from dndetr.ops import CostWeights, GroupLayout
from dndetr.ops.match_cost import match_cost

COST = CostWeights(2.0, 5.0, 2.0)
COUNTS, QUERIES, LAYERS = [3, 0, 5, 1], 6, 2


def predictions(seed: int) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(LAYERS, len(COUNTS), QUERIES, detectors.CLASSES, generator=generator)
    boxes = torch.rand(LAYERS, len(COUNTS), QUERIES, 4, generator=generator) * 0.5 + 0.2
    return Predictions(logits, boxes, GroupLayout(0, 0, QUERIES))


def run(probe: MatchingProbe, seed: int, epoch: int) -> dict:
    """One evaluation, and what is said of it."""
    watched(probe, seed)
    return probe.finish(epoch)


def watched(probe: MatchingProbe, seed: int) -> dict:
    """One evaluation, the images in two batches -> what the probe saw."""
    batch = detectors.make_batch(COUNTS, 8)
    whole = predictions(seed)
    halves = {0: slice(0, 2), 2: slice(2, 4)}

    def infer(part):
        rows = halves[int(part.ids[0])]
        return Predictions(whole.logits[:, rows], whole.boxes[:, rows], whole.layout)

    predict = probe.watch(infer)
    for rows in halves.values():
        targets = Targets(batch.targets.labels[rows], batch.targets.boxes[rows], batch.targets.counts[rows])
        part = type(batch)(
            batch.pixels[rows], batch.colours[rows], batch.sizes[rows], targets, batch.sizes[rows], batch.ids[rows]
        )
        logits, boxes = predict(part)
        assert torch.equal(logits, whole.logits[-1, rows]) and torch.equal(boxes, whole.boxes[-1, rows])
    return probe.fresh


def matched(seed: int) -> list[list[dict[int, int]]]:
    """Target of each matched query, per layer and image, by scipy."""
    logits, boxes, *_ = predictions(seed)
    targets = detectors.make_targets(COUNTS, 8)
    cost = match_cost(logits, boxes, targets, COST, backend="reference").numpy()
    found = []
    for layer in range(LAYERS):
        pairs = [linear_sum_assignment(cost[layer, image, :, :count]) for image, count in enumerate(COUNTS)]
        found.append([dict(zip(queries.tolist(), objects.tolist(), strict=True)) for queries, objects in pairs])
    return found


def recomputed(before: int, after: int) -> list[float]:
    """The paper's formula, word for word."""
    layers = []
    for old, new in zip(matched(before), matched(after), strict=True):
        changes = [
            sum(one.get(query, -1) != two.get(query, -1) for query in range(QUERIES))
            for one, two in zip(old, new, strict=True)
        ]
        layers.append(sum(changes) / len(COUNTS))
    return layers


def test_it_is_the_papers_formula():
    probe = MatchingProbe(COST)
    assert run(probe, seed=0, epoch=1) == {"IS": None, "IS_layers": None, "IS_since": None}
    for epoch, seed in ((2, 1), (3, 2)):
        told, expected = run(probe, seed, epoch), recomputed(seed - 1, seed)
        assert told["IS_layers"] == pytest.approx(expected) and told["IS"] == told["IS_layers"][-1]
        assert told["IS_since"] == epoch - 1
        assert min(expected) > 0
    assert run(probe, seed=2, epoch=5) == {"IS": 0, "IS_layers": [0, 0], "IS_since": 3}


def test_the_largest_value_is_twice_the_number_of_objects():
    before, after = torch.full((1, 1, 6), -1), torch.full((1, 1, 6), -1)
    before[0, 0, :3], after[0, 0, 3:] = torch.arange(3), torch.arange(3)
    assert instability.instability(before, after) == [6]


def test_the_state_survives_and_other_images_are_not_compared():
    probe, other = MatchingProbe(COST), MatchingProbe(COST)
    other.restore(probe.state())
    run(probe, seed=0, epoch=1)
    other.restore(json_like(probe.state()))
    assert run(probe, seed=1, epoch=2) == run(other, seed=1, epoch=2) != run(MatchingProbe(COST), seed=1, epoch=2)
    other._matched.pop(0)
    assert run(other, seed=2, epoch=3)["IS"] is None


def json_like(state: dict) -> dict:
    assert set(map(type, state["ids"])) == {int} and state["matched"].dtype == torch.int16
    return state


def test_processes_put_their_matches_together():
    whole, (first, second) = MatchingProbe(COST), (MatchingProbe(COST) for _ in range(2))
    for epoch, seed in ((1, 0), (2, 1)):
        for probe in (whole, first, second):
            fresh = watched(probe, seed)
            if probe is not whole:
                probe.fresh = {image: row for image, row in fresh.items() if (image > 1) == (probe is second)}
        first.fresh |= second.fresh
        told = whole.finish(epoch)
        assert first.finish(epoch) == told
    assert told["IS"] > 0


def test_no_more_than_the_first_images_are_kept():
    probe = MatchingProbe(COST, images=3)
    run(probe, seed=0, epoch=1)
    assert probe.state()["ids"] == [0, 1, 2]
    first = np.mean([sum(a.get(q, -1) != b.get(q, -1) for q in range(QUERIES))
                     for a, b in zip(matched(0)[1][:3], matched(1)[1][:3], strict=True)])  # fmt: skip
    assert run(probe, seed=1, epoch=2)["IS"] == pytest.approx(first, abs=1e-4)


def test_a_run_logs_it_and_a_resumed_run_logs_the_same(tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    flags = ["--epochs", "3", "--batch-size", "4", "--train-images", "8", "--val-images", "6", "--quiet"]
    # A high rate and no averaging, so that matches do change within these few steps.
    flags += ["--lr", "0.01", "--optimizer.warmup", "0", "--optimizer.ema", "0"]
    train.run([*flags, "--output", "whole"])
    with stopped_after(3):
        train.main([*flags, "--output", "stopped"])
    train.run(["--resume", "stopped", "--quiet"])
    logged = []
    for folder in ("whole", "stopped"):
        rows = map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
        names = ("IS", "IS_layers", "IS_since", "dn_flip_rate", "dn_box_shift")
        logged.append([[row[name] for name in names] for row in rows if row["event"] == "eval"])
    assert logged[0] == logged[1]
    first, second, third = logged[0]
    assert first[:3] == [None] * 3 and [second[2], third[2]] == [1, 2]
    assert second[0] > 0 and len(second[1]) == 3
