"""What trackers are sent, and that a run does not depend on them: with trackers that record, fail, or are not there."""

import json
import signal
import sys
import threading
from unittest import mock

import pytest
import torch
from PIL import Image
from short_runs import short_run
from watched_runs import a_run

from dndetr import train
from dndetr.config import Config, to_dict
from dndetr.runs import tracker as of_trackers
from dndetr.runs.run_log import read_rows
from dndetr.runs.tracker import as_markdown, class_table, flat_settings
from dndetr.runs.trackers import TRACKERS, chosen_trackers
from dndetr.training.resuming import resumed_config

tracking = pytest.importorskip("accelerate.tracking")
pytest.importorskip("tensorboard")
from fake_trackers import Recorded, failing, take_the_place  # noqa: E402  (it needs accelerate)

TRAIN = {"event": "train", "step": 20, "loss": 3.5, "lr": 1e-3}
EVAL = {"event": "eval", "step": 40, "AP": 0.25, "APl": None, "classes": {"cat": 0.2, "cow": None, "dog": 0.5}}
WARNING = {"event": "warning", "step": 40, "message": "hm"}
TABLE = [["dog", 0.5], ["cat", 0.2], ["cow", None]]


@pytest.fixture
def made(monkeypatch) -> list[Recorded]:
    """Every tracker that is made from now on."""
    return take_the_place(monkeypatch, Recorded)


def started(name: str, run):
    tracker = TRACKERS[name]()
    tracker.run_started(run)
    return tracker


def a_whole_run(name: str, folder):
    tracker = started(name, a_run(folder, steps_per_epoch=20))
    Image.new("RGB", (6, 4)).save(folder / "first_batch.png")
    tracker.first_batch(None, None)
    for row in (TRAIN, EVAL, WARNING):
        tracker.row_logged(row)
    Image.new("RGB", (6, 4)).save(folder / "curves.png")
    tracker.run_ended("finished", "", EVAL)


@pytest.mark.parametrize("name", TRACKERS)
def test_each_is_sent_settings_and_numbers(name, made, tmp_path):
    a_whole_run(name, tmp_path)
    (shown,) = made
    kind, settings = shown.calls[0]
    assert kind == "settings" and settings["denoising.groups"] == 3
    logged = [call for call in shown.calls if call[0] == "log" and "first_batch" not in call[1]]
    assert logged[0] == ("log", {"train/loss": 3.5, "train/lr": 1e-3}, 20)
    assert logged[1] == ("log", {"eval/AP": 0.25, "eval/AP of cat": 0.2, "eval/AP of dog": 0.5}, 40)
    assert "dndetr" in shown.options.values() or name == "tensorboard"


@pytest.mark.parametrize("name", [name for name in TRACKERS if name != "tensorboard"])
def test_a_run_that_goes_on_is_the_same_run_there_and_misses_nothing(name, made, tmp_path):
    tracker = started(name, a_run(tmp_path))
    tracker.row_logged(TRAIN)
    tracker.checkpoint_saved(tmp_path / "checkpoint.pt", 20)
    tracker.row_logged(TRAIN | {"step": 39})  # and killed
    untracked = TRAIN | {"step": 30}  # in a part of the run that had no tracker
    started(name, a_run(tmp_path, step=30, rows=[TRAIN, untracked]))
    first, second = made
    assert "id-1" not in first.options.values() and "id-1" in second.options.values()
    assert [call[2] for call in second.calls if call[0] == "log"] == [30]
    assert not any(call[0] == "settings" for call in second.calls)
    assert json.loads((tmp_path / "trackers.json").read_text()) == {TRACKERS[name].name: {"run": "id-1", "step": 30}}


def test_a_tracker_that_joins_later_is_sent_the_whole_run(made, tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "first_batch.png")
    started("wandb", a_run(tmp_path, step=40, rows=[TRAIN, EVAL]))
    assert [call[0] for call in made[0].calls] == ["settings", "images", "log", "log"]


def test_wandb_and_mlflow_take_what_their_own_calls_take(made, tmp_path):
    a_whole_run("wandb", tmp_path)
    shown = made[0]
    assert ("images", ["first_batch"], 0) in shown.calls and ("images", ["curves"], 40) in shown.calls
    assert ("table", ["class", "AP"], TABLE) in shown.calls
    shown.tracker.summary.__setitem__.assert_called_once_with("warning", "hm")
    assert shown.options["settings"] == {"console": "off"}
    tracker = started("mlflow", a_run(tmp_path))
    tracker.row_logged(EVAL | {"classes": {"a/b (c)": 0.5, "größe: 1": 0.25}})
    names = list(made[1].calls[-1][1])
    assert names == ["eval/AP", "eval/AP of a_b _c_", "eval/AP of größe: 1"]
    for how in ("finished", "stopped", "failed"):
        tracker.run_ended(how, "", {})
    ends = [call.args[0] for call in sys.modules["mlflow"].end_run.mock_calls]
    assert ends == ["FINISHED", "KILLED", "FAILED"]


def test_trackio(made, tmp_path):
    a_whole_run("trackio", tmp_path)
    (shown,) = made
    assert shown.options["resume"] == "never" and shown.options["config"]["epochs"] == 2
    logged = shown.calls[1:]
    picture = sys.modules["trackio"].Image.return_value
    assert logged[0] == ("log", {"first_batch": picture}, 0)
    assert logged[3:] == [
        ("log", {"warning": "hm"}, 40),
        ("log", {"curves": picture}, 40),
        ("log", {"classes": as_markdown(TABLE)}, 40),
        ("log", {"final/AP": 0.25}, 40),
        ("finish",),
    ]


def test_clearml(made, tmp_path):
    a_whole_run("clearml", tmp_path)
    (shown,) = made
    sys.modules["clearml"].Task.set_random_seed.assert_called_once_with(None)
    assert shown.options["task_name"] == tmp_path.name and shown.options["auto_connect_frameworks"] is False
    assert ("images", ["first_batch"], 0) in shown.calls
    shown.tracker.get_logger().report_text.assert_called_once_with("warning at step 40: hm")
    assert shown.calls[-4:] == [
        ("images", ["curves"], 40),
        ("table", ["class", "AP"], TABLE),
        ("log", {"AP": 0.25}, None),
        ("finish",),
    ]


def test_comet(made, tmp_path):
    a_whole_run("comet", tmp_path)
    (shown,) = made
    pictures = [call.kwargs for call in shown.tracker.log_image.mock_calls]
    assert pictures == [{"name": "first_batch", "step": 0}, {"name": "curves", "step": 40}]
    shown.tracker.log_table.assert_called_once_with("classes.csv", tabular_data=TABLE, headers=["class", "AP"])
    assert shown.calls[-3:] == [("log", {"warning": "hm"}, 40), ("log", {"final/AP": 0.25}, 40), ("finish",)]


@pytest.mark.parametrize("name", TRACKERS)
def test_what_is_sent_last_is_sent_of_the_step_that_was_the_last(name, made, tmp_path):
    """Of a run that ends long before its configured end."""
    Image.new("RGB", (6, 4)).save(tmp_path / "curves.png")
    tracker = started(name, a_run(tmp_path, steps_per_epoch=1000))
    tracker.row_logged(EVAL)
    tracker.run_ended("finished", "no time is left", EVAL)
    assert {call[2] for call in made[0].calls if call[0] in ("log", "images") and call[2] is not None} == {40}


def test_a_thread_leaves_signals_to_the_main_one():
    errors = []

    def send():
        try:
            with of_trackers._undisturbed():
                entered.set()
                changed.wait(5)
        except Exception as error:
            errors.append(error)

    entered, changed = threading.Event(), threading.Event()
    thread = threading.Thread(target=send)
    thread.start()
    assert entered.wait(5)
    before = signal.signal(signal.SIGHUP, ours := lambda *_: None)
    try:
        changed.set()
        thread.join()
        assert not errors and signal.getsignal(signal.SIGHUP) is ours
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_and_processes_are_left_alone(made, tmp_path, monkeypatch):
    from accelerate import PartialState

    monkeypatch.setattr(PartialState, "_shared_state", {})  # other tests train with accelerate
    monkeypatch.setenv("LOCAL_RANK", "0")  # as torchrun sets it, of a run that it started alone
    handler = signal.getsignal(signal.SIGTERM)
    a_whole_run("clearml", tmp_path)
    assert signal.getsignal(signal.SIGTERM) == handler != signal.SIG_IGN
    assert PartialState._shared_state == {} and not torch.distributed.is_initialized()


def weights(run) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoint.pt", weights_only=True)["model"]


def without_times(run) -> list[dict]:
    times = ("seconds", "images_per_second", "data_wait")
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["event"] != "warning"]
    return [{name: value for name, value in row.items() if name not in times} for row in rows]


EVERY_CALL = ("start", "store_init_configuration", "log", "log_images", "log_table", "finish")


@pytest.mark.parametrize("names", [("__init__",), ("start",), EVERY_CALL[1:]], ids=["made", "started", "all others"])
def test_a_tracker_that_fails_changes_nothing_of_a_run_and_is_named_once(names, tmp_path, monkeypatch):
    expected = short_run(tmp_path / "plain", "--log-every", "1")
    kind = failing(*names)
    if names == ("__init__",):
        kind = type("Failing", (Recorded,), {"__init__": mock.Mock(side_effect=SystemExit("no server for __init__"))})
    take_the_place(monkeypatch, kind)
    run = short_run(tmp_path / "tracked", "--log-every", "1", "--tracker", "wandb")
    assert without_times(run) == without_times(expected)
    found, wanted = weights(run), weights(expected)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    warnings = [row["message"] for row in read_rows(run / "metrics.jsonl") if row["event"] == "warning"]
    assert len(warnings) == 1
    assert (
        warnings[0].startswith("listener WandB failed in run_started (") and f"no server for {names[0]}" in warnings[0]
    )


def test_what_failed_is_not_tried_again_and_the_rest_goes_on(tmp_path, monkeypatch):
    made = take_the_place(monkeypatch, failing("log"))
    tracker = started("comet", a_run(tmp_path))
    with pytest.raises(ConnectionError):
        tracker.row_logged(TRAIN)
    for row in (EVAL, WARNING):
        tracker.row_logged(row)
    tracker.checkpoint_saved(tmp_path / "checkpoint.pt", 40)
    with pytest.raises(ConnectionError):  # the summary is of another kind, and tried once too
        tracker.run_ended("finished", "", EVAL)
    assert made[0].calls[1:] == [("log",), ("log",), ("finish",)]
    made[0].tracker.log_table.assert_called_once()
    # What it was not sent it gets when the run goes on.
    assert json.loads((tmp_path / "trackers.json").read_text())["comet_ml"]["step"] == 0


@pytest.mark.parametrize("name", [name for name in TRACKERS if name != "tensorboard"])
def test_a_missing_package_is_named_before_anything_is_written(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, TRACKERS[name].module, None)
    assert train.main(["--tracker", name]) == 1
    package = "comet_ml" if name == "comet" else name
    wanted = f'error: --tracker {name} needs {package}: pip install -e ".[trackers]" {package}\n'
    assert capsys.readouterr().err == wanted
    assert not any(tmp_path.iterdir())


def test_accelerate_is_needed_too_and_a_new_one(made, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ModuleNotFoundError, match="trackers"):
        patch.setitem(sys.modules, "accelerate", None)
        TRACKERS["wandb"]()
    old = type("Old", (), {})  # before 1.9 a tracker started as soon as it was made
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", old)
    with pytest.raises(ModuleNotFoundError, match="trackers"):
        TRACKERS["wandb"]()


def test_a_package_that_is_broken_is_named_before_anything_is_written(made, monkeypatch):
    def broken(name):
        raise TypeError("Descriptors cannot be created directly.")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(ModuleNotFoundError, match=r"needs wandb: .*its import fails: TypeError: Descriptors cannot"):
        TRACKERS["wandb"]()


def test_each_tracker_is_chosen_once(made):
    found = chosen_trackers(Config(tensorboard=True, tracker=("wandb", "tensorboard", "wandb")))
    assert [type(tracker).__name__ for tracker in found] == ["TensorBoard", "WandB"]
    assert chosen_trackers(Config()) == []


def test_trackers_may_change_when_a_run_goes_on():
    saved = to_dict(Config(tracker=("wandb",), project="cells"))
    for flags, given, wanted in (
        ([], {"resume"}, ("wandb",)),
        (["--tracker"], {"resume", "tracker"}, ()),
        (["--tracker", "mlflow", "comet"], {"resume", "tracker"}, ("mlflow", "comet")),
    ):
        resumed = resumed_config(train.parse(["--resume", "run", *flags]), saved, given)
        assert resumed.tracker == wanted and resumed.project == "cells"


def test_names_of_projects_are_those_that_all_trackers_take():
    assert Config(project="Zellen 2.0_b").project == "Zellen 2.0_b"
    for name in ("", "a/b", "it's", " a", "x" * 129):
        with pytest.raises(ValueError, match="--project"):
            Config(project=name)


def test_settings_are_flat_and_paths_as_they_were_typed():
    found = flat_settings(Config(data="/home/me/cells", given={"data": "cells"}, tracker=("mlflow",)))
    assert found["data"] == "cells" and found["tracker"] == '["mlflow"]' and found["loss.l1"] == 5.0
    assert found["model.backbone.outputs"] == "[4]" and "given" not in found
    assert all(value is None or isinstance(value, bool | int | float | str) for value in found.values())


def test_the_table_has_the_best_class_first():
    assert class_table(EVAL) == TABLE and class_table({}) == []
    assert as_markdown(TABLE).splitlines()[2:] == ["| dog | 0.500 |", "| cat | 0.200 |", "| cow | - |"]
