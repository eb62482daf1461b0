"""``metrics.jsonl``: valid rows whatever happens, and none of a history that was left."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from watched_runs import a_run

from dndetr.analysis.comparison import read_track
from dndetr.config import Config
from dndetr.pictures.curves import draw_curves
from dndetr.runs.console import Console
from dndetr.runs.early_warnings import Standstill
from dndetr.runs.run_log import RunLog, cut_back, plain, read_rows


def begun(folder: Path) -> RunLog:
    log = RunLog()
    log.run_started(a_run(folder, epochs=2, steps_per_epoch=2))
    return log


def test_rows_are_valid_json_whatever_the_numbers(tmp_path: Path):
    log = begun(tmp_path)
    numbers = {"loss": float("nan"), "lr": np.float32(0.5), "grad": float("inf")}
    log.row_logged(plain({"event": "train", "step": 1, "epoch": 1, **numbers}))
    numbers = {"AP": None, "classes": {"é": torch.tensor(0.25)}, "curve": (1, float("-inf"))}
    log.row_logged(plain({"event": "eval", "step": np.int64(2), **numbers}))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"event": "train", "step": 1, "epoch": 1, "loss": None, "lr": 0.5, "grad": None},
        {"event": "eval", "step": 2, "AP": None, "classes": {"é": 0.25}, "curve": [1, None]},
    ]


def test_half_written_last_line_is_dropped(tmp_path: Path):
    log = begun(tmp_path)
    log.row_logged({"event": "train", "step": 1})
    with open(log.path, "a") as file:
        file.write('{"event": "train", "st')
    assert [row["step"] for row in read_rows(log.path)] == [1]
    assert [row["step"] for row in cut_back(tmp_path, 1)] == [1]
    log = begun(tmp_path)
    log.row_logged({"event": "train", "step": 2})
    assert [row["step"] for row in read_rows(log.path)] == [1, 2]


def test_broken_line_in_the_middle_is_an_error_with_its_place(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "step": 1}\nnonsense\n{"event": "train", "step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not JSON"):
        read_rows(path)


def test_cutting_back_forgets_what_comes_after_and_the_end(tmp_path: Path):
    log = begun(tmp_path)
    for step in range(1, 6):
        log.row_logged({"event": "train", "step": step})
    log.row_logged({"event": "eval", "step": 4, "AP": 0.5})
    log.run_ended("finished", "", {"AP": 0.5})
    assert read_rows(log.path)[-1] | {"seconds": 0} == {
        "event": "end", "step": 4, "epoch": 2, "seconds": 0, "AP": 0.5,
    }  # fmt: skip
    kept = cut_back(tmp_path, 4)
    log.row_logged({"event": "train", "step": 5})
    assert [(row["event"], row["step"]) for row in read_rows(log.path)] == [
        ("train", 1), ("train", 2), ("train", 3), ("train", 4), ("eval", 4), ("train", 5),
    ]  # fmt: skip
    assert kept == read_rows(log.path)[:-1]


STRANGE = [
    '{"note": "lowered the lights"}',
    '{"event": "train"}',
    '{"event": ["end"], "step": 1}',
    "[1, 2]",
    "3",
    "null",
    '"x"',
]


def test_lines_that_are_no_rows_are_passed_over_and_kept(tmp_path: Path):
    log = begun(tmp_path)
    rows = [{"event": "train", "step": 1}, {"event": "train", "step": 2}, {"event": "eval", "step": 2}]
    lines = [*map(json.dumps, rows[:1]), *STRANGE, *map(json.dumps, rows[1:])]
    log.path.write_text("".join(f"{line}\n" for line in lines))
    assert read_rows(log.path) == rows
    assert cut_back(tmp_path, 1) == rows[:1]
    assert log.path.read_text().splitlines() == lines[: 1 + len(STRANGE)]


def test_every_reader_can_do_with_strange_lines_and_poor_rows(tmp_path: Path):
    poor = ['{"event": "train", "step": 1}', '{"event": "eval", "step": 2}', '{"event": "of a listener", "step": 2}']
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in (*STRANGE, *poor)))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert read_track(tmp_path, "5", 0).epochs == []
    rows = read_rows(tmp_path / "metrics.jsonl")
    Console(quiet=True).run_started(a_run(tmp_path, rows=rows))
    watching = Standstill(Config(), 1000)
    assert [watching.see(row) for row in rows] == [None] * len(rows)


def test_only_what_finished_has_an_end(tmp_path: Path):
    log = begun(tmp_path)
    log.row_logged({"event": "train", "step": 1})
    log.run_ended("stopped", "stopped by SIGTERM after step 1", {})
    log.run_ended("failed", "ValueError: no", {})
    assert [row["event"] for row in read_rows(log.path)] == ["train"]
