"""Accelerate's trackers without their packages: one that keeps what it is told, and one of which every call raises."""

import signal
import sys
from types import SimpleNamespace
from unittest import mock

from accelerate import tracking

from dndetr.runs.trackers import TRACKERS


class Recorded(tracking.GeneralTracker):
    """Keeps its options and calls; what accelerate calls its ``tracker`` takes every call."""

    name, requires_logging_directory = "recorded", False
    tracker = None

    def __init__(self, **options):
        self.options, self.calls, self.tracker = options, [], mock.MagicMock()
        self.tracker.config.update = self.store_init_configuration  # as W&B's is told
        # However a tracker calls the id of its run.
        self.tracker.id = self.tracker.name = self.tracker.get_key.return_value = "id-1"
        self.tracker.info = SimpleNamespace(run_id="id-1")

    @tracking.on_main_process
    def start(self):
        tracking.logger.debug("the own trackers end every call with such a line")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    @tracking.on_main_process
    def store_init_configuration(self, values):
        self.calls.append(("settings", values))

    @tracking.on_main_process
    def log(self, values, step=None):
        self.calls.append(("log", values, step))

    @tracking.on_main_process
    def log_images(self, values, step=None, **options):
        self.calls.append(("images", list(values), step))

    @tracking.on_main_process
    def log_table(self, name, columns, data, step):
        self.calls.append(("table", columns, data))

    @tracking.on_main_process
    def log_artifact(self, path):
        self.calls.append(("file", path))

    @tracking.on_main_process
    def finish(self):
        self.calls.append(("finish",))


def failing(*names: str) -> type:
    """A recorded tracker of which these methods raise, after they were noted."""

    def method(name):
        def fail(self, *arguments, **options):
            self.calls.append((name,))
            raise ConnectionError(f"no server for {name}")

        return fail

    return type("Failing", (Recorded,), {name: method(name) for name in names})


def take_the_place(monkeypatch, kind: type) -> list:
    """Of all of accelerate's trackers, whose packages are then there -> those that are made from now on."""
    made = []

    def make(**options):
        made.append(kind(**options))
        return made[-1]

    make.start = kind.start
    for tracker in TRACKERS.values():
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, tracker.name, make)
        if tracker.module != "torch.utils.tensorboard":
            monkeypatch.setitem(sys.modules, tracker.module, mock.MagicMock())
    return made
