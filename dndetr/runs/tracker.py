"""What a tracker of experiments is sent of a run, through accelerate's trackers; which ones is in ``trackers``."""

import contextlib
import importlib
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..config import Config, to_dict
from ..files import write_json_atomic
from ..scoring.coco import STATISTICS
from .listener import Listener, Run, described

RECORD = "trackers.json"  # in a run's folder: by tracker, its own run's id, and up to which step that has everything
FIRST_PICTURES = ("first_batch.png",)
LAST_PICTURES = ("predictions.png", "curves.png", "denoising.png")


class Tracker(Listener):
    """Shows a run in a tracker: its settings, every number of its log, its pictures, and the final table.

    A kind of call that has failed is not made again in this run, since each might wait minutes for a server that is
    gone; the other kinds go on. ModuleNotFoundError that says what to install, where a package is missing.
    """

    name: str
    """What accelerate calls it."""
    module: str
    """Whose import says that it is installed."""
    needs: str
    """What is said where it is not, with what to type."""

    def __init__(self):
        try:
            importlib.import_module(self.module)
            from accelerate import tracking

            self._make = tracking.LOGGER_TYPE_TO_CLASS[self.name]
            self._make.start  # noqa: B018  (older versions start in their constructor, as whatever process they are)
        except (ImportError, KeyError, AttributeError) as error:
            raise ModuleNotFoundError(self.needs) from error
        except Exception as error:  # of a package that is there, and does not fit others that are
            raise ModuleNotFoundError(f"{self.needs} (its import fails: {described(error)})") from error
        self._failed: set[str] = set()

    def run_started(self, run: Run) -> None:
        self._run, self._folder, self._step = run, run.folder, run.step
        known = {} if self.starts_anew else self._record().get(self.name, {})
        rows = [row for row in run.rows if row["step"] > known.get("step", -1)]
        calls = [("start", lambda: self._start(known.get("run")))]
        if not known:
            calls.append(("settings", lambda: self._send_settings(flat_settings(run.config))))
            calls.append(("pictures", lambda: self._send_pictures(FIRST_PICTURES, 0)))
        calls += [("rows", lambda row=row: self._send_row(row)) for row in rows]
        self._send(*calls, ("record", lambda: self._write_record(run.step)))

    def first_batch(self, batch: Any, noised: Any) -> None:
        self._send(("pictures", lambda: self._send_pictures(FIRST_PICTURES, 0)))

    def row_logged(self, row: dict[str, Any]) -> None:
        self._step = row["step"]
        self._send(("rows", lambda: self._send_row(row)))

    def checkpoint_saved(self, path: Path, step: int) -> None:
        # What comes after a checkpoint may be forgotten, and is then done and sent again.
        self._send(("record", lambda: self._write_record(step)))

    def run_ended(self, how: str, reason: str, row: dict) -> None:
        calls = []
        if how == "finished":
            calls.append(("pictures", lambda: self._send_pictures(LAST_PICTURES, self._step)))
        if how == "finished" and row:
            calls.append(("table", lambda: self._send_table(class_table(row))))
            final = {name: row[name] for name in STATISTICS if row.get(name) is not None}
            calls.append(("summary", lambda: self._send_summary(final)))
        self._send(*calls, ("finish", lambda: self._finish(how)))

    def _send(self, *calls: tuple[str, Callable[[], Any]]) -> None:
        """Make all calls, each of a kind, whatever becomes of those before; raises the first error."""
        errors = []
        for kind, call in calls:
            if kind in self._failed or "start" in self._failed:
                continue
            try:
                with _undisturbed():
                    call()
            except (Exception, SystemExit) as error:
                self._failed.add(kind)
                errors.append(error)
        if errors:
            raise errors[0]

    def _start(self, continued: str | None) -> None:
        self._tracker = self._make(**self._options(continued))
        # Only the first process is told. To ask who is first, accelerate would set up processes and choose a device.
        self._tracker.main_process_only = False
        self._tracker.start()

    def _send_row(self, row: dict[str, Any]) -> None:
        if row["event"] in ("train", "eval"):
            self._send_numbers(numbers(row), row["step"])
        elif row["event"] == "warning":
            self._send_text("warning", row["message"], row["step"])

    def _send_pictures(self, names: Sequence[str], step: int) -> None:
        for path in (self._folder / name for name in names):
            if path.exists():
                self._send_picture(path, step)

    def _record(self) -> dict[str, dict]:
        path = self._folder / RECORD
        return json.loads(path.read_text()) if path.exists() else {}

    def _write_record(self, step: int) -> None:
        if not self.starts_anew and "rows" not in self._failed:
            write_json_atomic(self._folder / RECORD, self._record() | {self.name: {"run": self._id(), "step": step}})

    # What trackers do differently.

    starts_anew = False
    """Whether a run that goes on is shown from its first step again, in the place of what there was."""

    def _options(self, continued: str | None) -> dict[str, Any]:
        """Arguments of accelerate's class; continued: the id of the tracker's own run that goes on, if any."""
        raise NotImplementedError

    def _id(self) -> str:
        """Of the tracker's own run."""
        raise NotImplementedError

    def _send_settings(self, values: dict[str, Any]) -> None:
        self._tracker.store_init_configuration(values)

    def _send_numbers(self, values: dict[str, float], step: int) -> None:
        self._tracker.log(values, step=step)

    def _send_text(self, name: str, text: str, step: int) -> None:
        self._tracker.log({name: text}, step=step)

    def _send_picture(self, path: Path, step: int) -> None:
        with Image.open(path) as image:
            self._tracker.log_images({path.stem: [image.convert("RGB")]}, step=step)

    def _send_table(self, rows: list[list]) -> None:
        self._tracker.log_table("classes", columns=["class", "AP"], data=rows, step=self._step)

    def _send_summary(self, statistics: dict[str, float]) -> None:
        self._send_numbers({f"final/{name}": value for name, value in statistics.items()}, self._step)

    def _finish(self, how: str) -> None:
        self._tracker.finish()

    @property
    def _title(self) -> str:
        return self._folder.resolve().name


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a train or eval row, by the names that they have in a tracker."""
    found = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
    found |= {f"AP of {name}": value for name, value in row.get("classes", {}).items() if value is not None}
    return {f"{row['event']}/{name}": value for name, value in found.items()}


def class_table(row: dict[str, Any]) -> list[list]:
    """(class, AP) of an eval row, the best first; last those without objects, of which there is none."""
    return sorted(map(list, row.get("classes", {}).items()), key=lambda entry: (entry[1] is None, -(entry[1] or 0)))


def as_markdown(rows: list[list]) -> str:
    """A table of classes as text."""
    lines = [f"| {name} | {'-' if value is None else f'{value:.3f}'} |" for name, value in rows]
    return "\n".join(["| class | AP |", "| --- | --- |", *lines])


def flat_settings(config: Config) -> dict[str, bool | int | float | str | None]:
    """Every setting by its name, such as ``denoising.groups``: lists as JSON, paths as they were typed."""
    values = to_dict(config)
    return dict(_flat(values | values.pop("given")))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value) if isinstance(value, list) else value


_lock = threading.Lock()  # what is set aside is of the process, whose threads may train


class _PlainLogger(logging.LoggerAdapter):
    """What accelerate's trackers call of their logger."""

    warning_once = logging.LoggerAdapter.warning


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Within, accelerate's trackers log as other libraries do; after it, signals are handled as before.

    Their own logger raises unless there is an ``accelerate.PartialState``, which joins processes that an environment
    such as torchrun's speaks of, chooses a device, and sets the number of threads. ClearML takes the signals by which a
    run is stopped.
    """
    from accelerate import tracking

    with _lock:
        logger, tracking.logger = tracking.logger, _PlainLogger(logging.getLogger(tracking.__name__), {})
        main = threading.current_thread() is threading.main_thread()  # the only one in which they can be changed
        stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if main else ()
        handlers = {number: signal.getsignal(number) for number in stopping}
        try:
            yield
        finally:
            tracking.logger = logger
            for number, handler in handlers.items():
                if signal.getsignal(number) != handler:
                    signal.signal(number, handler)
