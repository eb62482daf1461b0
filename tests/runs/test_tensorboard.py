"""TensorBoard shows the numbers of the log, also after a run was stopped and resumed."""

import json
import sys

import pytest
from short_runs import short_run
from watched_runs import a_run

from dndetr import train
from dndetr.runs.run_log import read_rows
from dndetr.runs.trackers import TensorBoard

ROW = {"event": "train", "step": 20, "loss": 3.5, "lr": 1e-3}


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_resumed_run_shows_every_row_once(tmp_path):
    pytest.importorskip("tensorboard")
    board = TensorBoard()
    board.run_started(a_run(tmp_path))
    for step in (20, 40, 60):
        board.row_logged(ROW | {"step": step})
    # No end: the run is killed, and continues from a checkpoint at step 40.
    board = TensorBoard()
    board.run_started(a_run(tmp_path, step=40, rows=[ROW, ROW | {"step": 40}]))
    board.row_logged(ROW | {"step": 60, "loss": 2.5})
    board.row_logged(
        {"event": "eval", "step": 60, "epoch": 1, "AP": 0.25, "AP50": None, "classes": {"cat": 0.5, "dog": None}}
    )
    board.row_logged({"event": "warning", "step": 60, "message": "hm"})
    board.run_ended("finished", "", {})
    shown = scalars(tmp_path)
    assert shown["train/loss"] == [(20, 3.5), (40, 3.5), (60, 2.5)]
    assert shown["eval/AP"] == [(60, 0.25)] and shown["eval/AP of cat"] == [(60, 0.5)]
    assert set(shown) == {"train/loss", "train/lr", "eval/epoch", "eval/AP", "eval/AP of cat"}


def test_a_run_with_the_flag_writes_its_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    run = short_run(tmp_path / "run", "--tensorboard", "--log-every", "1")
    shown, rows = scalars(run), read_rows(run / "metrics.jsonl")
    losses = [(row["step"], row["loss"]) for row in rows if row["event"] == "train"]
    assert [step for step, _ in losses] == [1, 2]
    assert shown["train/loss"] == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in losses]
    assert json.dumps(sorted(shown)).count("eval/AP of ") == 6


def test_the_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train.main(["--tensorboard"]) == 1
    assert capsys.readouterr().err == 'error: --tensorboard needs TensorBoard: pip install -e ".[tensorboard]"\n'
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    assert train.main(["--fast-eval"]) == 1
    assert capsys.readouterr().err == 'error: --fast-eval needs hotcoco: pip install -e ".[fast-eval]"\n'
    assert not any(tmp_path.iterdir())
