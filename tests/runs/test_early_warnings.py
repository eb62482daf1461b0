"""Early warnings: fabricated logs, a run that is stuck, and runs that are not."""

from dataclasses import replace

import pytest
import torch
from short_runs import short_run
from watched_runs import a_run

from dndetr.presets import PRESETS
from dndetr.runs.early_warnings import EarlyWarnings, Standstill
from dndetr.runs.run_log import read_rows

TINY = PRESETS["tiny"]()
SMALL = replace(PRESETS["small"](), data="my_data", init="resnet18.pth")


def warnings(config, steps: int, losses=(), aps=(), every: int = 10) -> list[str]:
    """What is said of a log with these losses, one every so many steps, and evaluations evenly over the run."""
    watch, rows = Standstill(config, steps), []
    rows += [{"event": "train", "step": every * n, "loss": loss, "lr": 1e-4} for n, loss in enumerate(losses, start=1)]
    rows += [
        {"event": "eval", "step": steps * n // len(aps), "epoch": n, "AP": value}
        for n, value in enumerate(aps, start=1)
    ]
    said = [watch.see(row) for row in sorted(rows, key=lambda row: (row["step"], row["event"] == "eval"))]
    return [message for message in said if message is not None]


def falling(start: float, end: float, rows: int) -> list[float]:
    """Within the first fifteen rows most of the way, as real ones do."""
    return [end + (start - end) * 0.8**n + (n % 3) * 0.2 for n in range(rows)]


def test_good_runs_are_left_alone():
    documented = (0.086, 0.284, 0.511, 0.664, 0.741, 0.781, 0.801, 0.809)
    assert warnings(TINY, 880, falling(22, 6, 88), documented) == []
    bccd = (0.346, 0.474, 0.533, 0.546, 0.558, 0.572, 0.579, 0.581, 0.585, 0.589, 0.590, 0.594, 0.595)
    assert warnings(SMALL, 2550, falling(20, 6, 255), bccd) == []
    official = [0.44 * (1 - 0.8**n) for n in range(1, 41)] + [0.45] * 10
    assert warnings(PRESETS["dn-detr-r50"](), 369_600, falling(40, 15, 3696), official, every=100) == []


def test_a_run_too_short_to_tell_is_left_alone():
    assert warnings(TINY, 90, [20.0] * 9, [0.0] * 3) == []


def test_a_loss_that_stands_still_is_said_once_with_what_to_look_at():
    (message,) = warnings(TINY, 880, [20 + n % 3 for n in range(88)])
    assert message.startswith("the loss stands still: 20 at the start, 21.2 after 150 steps; ")
    for hint in ("first_batch.png", "--overfit 8", "--lr (now 1.0e-04)", "--init"):
        assert hint in message
    assert "check_data" not in message
    (message,) = warnings(replace(SMALL, init=None), 880, [20.0] * 88)
    assert "python -m dndetr.check_data my_data" in message


def test_weights_from_a_file_may_have_little_to_lose():
    assert warnings(SMALL, 880, [6.0] * 88, [0.5, 0.55, 0.6, 0.61]) == []
    assert warnings(SMALL, 880, [6.0] * 20) == []
    (message,) = warnings(SMALL, 880, [6.0] * 88, [0.0, 0.001, 0.001, 0.0])
    assert message.startswith("AP is 0.000 after 220 steps, look at") and "--init" not in message
    (message,) = warnings(SMALL, 880, [6.0] * 88, [0.02, 0.02, 0.02, 0.02])
    assert message.startswith("the loss stands still")


def test_no_precision_at_all_tells_a_falling_loss_from_one_that_does_not():
    (message,) = warnings(TINY, 880, falling(20, 6, 88), [0.0, 0.0, 0.001, 0.0])
    assert message.startswith("AP is 0.000 after 220 steps, though the loss falls") and "class ids" in message
    assert len(warnings(TINY, 880, falling(20, 6, 88), [0.0, 0.3, 0.4, 0.5])) == 1


def test_precision_that_stands_still_is_said_while_there_is_time():
    rising_then_flat = [0.1, 0.2, 0.3] + [0.29] * 7
    (message,) = warnings(TINY, 1000, falling(20, 6, 100), rising_then_flat)
    assert message.startswith("AP has not risen since epoch 3 (0.300 then, 0.290 now)")
    assert warnings(TINY, 1000, falling(20, 6, 100), [0.1, 0.2, 0.3, 0.35, 0.4, 0.41] + [0.4] * 4) == []


def test_a_run_whose_time_is_limited_is_warned_by_its_plan(tmp_path):
    """AP is still 0 after a fifth of the steps that there will be."""
    for planned, times in ((10_000, 0), (1000, 1)):
        watch, said = EarlyWarnings(), []
        watch.run_started(a_run(tmp_path, 100, 100, planned=lambda planned=planned: planned, warn=said.append))
        watch.row_logged({"event": "eval", "step": 250, "epoch": 3, "AP": 0.0})
        assert len(said) == times


def test_nothing_is_said_of_what_was_not_measured():
    assert warnings(TINY, 880, [None] * 88, [None] * 8) == []


@pytest.mark.parametrize(("rate", "stuck"), [("1e-9", True), pytest.param("2e-3", False, marks=pytest.mark.slow)])
def test_a_real_run_that_cannot_learn_is_told_so_and_one_that_can_is_not(tmp_path, rate, stuck):
    torch.set_num_threads(1)
    less = [
        "--model.encoder-layers",
        "0",
        "--model.decoder-layers",
        "1",
        "--model.queries",
        "8",
        "--denoising.groups",
        "1",
    ]
    less += ["--model.backbone.planes", "8", "16", "16", "--model.width", "32", "--model.hidden", "32"]
    few = ["--train-images", "220", "--batch-size", "2", "--log-every", "10", "--optimizer.warmup", "0"]
    folder = short_run(tmp_path / "run", "--lr", rate, *few, *less)
    said = [row["message"] for row in read_rows(folder / "metrics.jsonl") if row["event"] == "warning"]
    assert len(said) == stuck and all("the loss stands still" in message for message in said)
