"""What is shown of a run while it goes on."""

import io
import itertools
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
from watched_runs import a_run

from dndetr.runs.console import Console, duration


def begun(step: int = 0, epochs: int = 2, steps_per_epoch: int = 3, **options) -> tuple[Console, io.StringIO]:
    """A console whose run has started after so many steps, and what it prints."""
    console, file = shown(**options)
    console.run_started(a_run(Path(), epochs=epochs, steps_per_epoch=steps_per_epoch, step=step))
    return console, file


def shown(**options) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, **options), file


def row(epoch: int, seconds: float, **metrics) -> dict:
    return {"event": "eval", "step": 3 * epoch, "epoch": epoch, "seconds": seconds, **metrics}


def test_log_lines_are_plain_and_complete():
    console, file = begun(interval=0)
    losses = {"loss": 5.25, "matching": 3.0, "denoising": 2.25, "lr": 1e-4}
    for step in range(1, 5):
        time.sleep(0.002)
        console.row_logged({"event": "train", "step": step, **losses})
        console.step_ended(step, images=8, waited=0.001)
    lines = file.getvalue().splitlines()
    assert len(lines) == 4 and "\x1b" not in file.getvalue()
    assert lines[3].startswith("epoch 2/2  step 4/6  ETA ")
    assert lines[3].endswith("  loss 5.250  matching 3.000  denoising 2.250  lr 1.0e-04")
    assert " images/s" in lines[3] and "data wait " in lines[3]


def test_updates_are_rare_but_the_last_step_is_shown():
    console, file = begun(interval=1000)
    for step in range(1, 7):
        console.step_ended(step, images=8, waited=0)
    assert [line.split("  ")[1] for line in file.getvalue().splitlines()] == ["step 6/6"]


def test_eta_covers_the_steps_and_the_evaluations_to_come(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr("dndetr.runs.console.time.perf_counter", lambda: clock[0])
    console, _ = begun(epochs=3, steps_per_epoch=10, interval=1)
    assert console.eta() is None
    for step in range(1, 11):
        clock[0] += 1
        console.step_ended(step, images=4, waited=0.5)
    assert console.eta() == pytest.approx(20)
    clock[0] += 7  # evaluation, which must not count as slow training
    console.row_logged(row(1, 7, AP=0.5))
    clock[0] += 1
    console.step_ended(11, images=4, waited=0.5)
    assert console.eta() == pytest.approx(19 + 2 * 7)


def test_eta_knows_how_rarely_a_run_is_evaluated(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr("dndetr.runs.console.time.perf_counter", lambda: clock[0])
    run, (console, _) = a_run(Path(), epochs=7, steps_per_epoch=10), shown(interval=1)
    console.run_started(replace(run, config=replace(run.config, evaluate_every=3)))
    for step in range(1, 31):
        clock[0] += 1
        console.step_ended(step, images=4, waited=0)
    clock[0] += 5
    console.row_logged(row(3, 5, AP=0.5))
    clock[0] += 1
    console.step_ended(31, images=4, waited=0)
    assert console.eta() == pytest.approx(39 + 2 * 5)  # after epochs 6 and 7


def test_a_plan_that_shrinks_is_followed(monkeypatch: pytest.MonkeyPatch):
    planned, (console, file) = [30], shown(interval=0)
    monkeypatch.setattr("dndetr.runs.console.time.perf_counter", itertools.count().__next__)
    console.run_started(a_run(Path(), epochs=3, steps_per_epoch=10, planned=lambda: planned[0]))
    console.step_ended(1, images=4, waited=0)
    planned[0] = 15
    console.step_ended(2, images=4, waited=0)
    first, second = file.getvalue().splitlines()
    assert first.startswith("epoch 1/3  step 1/30  ETA 29s") and second.startswith("epoch 1/2  step 2/15  ETA 13s")
    console.run_ended("finished", "the time is over", {})
    assert file.getvalue().endswith("\nfinished after step 2: the time is over\n")


def test_resumed_run_counts_on():
    console, file = begun(interval=0, step=3)
    console.step_ended(4, images=8, waited=0)
    assert file.getvalue().startswith("epoch 2/2  step 4/6")


def test_evaluation_table_marks_the_best_and_aligns():
    console, file = begun()
    console.row_logged({"event": "train", "step": 3, "loss": 5.5})
    console.row_logged(row(1, 1.25, AP=0.1, AP50=0.25, AP75=None))
    console.row_logged({"event": "train", "step": 6, "loss": None})
    console.row_logged(row(2, 65, AP=0.05, AP50=0.2, AP75=0.01))
    header, first, second = file.getvalue().splitlines()
    assert header.split() == ["epoch", "loss", "AP", "AP50", "AP75", "APs", "APm", "APl", "time"]
    assert first.split() == ["1", "5.500", "0.100", "0.250", "-", "-", "-", "-", "1.2s", "best"]
    assert second.split() == ["2", "-", "0.050", "0.200", "0.010", "-", "-", "-", "1:05"]
    assert len(header) == len(second) == first.index("  best")


def test_class_table_shows_every_class():
    console, file = shown()
    console.classes([(1, "Platelets"), (2, "RBC")], {"train": [209, 2382], "val": [83, 0]})
    assert [line.split() for line in file.getvalue().splitlines()] == [
        ["id", "class", "train", "val"], ["1", "Platelets", "209", "83"], ["2", "RBC", "2,382", "0"],
    ]  # fmt: skip
    console, file = shown()
    console.classes([(number, f"class{number}") for number in range(80)], {"train": list(range(80))})
    lines = file.getvalue().splitlines()
    assert len(lines) < 50 and all(len(line) <= 80 for line in lines)
    assert all(f"class{number} " in file.getvalue() for number in range(80))


def test_quiet_prints_nothing():
    console, file = begun(quiet=True, interval=0)
    console.message("hello")
    console.classes([(1, "a")], {"train": [1]})
    console.row_logged({"event": "warning", "step": 1, "message": "hm"})
    console.step_ended(1, 8, 0.0)
    console.row_logged(row(1, 1.0, AP=0.5))
    console.run_ended("finished", "", {})
    assert file.getvalue() == ""


def test_live_lines_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    console, file = begun(interval=0)
    console.row_logged({"event": "train", "step": 1, "loss": 1.5})
    console.step_ended(1, 8, 0.0)
    console.message("kept")
    console.run_ended("stopped", "stopped by SIGTERM after step 1", {})
    assert "━" in file.getvalue() and "loss 1.500" in file.getvalue() and "kept" in file.getvalue()


def test_a_step_costs_microseconds():
    console, _ = begun(interval=1000, quiet=True, steps_per_epoch=10_000)
    start = time.process_time()
    for step in range(10_000):
        console.step_ended(step, 8, 0.0)
    assert (time.process_time() - start) / 10_000 < 50e-6


@pytest.mark.parametrize(
    "seconds, text", [(None, "?"), (8.44, "8.4s"), (45.2, "45s"), (65, "1:05"), (7384, "2:03:04"), (3599.7, "1:00:00")]
)
def test_durations(seconds: float | None, text: str):
    assert duration(seconds) == text


def test_a_notebook_has_one_output_that_changes_and_a_table_below(monkeypatch: pytest.MonkeyPatch, capsys):
    shown = []

    class Output:
        def __init__(self, content):
            shown.append([str(content)])

        def update(self, content):
            shown[-1].append(str(content))

    library = types.SimpleNamespace(display=lambda content, display_id: Output(content))
    monkeypatch.setitem(sys.modules, "IPython.display", library)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as its kernel has it
    clock = [100.0]
    monkeypatch.setattr("dndetr.runs.console.time.perf_counter", lambda: clock[0])
    console = Console()
    console.run_started(a_run(Path(), epochs=2, steps_per_epoch=50))
    console.message("a note")
    for step in range(1, 101):
        clock[0] += 0.1
        console.step_ended(step, images=8, waited=0.0)
    console.row_logged(row(2, 1.0, AP=0.5))
    console.run_ended("finished", "", {})
    (lines,) = shown
    assert 10 <= len(lines) <= 12 and "step 11/100" in lines[0] and "step 100/100" in lines[-1]
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "a note" and len(printed.splitlines()) == 3 and "\x1b" not in printed
