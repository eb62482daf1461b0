"""The run folder, its log, and what is shown of a run while it goes on."""

import io
import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dndetr.runs.console import Console, duration
from dndetr.runs.folder import RunLog, claim_output, hold, new_run_folder, read_rows

# ---- folders


def test_run_folders_count_up_and_are_never_reused(tmp_path: Path):
    root = tmp_path / "runs"
    assert new_run_folder("tiny", root) == root / "tiny-1"
    assert new_run_folder("tiny", root) == root / "tiny-2"
    (root / "tiny-9").write_text("a file takes its number as well")
    (root / "tiny-extra").mkdir()
    assert new_run_folder("tiny", root) == root / "tiny-10"
    assert new_run_folder("dn-detr-r50", root) == root / "dn-detr-r50-1"


def test_processes_that_start_together_get_folders_of_their_own(tmp_path: Path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        folders = pool.starmap(new_run_folder, [("tiny", tmp_path)] * 24)
    assert len(set(folders)) == 24


def test_claimed_output_is_new_or_empty(tmp_path: Path):
    assert claim_output(tmp_path / "a" / "b").is_dir()
    assert claim_output(str(tmp_path / "a" / "b")).is_dir()
    with pytest.raises(FileExistsError, match=r"not empty.*choose another --output$"):
        claim_output(tmp_path / "a")
    (tmp_path / "a" / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(FileExistsError, match=r"--resume .*/a$"):
        claim_output(tmp_path / "a")
    with pytest.raises(FileExistsError, match="is a file"):
        claim_output(tmp_path / "a" / "checkpoint.pt")


# ---- metrics.jsonl


def test_rows_are_valid_json_whatever_the_numbers(tmp_path: Path):
    log = RunLog(tmp_path)
    log.write("train", step=1, epoch=1, loss=float("nan"), lr=np.float32(0.5), grad=float("inf"))
    log.write("eval", step=np.int64(2), AP=None, classes={"é": torch.tensor(0.25)}, curve=(1, float("-inf")))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"event": "train", "step": 1, "epoch": 1, "loss": None, "lr": 0.5, "grad": None},
        {"event": "eval", "step": 2, "AP": None, "classes": {"é": 0.25}, "curve": [1, None]},
    ]
    assert [row["step"] for row in log.rows("eval")] == [2]


def test_half_written_last_line_is_dropped(tmp_path: Path):
    log = RunLog(tmp_path)
    log.write("train", step=1)
    with open(log.path, "a") as file:
        file.write('{"event": "train", "st')
    assert [row["step"] for row in read_rows(log.path)] == [1]
    log = RunLog(tmp_path)
    log.write("train", step=2)
    assert [row["step"] for row in log.rows()] == [1, 2]


def test_broken_line_in_the_middle_is_an_error_with_its_place(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "step": 1}\nnonsense\n{"event": "train", "step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not JSON"):
        read_rows(path)


def test_truncate_forgets_what_comes_after_and_the_end(tmp_path: Path):
    log = RunLog(tmp_path)
    for step in range(1, 6):
        log.write("train", step=step)
    log.write("eval", step=4)
    log.write("end", step=4)
    log.truncate_to(4)
    log.write("train", step=5)
    assert [(row["event"], row["step"]) for row in log.rows()] == [
        ("train", 1), ("train", 2), ("train", 3), ("train", 4), ("eval", 4), ("train", 5),
    ]  # fmt: skip


# ---- console


def shown(**options) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(epochs=2, steps_per_epoch=3, file=file, **options), file


def test_log_lines_are_plain_and_complete():
    console, file = shown(interval=0)
    losses = {"loss": 5.25, "matching": 3.0, "denoising": 2.25, "lr": 1e-4}
    for _ in range(4):
        time.sleep(0.002)
        console.advance(images=8, waited=0.001, losses=losses)
    lines = file.getvalue().splitlines()
    assert len(lines) == 4 and "\x1b" not in file.getvalue()
    assert lines[3].startswith("epoch 2/2  step 4/6  ETA ")
    assert lines[3].endswith("  loss 5.250  matching 3.000  denoising 2.250  lr 1.0e-04")
    assert " images/s" in lines[3] and "data wait " in lines[3]


def test_updates_are_rare_but_the_last_step_is_shown():
    console, file = shown(interval=1000)
    for _ in range(6):
        console.advance(images=8, waited=0)
    assert [line.split("  ")[1] for line in file.getvalue().splitlines()] == ["step 6/6"]


def test_eta_covers_the_steps_and_the_evaluations_to_come(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr("dndetr.runs.console.time.perf_counter", lambda: clock[0])
    console = Console(epochs=3, steps_per_epoch=10, interval=1, file=io.StringIO())
    assert console.eta() is None
    for _ in range(10):
        clock[0] += 1
        console.advance(images=4, waited=0.5)
    assert console.eta() == pytest.approx(20)
    clock[0] += 7  # evaluation, which must not count as slow training
    console.evaluated(1, loss=1.0, metrics={"AP": 0.5}, seconds=7)
    clock[0] += 1
    console.advance(images=4, waited=0.5)
    assert console.eta() == pytest.approx(19 + 2 * 7)


def test_resumed_run_counts_on():
    console, file = shown(interval=0, step=3)
    console.advance(images=8, waited=0)
    assert file.getvalue().startswith("epoch 2/2  step 4/6")


def test_evaluation_table_marks_the_best_and_aligns():
    console, file = shown()
    console.evaluated(1, 5.5, {"AP": 0.1, "AP50": 0.25, "AP75": None}, seconds=1.25)
    console.evaluated(2, None, {"AP": 0.05, "AP50": 0.2, "AP75": 0.01}, seconds=65)
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
    console, file = shown(quiet=True, interval=0)
    with console:
        console.message("hello")
        console.classes([(1, "a")], {"train": [1]})
        console.advance(8, 0.0, {"loss": 1.0})
        console.evaluated(1, 1.0, {"AP": 0.5}, 1.0)
    assert file.getvalue() == ""


def test_live_lines_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    console, file = shown(interval=0)
    with console:
        console.advance(8, 0.0, {"loss": 1.5})
        console.message("kept")
    assert "━" in file.getvalue() and "loss 1.500" in file.getvalue() and "kept" in file.getvalue()


def test_a_step_costs_microseconds():
    console, _ = shown(interval=1000, quiet=True)
    start = time.process_time()
    for _ in range(10_000):
        console.advance(8, 0.0)
    assert (time.process_time() - start) / 10_000 < 50e-6


@pytest.mark.parametrize(
    "seconds, text", [(None, "?"), (8.44, "8.4s"), (45.2, "45s"), (65, "1:05"), (7384, "2:03:04"), (3599.7, "1:00:00")]
)
def test_durations(seconds: float | None, text: str):
    assert duration(seconds) == text


def test_half_a_first_checkpoint_does_not_keep_a_folder_from_being_used(tmp_path):
    (tmp_path / ".checkpoint.pt.1.abcd.tmp").write_bytes(b"half")
    assert claim_output(tmp_path) == tmp_path
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError):
        claim_output(tmp_path)


def test_a_folder_is_held_by_one_at_a_time_and_not_by_its_workers(tmp_path):
    with hold(tmp_path), pytest.raises(ValueError, match="is being trained by another process"), hold(tmp_path):
        raise AssertionError("held twice")
    fork = multiprocessing.get_context("fork")
    started, ended = fork.Event(), fork.Event()
    with hold(tmp_path):
        worker = fork.Process(target=lambda: (started.set(), ended.wait()))
        worker.start()
    try:
        assert started.wait(10)
        with hold(tmp_path):
            assert worker.is_alive()
    finally:
        worker.kill()
    assert not any(tmp_path.iterdir())
