"""What watches a training run: a ``Listener`` is told of its moments, and changes nothing of it.

    class Slack(dndetr.Listener):
        def evaluated(self, row, results, best):
            post(f"epoch {row['epoch']}: AP {row['AP']:.3f}")

    train.run(["--preset", "small", "--data", "my_data"], listeners=[Slack()])

docs/listeners.md has the moments, and what a listener may rely on.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..batch import Batch
    from ..config import Config
    from ..data.training import TrainingData
    from ..denoising import NoisedQueries
    from ..models.dn_detr import Predictions


@dataclass(frozen=True)
class Run:
    """A training run, as those know it who watch it.

    step: how many of its ``steps`` were done before; rows: of the log until then; warn: shows a sentence and keeps it
    in the log; infer: batch, and noised queries or None -> predictions of the weights that are evaluated, in float32;
    weights: what ``dndetr.load`` needs, to be saved as a checkpoint.
    """

    folder: Path
    config: "Config"
    data: "TrainingData"
    device: "torch.device"
    steps: int
    steps_per_epoch: int
    step: int
    rows: list[dict]
    warn: Callable[[str], None]
    infer: "Callable[[Batch, NoisedQueries | None], Predictions]"
    weights: Callable[[], dict]

    @property
    def names(self) -> list[str]:
        """Class names in label order."""
        return [name for _, name in self.data.classes]


class Listener:
    """Is told of the moments of a run, each by one method, on the first of its processes; all may be left out."""

    def run_started(self, run: Run) -> None:
        """Training is about to begin or, with ``run.step`` above 0, to go on."""

    def first_batch(self, batch: "Batch", noised: "NoisedQueries | None") -> None:
        """What the first step of a new run is about to see; noised: None without denoising."""

    def step_ended(self, step: int, images: int, waited: float) -> None:
        """One more step is done; images: of all processes; waited: seconds that it waited for them."""

    def row_logged(self, row: dict) -> None:
        """A row of ``metrics.jsonl``, of any event but "end"."""

    def evaluated(self, row: dict, results: list[dict], best: bool) -> None:
        """The weights were scored.

        row: what is logged of it, next; results: the detections in COCO's format; best: the AP is the highest so far.
        """

    def checkpoint_saved(self, path: Path, step: int) -> None:
        """``checkpoint.pt`` holds the run after this many steps."""

    def run_ended(self, how: str, reason: str, row: dict) -> None:
        """It is over: "finished", "stopped" by a signal, or "failed".

        reason: in words, where it did not finish; row: of the last evaluation, {} where there was none.
        """


MOMENTS = tuple(name for name in vars(Listener) if not name.startswith("_"))


class Listeners:
    """All that a run tells: first those that write its files, then those that only watch, each in order.

    A file that cannot be written ends the run. Whatever fails in a watcher is named once, and the run goes on.
    """

    def __init__(self, files: Sequence[Listener] = (), watchers: Sequence[Listener] = ()):
        for watcher in watchers:
            if isinstance(watcher, type) or not any(callable(getattr(watcher, name, None)) for name in MOMENTS):
                raise ValueError(f"{watcher!r} is no listener: give an object with one of {', '.join(MOMENTS)}")
        self._files = {name: _methods(files, name) for name in MOMENTS}
        self._watchers = {name: _methods(watchers, name) for name in MOMENTS}
        self._named: set[int] = set()
        self._run: Run | None = None

    def tell(self, moment: str, *about: Any) -> None:
        """Call every listener's method of that name."""
        if moment == "run_started":
            (self._run,) = about
        for _, method in self._files[moment]:
            method(*about)
        self._tell_watchers(moment, about)

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
            self._tell_watchers("run_ended", (how, reason, row))

    def _tell_watchers(self, moment: str, about: tuple) -> None:
        failed = []
        for listener, method in self._watchers[moment]:
            try:
                # Rows are copied: who keeps one for himself may do with it what he likes.
                method(*(copy.deepcopy(part) if isinstance(part, dict) else part for part in about))
            except Exception as error:
                if id(listener) not in self._named:
                    self._named.add(id(listener))
                    failed.append(f"listener {type(listener).__name__} failed in {moment} ({described(error)})")
        for failure in failed:  # a warning is a row, which comes after what all are told now
            self._run.warn(f"{failure}; training goes on, and its further errors are not shown")


def described(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".rstrip(": ").replace("\n", " ")


def _methods(listeners: Sequence[Listener], name: str) -> list[tuple[Listener, Callable]]:
    """Those that do something; most steps are told to few."""
    found = [(listener, getattr(listener, name, None)) for listener in listeners]
    empty = getattr(Listener, name)
    return [(listener, method) for listener, method in found if method and getattr(method, "__func__", None) != empty]

