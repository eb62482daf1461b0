"""What watches a training run: a ``Listener`` is told of its moments, and changes nothing of it.

    class Slack(dndetr.Listener):
        def evaluated(self, row, results, best):
            post(f"epoch {row['epoch']}: AP {row['AP']:.3f}")

    dndetr.fit("my_data", preset="small", listeners=[Slack()])

docs/listeners.md has the moments, and what a listener may rely on.
"""

import copy
import inspect
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.classes import distinct_names

if TYPE_CHECKING:
    import torch

    from ..batch import Batch
    from ..config import Config
    from ..data.classes import Classes
    from ..denoising import NoisedQueries
    from ..models.dn_detr import Predictions
    from ..scoring.results import Results


@dataclass(frozen=True)
class Run:
    """A training run, as those know it who watch it.

    classes: (category id, name) in label order; step: how many of its ``steps`` were done before; rows: of the log
    until then. validation: the validation images (of several processes, this one's share); truth: gives the
    ground truth of all of them. planned: the steps that it will have as far as is known now, fewer than ``steps`` where
    its time is limited. infer: batch, and noised queries or None -> predictions of the weights that are evaluated,
    in float32, on the device; weights: a copy of what ``dndetr.load`` needs, to be saved as a checkpoint. warn: shows a
    sentence and keeps it in the log; stop: asks the run to end after this step, as a signal does.
    """

    folder: Path
    config: "Config"
    classes: "Classes"
    device: "torch.device"
    steps: int
    steps_per_epoch: int
    step: int
    rows: list[dict]
    validation: "Callable[[], Iterator[Batch]]"
    truth: Callable[[], dict]
    infer: "Callable[[Batch, NoisedQueries | None], Predictions]"
    weights: Callable[[], dict]
    planned: Callable[[], int]
    warn: Callable[[str], None]
    stop: Callable[[], None]

    @property
    def ground_truth(self) -> dict:
        """The objects of all validation images, in COCO's format; made when it is first asked for."""
        return self.truth()

    @property
    def names(self) -> list[str]:
        """Class names in label order."""
        return distinct_names(self.classes)


class Listener:
    """Is told of the moments of a run, each by one method, on the first of its processes; each may be left out."""

    def run_started(self, run: Run) -> None:
        """Training is about to begin or, with ``run.step`` above 0, to go on."""

    def first_batch(self, batch: "Batch", noised: "NoisedQueries | None") -> None:
        """A copy of what the first step of a new run is about to see; noised: None without denoising."""

    def step_ended(self, step: int, images: int, waited: float) -> None:
        """One more step is done; images: of all processes; waited: seconds that it waited for them."""

    def row_logged(self, row: dict) -> None:
        """A row of ``metrics.jsonl``, of any event but "end"."""

    def evaluated(self, row: dict, results: "Results", best: bool) -> None:
        """The weights were scored.

        row: what was logged of it; results: the detections, as a sequence of dictionaries in COCO's format and in
        columns; best: the AP is the highest so far.
        """

    def checkpoint_saved(self, path: Path, step: int) -> None:
        """``checkpoint.pt`` holds the run after this many steps."""

    def run_ended(self, how: str, reason: str, row: dict) -> None:
        """It is over: "finished", "stopped" by a signal, or "failed".

        reason: in words, where it did not get to its configured end; row: of the last evaluation, {} where there was
        none.
        """


MOMENTS = tuple(name for name in vars(Listener) if not name.startswith("_"))


class Listeners:
    """All that a run tells: first those that write its files, then those that only watch, each in order.

    A file that cannot be written ends the run. Whatever fails in a watcher is named once, and the run goes on. What is
    said while a moment is being told is told after it: everyone hears everything in the same order.
    """

    def __init__(self, files: Sequence[Listener] = (), watchers: Sequence[Listener] = ()):
        for watcher in watchers:
            _demand_listener(watcher)
        self._files = {name: _methods(files, name) for name in MOMENTS}
        self._watchers = {name: _methods(watchers, name) for name in MOMENTS}
        self._named: set[int] = set()
        self._waiting: deque[tuple[str, tuple]] = deque()
        self._run: Run | None = None  # from its start to its end
        self._telling = self._answering = False
        self._thread = threading.get_ident()

    def tell(self, moment: str, *about: Any) -> None:
        """Call every listener's method of that name, in the trainer's own thread: what others say waits for it."""
        if moment == "run_started":
            (self._run,) = about
        self._waiting.append((moment, about))
        if self._telling or threading.get_ident() != self._thread:
            return
        self._telling = True
        try:
            while self._waiting:
                moment, about = self._waiting.popleft()
                self._answering = moment == "row_logged" and about[0]["event"] == "warning"
                for _, method in self._files[moment]:
                    method(*about)
                failures = self._tell_watchers(moment, about)
                self._answering = False
                for failure in failures:
                    self._run.warn(f"{failure}; training goes on, and its further errors are not shown")
        finally:
            self._telling = self._answering = False

    def warn(self, step: int, text: object) -> None:
        """Say a sentence in a row of the log or, while there is no run, on stderr; no warning answers another."""
        if self._run is None:
            print(f"warning: {text}", file=sys.stderr)
        elif not self._answering:
            self.tell("row_logged", {"event": "warning", "step": step, "message": str(text)})

    def end(self, how: str, reason: str, row: dict) -> None:
        """The last moment of a run that started; the watchers are told of it whatever becomes of the files."""
        if self._run is None:
            return
        try:
            for _, method in self._files["run_ended"]:
                method(how, reason, row)
        except BaseException as error:
            how, reason = "failed", described(error)
            raise
        finally:
            self._run = None
            for failure in self._tell_watchers("run_ended", (how, reason, row)):
                self.warn(0, failure)

    def _tell_watchers(self, moment: str, about: tuple) -> list[str]:
        """Tell all of them -> what failed for the first time, in words."""
        failures = []
        for listener, method in self._watchers[moment]:
            try:
                method(*map(_own, about))
            except (Exception, SystemExit) as error:
                if id(listener) not in self._named:
                    self._named.add(id(listener))
                    failures.append(f"listener {type(listener).__name__} failed in {moment} ({described(error)})")
        return failures


def described(error: BaseException) -> str:
    """An error in one line."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # of an error of somebody else's
        text = ""
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def _demand_listener(listener: Any) -> None:
    """ValueError for what cannot be told anything."""
    methods = [method for name in MOMENTS if callable(method := getattr(listener, name, None))]
    if isinstance(listener, type) or not methods:
        raise ValueError(f"{listener!r} is no listener: give an object with one of {', '.join(MOMENTS)}")
    for method in methods:
        if inspect.iscoroutinefunction(method):
            raise ValueError(f"{listener!r}: {method.__name__} is a coroutine, which nobody would run: leave out async")


def _methods(listeners: Sequence[Listener], name: str) -> list[tuple[Listener, Callable]]:
    """Those that do something; most steps are told to few."""
    empty = getattr(Listener, name)
    found = [(listener, getattr(listener, name, None)) for listener in listeners]
    return [pair for pair in found if callable(pair[1]) and getattr(pair[1], "__func__", None) != empty]


def _own(part: Any) -> Any:
    """A row of his own for everyone: who keeps it may do with it what he likes."""
    if isinstance(part, Run):
        return replace(part, rows=copy.deepcopy(part.rows))
    return copy.deepcopy(part) if isinstance(part, dict) else part
