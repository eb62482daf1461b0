"""The numbers of a comparison, from logs whose answers are known."""

import json

import pytest

from dndetr.analysis.comparison import Track, reach, read_track, sentences, spread, verdict
from dndetr.pictures.comparison import draw_comparison


def track(value, seed, ap, unstable=None, step_seconds=0.1):
    epochs = list(range(1, len(ap) + 1))
    unstable = [None] + [1.0] * (len(ap) - 1) if unstable is None else unstable
    seconds = [10 * epoch * step_seconds for epoch in epochs]
    losses = {name: [1.0 / epoch for epoch in epochs] for name in ("loss", "matching", "denoising")}
    return Track(value, seed, f"{value}-{seed}", epochs, ap, ap, unstable, seconds, step_seconds=step_seconds, **losses)


@pytest.mark.parametrize(
    ("values", "target", "place"),
    [
        ([0.1, 0.3, 0.5], 0.3, 2),
        ([0.1, 0.3, 0.5], 0.4, 2.5),
        ([0.1, 0.3, 0.5], 0.05, 0.5),
        ([0.1, 0.3, 0.5], 0.5, 3),
        ([0.1, 0.3, 0.5], 0.51, None),
        ([0.4, 0.1, 0.5], 0.2, 0.5),
        ([None, 0.2, None], 0.1, 1),
        ([0.0, 0.0], 0.0, 1),
        ([None, None], 0.0, None),
        ([], 0.1, None),
    ],
)
def test_reaching_is_interpolated_from_zero(values, target, place):
    found = reach(range(1, len(values) + 1), values, target)
    assert found == (place if place is None else pytest.approx(place))


def test_one_missing_seed_leaves_no_mean():
    assert spread([1.0, None]) is None and spread([]) is None
    assert spread([1.0, 3.0]) == {"mean": 2, "min": 1, "max": 3, "each": [1, 3]}


def test_the_verdict_compares_seed_by_seed():
    tracks = [
        track("5", 1, [0.2, 0.4, 0.6], [None, 1.0, 0.5], step_seconds=0.15),
        track("0", 1, [0.1, 0.2, 0.4], [None, 2.0, 0.4]),
        track("0", 2, [0.1, 0.2, 0.3], [None, 3.0, 1.0]),
        track("5", 2, [0.2, 0.4, 0.5], [None, 2.0, 0.5], step_seconds=0.15),
        track("5", 3, [0.9, 0.9, 0.9]),
    ]
    told = verdict("denoising.groups", ["5", "0"], tracks)
    assert told["seeds"] == [1, 2] and len(told["runs"]) == 5
    (one,) = told["comparisons"]
    assert one["AP_gain"]["each"] == pytest.approx([0.2, 0.2])
    assert one["epochs_to_baseline_AP"]["each"] == pytest.approx([2, 1.5])
    assert one["share_of_epochs"]["mean"] == pytest.approx((2 / 3 + 0.5) / 2, abs=1e-4)
    # An epoch takes 1.5 s with and 1 s without.
    assert one["seconds_to_baseline_AP"]["each"] == pytest.approx([3, 2.25])
    assert one["share_of_seconds"]["mean"] == pytest.approx((3 / 3 + 2.25 / 3) / 2)
    assert one["epochs_of_baseline_to_this_AP"] is None
    assert one["step_cost"]["mean"] == pytest.approx(0.5)
    assert (one["IS"]["each"], one["IS_of_baseline"]["each"]) == ([0.75, 1.25], [1.2, 2.0])
    assert (one["IS_pairs_lower"], one["IS_pairs"]) == (3, 4)
    text = "\n".join(sentences(told))
    assert "final AP 0.550 (0.500 to 0.600) against 0.350 (0.300 to 0.400), +0.200" in text
    assert "after 1.8 epochs, 58% of its epochs and 88% of its training time" in text
    assert "lower in 3 of 4 epochs" in text
    json.dumps(told, allow_nan=False)


def test_a_value_that_loses_is_told_so_too():
    told = verdict("lr", ["1", "2"], [track("1", 1, [0.1, 0.2]), track("2", 1, [0.2, 0.4])])
    text = "\n".join(sentences(told))
    assert "not every seed reaches the baseline's final AP" in text and "-0.200" in text
    assert "the baseline reaches this final AP after 1.0 epochs" in text


def test_nothing_is_compared_before_a_seed_is_complete():
    told = verdict("lr", ["1", "2"], [track("1", 1, [0.1, 0.2])])
    assert told["seeds"] == told["comparisons"] == sentences(told) == []


def test_late_epochs_do_not_count_as_early():
    unstable = [None, *[1.0] * 7, 100.0, 100.0]
    told = verdict("lr", ["1", "2"], [track(value, 1, [0.1] * 10, unstable) for value in "12"])
    assert told["comparisons"][0]["IS"]["mean"] == 1 and told["comparisons"][0]["IS_pairs"] == 7


def test_a_track_sums_time_and_averages_losses_by_steps(tmp_path):
    def train(step, loss, seconds):
        return {"event": "train", "step": step, "loss": loss, "matching": loss / 2, "denoising": 0, "seconds": seconds}

    def evaluation(step, epoch, ap):
        return {"event": "eval", "step": step, "epoch": epoch, "AP": ap, "AP50": ap, "IS": None, "seconds": 99}

    rows = [
        train(10, 6.0, 1.0),
        train(12, 3.0, 0.5),
        evaluation(12, 1, None),
        train(24, 2.0, 1.5),
        evaluation(24, 2, 0.3),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    got = read_track(tmp_path, "5", 1)
    assert got.epochs == [1, 2] and got.AP == [None, 0.3] and got.seconds == [1.5, 3.0]
    assert got.loss == pytest.approx([(60 + 6) / 12, 2]) and got.matching == pytest.approx([2.75, 1])
    assert got.step_seconds == pytest.approx(3 / 24)


@pytest.mark.parametrize("values", [["5", "0"], ["a", "b", "c"]])
def test_the_figure_is_drawn_at_every_stage(tmp_path, values):
    pictures = []
    tracks = [track(value, seed, [0.1, 0.2 + 0.1 * seed]) for seed in (1, 2) for value in values]
    for count in (1, len(values), len(tracks)):
        draw_comparison(tmp_path / "compare.png", verdict("lr", values, tracks[:count]))
        pictures.append((tmp_path / "compare.png").read_bytes())
    assert len(set(pictures)) == 3
