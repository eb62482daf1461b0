"""A run within its hours: the plan alone, by a clock of its own, and whole runs whose steps take as long as is said."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from short_runs import SMALL, TORCHRUN, environment, stopped_after

from dndetr import train
from dndetr.runs.run_log import read_rows
from dndetr.scoring import coco
from dndetr.training import time_limit
from dndetr.training.distributed import Processes
from dndetr.training.optim import Schedule, schedule_factor
from dndetr.training.time_limit import TimeLimit, stopwatch
from dndetr.training.trainer import Evaluator, Trainer

EPOCH, EPOCHS = 20, 30
EVALUATION, SAVING = 5.0, 0.5  # seconds


class Drive:
    """A run of made-up durations that the plan is told of as the trainer tells it."""

    def __init__(self, seconds: float, every: int = 1, step_seconds=lambda done: 1.0):
        self.now, self.done, self.place, self.step_seconds = 0.0, 0, 0.0, step_seconds
        self.every, self.places, self.evaluated = every, [], []
        self.limit = self.planned(seconds)

    def planned(self, seconds: float) -> TimeLimit:
        return TimeLimit(seconds, EPOCH * EPOCHS, EPOCH, self.every, None, 6.0, lambda: self.now)

    def run(self, until: float = float("inf")) -> "Drive":
        """To the end, or until so many steps."""
        self.limit.lap()
        while self.done < min(self.limit.end, until):
            self.places.append(self.place)
            self.place += self.limit.pace(self.place, self.done)
            self.now += self.step_seconds(self.done)
            self.done += 1
            self.limit.lap("step")
            if not (whole := self.done % EPOCH == 0):
                self.limit.plan(self.done)
            if self.done == self.limit.end or (whole and self.done // EPOCH % self.every == 0):
                self.now += EVALUATION
                self.limit.lap("evaluation")
                self.evaluated.append(self.done)
            if whole or self.done == self.limit.end:
                self.now += SAVING
                self.limit.lap("saving")
                self.limit.plan(self.done)
        return self

    @property
    def whole(self) -> bool:
        """Whether the schedule is where that of a whole run ends, having gone forward all the way."""
        forward = all(a < b for a, b in zip(self.places, self.places[1:], strict=False))
        return forward and self.place == pytest.approx(EPOCH * EPOCHS, abs=1e-6)


def test_a_third_of_the_epochs_fit():
    drive = Drive(seconds=280).run()
    assert drive.whole and EPOCH * EPOCHS * 0.28 < drive.done < EPOCH * EPOCHS * 0.45
    assert 280 * 0.85 < drive.now <= 280 and drive.evaluated[-1] == drive.done
    # From when the speed is known to the end the steps are about equally wide.
    widths = [b - a for a, b in zip(drive.places[5:], drive.places[6:], strict=False)]
    assert max(widths) < 1.5 * min(widths)


@pytest.mark.parametrize("factor", [3, 0.4])
def test_a_machine_that_changes_its_speed_halfway(factor):
    drive = Drive(seconds=280, step_seconds=lambda done: 1.0 if done < 90 else factor).run()
    assert drive.whole and 280 * 0.85 < drive.now <= 280
    steady = Drive(seconds=280).run().done
    assert (drive.done < 0.8 * steady) if factor > 1 else (drive.done > 1.3 * steady)


@pytest.mark.parametrize("seconds", [16, 20, 24])
def test_less_time_than_an_epoch_takes(seconds):
    drive = Drive(seconds).run()
    assert drive.whole and 4 < drive.done < EPOCH and drive.now <= seconds and drive.evaluated == [drive.done]


def test_a_slow_start_is_not_taken_for_the_speed():
    drive = Drive(seconds=280, step_seconds=lambda done: 1.0 if done else 30.0).run()
    assert drive.whole and drive.now <= 280 and drive.done > 150 and drive.places[3] == 3


def test_hardly_any_time_is_one_step_and_an_evaluation():
    drive = Drive(seconds=0.01).run()
    assert (drive.done, drive.evaluated) == (2, [2]) and drive.whole


def test_time_that_nothing_needs_changes_nothing():
    drive = Drive(seconds=1e5).run()
    assert drive.places == [float(step) for step in range(EPOCH * EPOCHS)] and drive.done == EPOCH * EPOCHS


def test_rare_evaluations_leave_time_for_steps():
    assert Drive(seconds=280, every=5).run().done > Drive(seconds=280).run().done + 20


def test_the_plan_goes_on_with_the_time_that_is_left():
    whole, first = Drive(seconds=280).run(), Drive(seconds=280).run(until=100)
    state = json.loads(json.dumps(first.limit.state()))
    second = Drive(seconds=280)
    second.limit.restore(state)
    second.done, second.place = first.done, first.place
    assert second.limit.end == first.limit.end
    second.run()
    assert second.whole and abs(second.done - whole.done) <= 2 and first.now + second.now <= 280


def test_the_end_is_not_begun_anew():
    drive = Drive(seconds=280).run()
    drive.now = 0.0
    drive.limit.plan(drive.done)
    assert drive.limit.end == drive.done


@pytest.mark.parametrize("kind", ["constant", "step", "multistep", "cosine"])
def test_all_schedules_follow_the_progress(kind):
    """At an eighth of the steps, the rates of every eighth step."""
    factor = schedule_factor(kind, 800, 80, (400, 640), 0.1, 0.01)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    plain, shortened = Schedule(optimizer, factor), Schedule(optimizer, factor)
    for step in range(800):
        assert plain.rates() == [2.0 * factor(step)] and plain.done == step
        plain.advance()
    for step in range(100):
        assert shortened.rates() == pytest.approx([2.0 * factor(8 * step)], rel=1e-9)
        shortened.pace = (800 - shortened.done) / (100 - step)
        shortened.advance()
    assert shortened.done == 800


FEW = [*SMALL, "--epochs", "6", "--batch-size", "4", "--train-images", "24", "--val-images", "4", "--log-every", "2"]


@pytest.fixture
def clock(monkeypatch, tmp_path, no_pictures):
    """Runs of training take a second a step and two an evaluation, and nothing for all else."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    now = [1000.0]
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: now[0])

    def passing(seconds, call):
        def timed(self, *arguments):
            now[0] += seconds
            return call(self, *arguments)

        return timed

    monkeypatch.setattr(Trainer, "_next", passing(1.0, Trainer._next))
    monkeypatch.setattr(Evaluator, "__call__", passing(2.0, Evaluator.__call__))
    return now


def test_a_run_ends_in_time_evaluated_and_saved(clock, capsys):
    began = clock[0]
    folder = train.run([*FEW, "--hours", str(24 / 3600), "--output", "run"])
    rows = read_rows(folder / "metrics.jsonl")
    spent, end, evaluated = clock[0] - began, rows[-1], [row for row in rows if row["event"] == "eval"]
    assert 19 <= spent <= 24 and end["event"] == "end" and end["reason"] == "the time of --hours 0.00666667 is over"
    steps = end["step"]
    assert 6 < steps < 36 and steps % 6 and evaluated[-1]["step"] == steps
    assert end["epoch"] == evaluated[-1]["epoch"] == steps // 6 + 1
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (saved["step"], saved["epoch"]) == (steps, steps // 6)
    trained = [row for row in rows if row["event"] == "train"]
    # The rate of the step that would come next, at the floor of the cosine, as after a whole run.
    assert trained[-1]["step"] == steps and trained[-1]["lr"] == pytest.approx(4e-3 * 0.01)
    out = capsys.readouterr().out
    assert f"finished after step {steps}: the time of" in out and f"epoch 3/3  step {steps}/{steps}  ETA" in out
    assert train.main(["--resume", "run"]) == 0
    assert f"run is finished: {steps} of 36 steps are done (the time of" in capsys.readouterr().out


def test_less_than_an_epoch_is_a_run_too(clock):
    folder = train.run([*FEW, "--hours", str(7 / 3600), "--quiet"])
    rows = read_rows(folder / "metrics.jsonl")
    (evaluated,) = [row for row in rows if row["event"] == "eval"]
    assert evaluated["step"] == rows[-1]["step"] < 6 and evaluated["epoch"] == 1


def test_more_time_than_a_run_needs_is_the_same_run(clock):
    plain = train.run([*FEW, "--quiet", "--epochs", "2"])
    limited = train.run([*FEW, "--quiet", "--epochs", "2", "--hours", "1"])
    ends = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (plain, limited)]
    for part in ("model", "ema"):
        assert all(torch.equal(value, ends[1][part][name]) for name, value in ends[0][part].items())
    assert ends[0]["scheduler"] == ends[1]["scheduler"] == {"done": 12} and "time_limit" not in ends[0]
    logs = [[row.get("lr") for row in read_rows(folder / "metrics.jsonl")] for folder in (plain, limited)]
    assert logs[0] == logs[1] and "reason" not in read_rows(limited / "metrics.jsonl")[-1]


def test_the_clock_runs_on_over_a_resumption(clock):
    flags = [*FEW, "--hours", str(24 / 3600), "--quiet"]
    whole = read_rows(train.run(flags) / "metrics.jsonl")[-1]["step"]
    with stopped_after(5):
        train.main([*flags, "--output", "run"])
    clock[0] += 1e6  # does not count
    began = clock[0]
    train.run(["--resume", "run", "--quiet"])
    assert abs(read_rows(Path("run/metrics.jsonl"))[-1]["step"] - whole) <= 1 and 13 < clock[0] - began < 19


def test_a_run_that_was_killed_at_its_end_draws_its_pictures(clock, monkeypatch):
    flags = [*FEW, "--hours", str(24 / 3600), "--quiet", "--output", "run"]
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr("dndetr.runs.run_log.RunLog.run_ended", lambda *_: 1 / 0)
        train.run(flags)
    steps = torch.load("run/checkpoint.pt", weights_only=True)["step"]
    end = read_rows(train.run(["--resume", "run", "--quiet"]) / "metrics.jsonl")[-1]
    assert (end["event"], end["step"]) == ("end", steps) and "--hours" in end["reason"]


def test_patience_ends_a_run(clock, monkeypatch, capsys):
    """AP rises, falls, is none, stays, falls: three in a row after the best one."""
    told = iter([0.1, 0.2, 0.1, None, 0.2, 0.15])
    evaluate = coco.coco_evaluate
    monkeypatch.setattr("dndetr.training.evaluator.coco_evaluate", lambda *a: evaluate(*a) | {"AP": next(told)})
    flags = [*FEW, "--epochs", "9", "--max-steps-per-epoch", "2", "--patience", "3", "--output", "run"]
    with stopped_after(7):
        train.main(flags)  # the count is kept
    assert torch.load("run/checkpoint.pt", weights_only=True)["since_best"] == 1
    capsys.readouterr()
    assert train.main(["--resume", "run"]) == 0
    rows = read_rows(Path("run/metrics.jsonl"))
    end = rows[-1]
    assert (end["event"], end["step"], end["epoch"]) == ("end", 12, 6)
    assert end["reason"] == "AP has not risen for 3 evaluations" and [*told] == []
    assert "finished after step 12: AP has not risen for 3 evaluations" in capsys.readouterr().out
    best = torch.load("run/best.pt", weights_only=True)
    assert best["metrics"]["AP"] == 0.2 and best["step"] == 4
    assert train.main(["--resume", "run"]) == 0
    assert "12 of 18 steps are done (AP has not risen for 3 evaluations)" in capsys.readouterr().out


def test_the_plan_of_the_first_process_is_everyones(clock, monkeypatch):
    monkeypatch.setattr(Processes, "from_first", lambda self, value: 4 if isinstance(value, int) else value)
    folder = train.run([*FEW, "--hours", "1", "--quiet"])
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "reason"), [(["--patience", "1"], "AP has not"), (["--hours", "0.003"], "the time")])
def test_two_processes_end_together(tmp_path, flags, reason):
    """Weights that do not move have the same AP every time."""
    command = [*TORCHRUN, "-m", "dndetr.train", *FEW, "--epochs", "2000", "--lr", "1e-30", "--optimizer.ema", "0"]
    command += ["--output", "run", "--quiet", "--batch-size", "2", "--model.backbone.norm", "group"]
    done = subprocess.run([*command, *flags], env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    end = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert end["event"] == "end" and end["reason"].startswith(reason)


def test_a_stopwatch_starts_at_nothing():
    assert 0 <= stopwatch()() < 60
