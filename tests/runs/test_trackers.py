"""What trackers are sent, and that a run does not depend on them: with trackers that record, fail, or are not there."""

import json
import signal
import sys
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image
from short_runs import short_run
from watched_runs import a_run

from dndetr import train
from dndetr.config import Config
from dndetr.presets import PRESETS
from dndetr.runs.run_log import read_rows
from dndetr.runs.tracker import class_table, flat_settings
from dndetr.runs.trackers import TRACKERS, chosen_trackers

tracking = pytest.importorskip("accelerate.tracking")

ROW = {"event": "train", "step": 20, "loss": 3.5, "lr": 1e-3}
EVAL = {"event": "eval", "step": 40, "epoch": 2, "AP": 0.25, "AP50": None, "classes": {"cat": 0.2, "dog": 0.5, "cow": None}}
OF_STEPS = ("train", "eval")


class Recorded(tracking.GeneralTracker):
    """Keeps what it is told; what accelerate calls its ``tracker`` takes every call."""

    name, requires_logging_directory = "recorded", False
    made: list["Recorded"]
    calls: list[tuple]
    tracker = None

    def __init__(self, *arguments, **options):
        self.options, self.calls = options, []
        self.tracker = mock.MagicMock()
        about = SimpleNamespace(run_id="id-1")
        self.tracker.configure_mock(id="id-1", info=about, **{"name": "id-1", "get_key.return_value": "id-1"})
        self.made.append(self)

    @tracking.on_main_process
    def start(self):
        tracking.logger.debug("accelerate's trackers do so at the end of every call")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    @tracking.on_main_process
    def store_init_configuration(self, values):
        self.calls.append(("settings", values))

    @tracking.on_main_process
    def log(self, values, step=None):
        self.calls.append(("log", step, values))

    def log_images(self, values, step=None, **options):
        self.calls.append(("log", step, values))

    def log_table(self, name, columns=None, data=None, step=None):
        self.calls.append(("table", columns, data))

    def log_artifact(self, path):
        self.calls.append(("file", path))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def recorded(monkeypatch) -> list[Recorded]:
    """Every tracker that is made within, none of which needs its package."""
    made: list[Recorded] = []
    use(monkeypatch, type("Recorded", (Recorded,), {"made": made}))
    return made


def use(monkeypatch, kind: type):
    """In the place of all of accelerate's trackers."""
    for name, tracker in TRACKERS.items():
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, tracker.name, kind)
        if name != "tensorboard":
            package = mock.MagicMock(spec=ModuleType, __name__=tracker.module, __spec__=None)
            for attribute in ("Image", "Task", "ExperimentConfig", "MlflowClient", "end_run"):
                setattr(package, attribute, mock.MagicMock())
            monkeypatch.setitem(sys.modules, tracker.module, package)


def started(name: str, run):
    tracker = TRACKERS[name]()
    tracker.run_started(run)
    return tracker


@pytest.mark.parametrize("name", TRACKERS)
def test_each_is_sent_everything_and_continued(name, recorded, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    tracker = started(name, a_run(tmp_path, steps_per_epoch=20))
    assert signal.getsignal(signal.SIGTERM) == before
    assert torch.distributed.is_initialized() is False
    Image.new("RGB", (6, 4)).save(tmp_path / "first_batch.png")
    tracker.first_batch(None, None)
    tracker.row_logged(ROW)
    tracker.checkpoint_saved(tmp_path / "checkpoint.pt", 20)
    (shown,) = recorded
    assert shown.calls[0][1]["denoising.groups"] == 3 if name != "trackio" else shown.options["config"]
    assert ("log", 20, {"train/loss": 3.5, "train/lr": 1e-3}) in shown.calls
    tracker = started(name, a_run(tmp_path, steps_per_epoch=20, step=20, rows=[ROW]))
    tracker.row_logged({"event": "warning", "step": 30, "message": "hm"})
    tracker.row_logged(EVAL)
    Image.new("RGB", (6, 4)).save(tmp_path / "curves.png")
    tracker.run_ended("finished", "", EVAL)
    _, shown = recorded
    assert shown.main_process_only is False
    numbers = {"eval/epoch": 2, "eval/AP": 0.25, "eval/AP of cat": 0.2, "eval/AP of dog": 0.5}
    assert ("log", 40, numbers) in shown.calls
    said = f"{shown.calls} {shown.tracker.mock_calls} {sys.modules.get(TRACKERS[name].module)} {mocked(name)}"
    assert "hm" in said and "curves" in said and "dog" in said and "end" in said or ("finish",) in shown.calls
    continued = [value for option, value in shown.options.items() if value == "id-1"]
    assert len(continued) == (0 if name == "tensorboard" else 1)
    again = [call for call in shown.calls if call[0] == "log" and call[1] == 20]
    assert len(again) == (1 if name == "tensorboard" else 0)
    entry = {} if name == "tensorboard" else {TRACKERS[name].name: {"run": "id-1", "step": 20}}
    assert (json.loads((tmp_path / "trackers.json").read_text()) if entry else {}) == entry
