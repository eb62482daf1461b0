"""Training from Python: ``run = dndetr.fit("my_data", preset="small", epochs=20)``."""

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import train
from .config import Config, from_dict
from .output import unfailing
from .runs.listener import Listener
from .runs.run_log import NAME, read_rows
from .settings import changed, flat, in_python

if TYPE_CHECKING:
    import torch

    from .data.classes import Classes
    from .detector import Detector


class TrainedRun:
    """The folder of a run, and what has come of it so far.

    Its numbers are read when they are asked for, so they are those of a run that still goes on, too. It can be given
    wherever a run's folder can: ``dndetr.load(run)``, ``dndetr.fit(resume=run)``. FileNotFoundError, on reading, for a
    folder that no run has written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @property
    def config(self) -> Config:
        """Every setting; paths are absolute."""
        return from_dict(json.loads(self._file("config.json").read_text()))

    @property
    def rows(self) -> list[dict]:
        """The rows of ``metrics.jsonl``: training losses, evaluations, warnings, the end."""
        return read_rows(self._file(NAME))

    @property
    def evaluations(self) -> list[dict]:
        """Those of them that are evaluations, in order."""
        return [row for row in self.rows if row["event"] == "eval"]

    @property
    def metrics(self) -> dict:
        """The last evaluation: ``AP``, ``AP50``, ... with ``epoch`` and ``step``; {} where there was none."""
        return next(reversed(self.evaluations), {})

    @property
    def best(self) -> float | None:
        """The highest AP of all evaluations; None where there was none."""
        return max((row["AP"] for row in self.evaluations if row["AP"] is not None), default=None)

    @property
    def status(self) -> str:
        """ "finished", or "stopped" before its end: it can be resumed, unless it is still going on elsewhere."""
        return "finished" if any(row["event"] == "end" for row in self.rows) else "stopped"

    @cached_property
    def classes(self) -> "Classes":
        """Category id and name of each class, in label order."""
        from .runs.checkpoint import load_checkpoint

        return [(number, name) for number, name in load_checkpoint(self._weights(best=True))["classes"]]

    def detector(self, device: "str | torch.device" = "auto", *, best: bool = True) -> "Detector":
        """The detector of ``best.pt`` or ``best.safetensors``; without them, or not ``best``, of ``checkpoint.pt``."""
        from .detector import load

        return load(self._weights(best), device)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        best = self.best
        score = "no AP" if best is None else f"best AP {best:.3f}"
        return f"TrainedRun({str(self.folder)!r}): {self.config.preset}, {self.status}, {score}"

    def _weights(self, best: bool) -> Path:
        from .runs.checkpoint import BEST

        names = [*(BEST if best else ()), "checkpoint.pt"]
        paths = [self._file(name) for name in names]
        return next((path for path in paths if path.exists()), paths[-1])

    def _file(self, name: str) -> Path:
        if not (self.folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{self.folder} is no run's folder (it has no config.json): give one such as runs/tiny-1"
            )
        return self.folder / name


class Interrupted(KeyboardInterrupt):
    """Training was interrupted, and its ``run`` is saved; a notebook shows one line of it."""

    def __init__(self, run: TrainedRun):
        super().__init__(_how_to_go_on(run))
        self.run = run

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: where in the training it was says nothing to those who interrupted it."""
        return [f"interrupted; {self}"]


_training = threading.Lock()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Within, no other run can begin: torch's random numbers and what is printed are one for all threads."""
    if not _training.acquire(blocking=False):
        raise RuntimeError("a run is being trained in this process: wait for its end, or train in another process")
    try:
        yield
    finally:
        _training.release()


@_alone()
@unfailing()
def fit(data: str | Path | None = None, *, listeners: Iterable[Listener] = (), **settings: Any) -> TrainedRun:
    """Train a detector, as ``python -m dndetr.train`` does -> the run; docs/python.md.

    data: a folder in COCO, YOLO or VOC format, or "shapes"; listeners: are told of the run. settings: every flag of the
    command, by its name: ``preset="small"``, ``epochs=20``, ``denoising={"groups": 3}``; ``resume=run`` goes on with a
    run.

    Raises ValueError for settings that are wrong, RuntimeError while another call trains, and whatever ends the
    training. Ctrl-C and a notebook's stop button end it after the current step: the run is saved, and Interrupted, a
    KeyboardInterrupt with the ``run``, is raised. One that a listener stops is returned.
    """
    try:
        given = flat(settings if data is None else {"data": data, **settings})
        config = changed(train.starting_point(given.get("preset"), given.get("overfit")), given)
        if not isinstance(listeners, Iterable):
            raise ValueError(f"listeners {listeners!r}: give a list of them")
        outcome = train.train(config, given.keys(), [*listeners])
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        error.args = tuple(in_python(part) if isinstance(part, str) else part for part in error.args)
        raise
    run = TrainedRun(outcome.folder)
    if outcome.signal == signal.SIGINT:
        raise Interrupted(run)
    if outcome.stopped is not None and outcome.first and not config.quiet:
        print(_how_to_go_on(run))
    if outcome.signal is not None:
        # What the process does of itself when it is told to end: it has only been put off until all was saved.
        sys.stdout.flush()
        signal.raise_signal(outcome.signal)
    return run


def _how_to_go_on(run: TrainedRun) -> str:
    if run.status == "finished":
        return f"{run.folder} is finished"
    return f"{run.folder} is saved: go on with dndetr.fit(resume={str(run.folder)!r})"
