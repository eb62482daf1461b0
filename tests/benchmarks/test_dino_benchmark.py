"""The benchmark of DINO: what it compares with computes the same, and its parts are those of the model."""

from functools import partial

import bench_dino
import bench_step
import detectors
import pytest
import torch

from dndetr.counting.stages import PARTS
from dndetr.models.proposals import ProposalHead

LEVELS = ((6, 9), (3, 5))


def test_heads_on_all_tokens_give_the_same():
    head, features = bench_dino.case("cpu", LEVELS, 20)
    weighting = torch.randn(2, 20, bench_dino.CLASSES + 4)
    bench_dino.check(head, features, weighting)


@pytest.mark.parametrize("what", ["results", "selection"])
def test_a_difference_is_noticed(monkeypatch, what):
    head, features = bench_dino.case("cpu", LEVELS, 20)
    right = bench_dino.heads_on_all_tokens

    def wrong(head, features):
        found = right(head, features)
        return (
            found._replace(index=found.index.flip(1))
            if what == "selection"
            else found._replace(boxes=found.boxes * 1.01)
        )

    monkeypatch.setattr(bench_dino, "heads_on_all_tokens", wrong)
    with pytest.raises(AssertionError):
        bench_dino.check(head, features, torch.randn(2, 20, bench_dino.CLASSES + 4))


@pytest.fixture
def small_step(monkeypatch):
    """Steps are of a small DINO."""
    monkeypatch.setattr(bench_dino, "our_step", lambda *_: detectors.make_step(detectors.build("dino")))
    return bench_dino.our_step, detectors.make_batch([3, 5], 8)


def test_the_usual_sequence_trains_alike(small_step):
    make, batch = small_step
    ours, usual = make(), bench_dino.usual(bench_dino.layer_by_layer(), batch)
    first = [ours(batch)[0].total.item() for _ in range(2)]
    assert first == pytest.approx([usual()[0].total.item() for _ in range(2)], rel=1e-4)
    assert ProposalHead.forward is not bench_dino.heads_on_all_tokens


def test_shares_are_of_all_parts(small_step, monkeypatch):
    make, batch = small_step
    monkeypatch.setattr(bench_step, "WARM", 0)
    monkeypatch.setattr(bench_step, "floating_point_floor", lambda run: 0.0)
    kept = {}
    others = {"layer by layer": partial(bench_dino.layer_by_layer(), batch)}

    def record(title, seconds, **counted):
        kept.update(counted, seconds=seconds)

    bench_step.compare(record, "small", make(), batch, others, 1, PARTS)
    assert set(kept["seconds"]) == {"ours", "layer by layer"} and set(kept["shares"]) == {*PARTS, "other"}
    assert sum(kept["shares"].values()) == pytest.approx(1, abs=0.01) and kept["shares"]["proposals"] > 0
    assert kept["counted"]["layer by layer"]["operations"] > kept["counted"]["ours"]["operations"]
