"""What a training run shows: two live lines on a terminal or in a notebook, now and then a plain one in a log file."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

import rich.console
import rich.live
from rich.cells import cell_len, set_cell_size
from rich.text import Text

from .listener import Listener, Run

if TYPE_CHECKING:
    from IPython.display import DisplayHandle

_MEMORY = 10.0  # seconds after which a measured speed counts half
_BAR = 12  # characters: with it the live lines fit a terminal 80 wide


class Console(Listener):
    """What is printed of a training run: its classes, its progress, its evaluations, its warnings.

    quiet: nothing at all (``--quiet``); interval: seconds between updates (default 0.25 on a terminal, 1 in a notebook,
    10 in a file). A step costs about a microsecond between updates.
    """

    def __init__(self, quiet: bool = False, interval: float | None = None, file: TextIO | None = None):
        self._steps_per_epoch = self._step = 0
        self._quiet = quiet
        self._notebook = file is None and rich.console.Console().is_jupyter
        # rich would show every line of a notebook by itself, and none of the live ones without ipywidgets.
        plain = {"force_jupyter": False, "force_terminal": False} if self._notebook else {}
        self._out = rich.console.Console(file=file or sys.stdout, highlight=False, quiet=quiet, **plain)
        self._interval = interval if interval is not None else self._usual_interval()
        self._live: rich.live.Live | None = None
        self._output: DisplayHandle | None = None  # where a notebook shows the live lines
        self._losses: dict[str, float] = {}  # of the newest row
        self._header_shown = False
        self._best: float | None = None
        self._updated = self._stepped = time.perf_counter()
        self._window = [0.0, 0.0, 0.0]  # steps, images, seconds waited since the last update
        self._recent = [0.0, 0.0, 0.0, 0.0]  # the same and seconds in all, older ones fading
        self._evaluation_seconds = 0.0

    def _usual_interval(self) -> float:
        return 1.0 if self._notebook else 0.25 if self._out.is_terminal else 10.0

    def run_started(self, run: Run) -> None:
        self._planned, self._steps_per_epoch, self._step = run.planned, run.steps_per_epoch, run.step
        self._every = run.config.evaluate_every
        self._losses = next((row for row in reversed(run.rows) if row["event"] == "train"), {})
        known = [row["AP"] for row in run.rows if row["event"] == "eval" and row.get("AP") is not None]
        self._best = max(known, default=None)
        self._restart_clock()

    def message(self, text: str, style: str | None = None) -> None:
        """Print one unwrapped line, above the live ones."""
        if self._quiet:
            return
        self._out.print(Text(text, style=style or ""), soft_wrap=True)

    def classes(self, classes: Sequence[tuple[int, str]], counts: Mapping[str, Sequence[int]]) -> None:
        """Print id, name and number of objects of each class; counts: split -> one number per class, in label order."""
        if self._quiet:
            return
        splits = list(counts)
        cells = [["id", "class", *splits]]
        cells += [
            [
                str(category_id),
                set_cell_size(name, min(cell_len(name), 24)),
                *(f"{counts[split][label]:,}" for split in splits),
            ]
            for label, (category_id, name) in enumerate(classes)
        ]
        widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                set_cell_size(cell, width) if place == 1 else cell.rjust(width)
                for place, (cell, width) in enumerate(row)
            )
            for row in ([*zip(line, widths, strict=True)] for line in cells)
        ]
        # Many classes are set side by side: 80 lines would push everything else off the screen.
        across = max(1, (self._out.width - 2) // (cell_len(lines[0]) + 4)) if len(classes) > 12 else 1
        down = -(-len(classes) // across)
        across = -(-len(classes) // down)
        self.message("  " + "    ".join([lines[0]] * across), "bold")
        for row in range(down):
            text = Text("  ")
            for label in range(row, len(classes), down):
                lacking = any(counts[split][label] == 0 for split in splits)
                text.append(lines[1 + label], "yellow" if lacking else "")
                text.append("    ")
            text.rstrip()
            self._out.print(text, soft_wrap=True)

    def step_ended(self, step: int, images: int, waited: float) -> None:
        now = self._stepped = time.perf_counter()
        self._step = step
        window = self._window
        window[0] += 1
        window[1] += images
        window[2] += waited
        if now - self._updated >= self._interval or step == self._planned():
            self._update(now)

    def row_logged(self, row: dict) -> None:
        if row["event"] == "train":
            self._losses = row
        elif row["event"] == "eval":
            self._evaluated(row)
        elif row["event"] in ("warning", "restart"):
            self.message(f"{row['event']}: {row['message']}")

    def _evaluated(self, row: dict) -> None:
        """One row of the evaluation table."""
        self._evaluation_seconds = time.perf_counter() - self._stepped
        self._restart_clock()
        if self._quiet:
            return
        columns = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        if not self._header_shown:
            self._header_shown = True
            titles = "".join(f"{title:>8}" for title in ("epoch", "loss", *columns, "time"))
            self.message(titles, "bold")
        value = row.get("AP")
        best = value is not None and (self._best is None or value > self._best)
        if best:
            self._best = value
        loss = _number(self._losses.get("loss"), 3)
        numbers = "".join(f"{_number(row.get(column), 3):>8}" for column in columns)
        line = f"{row['epoch']:>8}{loss:>8}{numbers}{duration(row['seconds']):>8}"
        self.message(line + ("  best" if best else ""), "bold green" if best else None)

    def run_ended(self, how: str, reason: str, row: dict) -> None:
        """Remove the live lines, which a notebook keeps as they are; later messages are plain.

        Say why a run is done before its configured end.
        """
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._output is not None:
            self._output.update(self._lines())
            self._output = None
        if how == "finished" and reason:
            self.message(f"finished after step {self._step}: {reason}")

    def eta(self) -> float | None:
        """Seconds to the end of the run, from the recent speed and the last evaluation; None before any step."""
        steps, _, _, seconds = self._recent
        if not steps:
            return None
        evaluations = -(-self._epochs // self._every) - self._step // self._steps_per_epoch // self._every
        left = self._planned() - self._step
        return left * seconds / steps + evaluations * self._evaluation_seconds

    @property
    def _epochs(self) -> int:
        """Those that the run will begin."""
        return -(-self._planned() // self._steps_per_epoch)

    def _update(self, now: float) -> None:
        elapsed = now - self._updated
        fading = 0.5 ** (elapsed / _MEMORY)
        self._recent = [old * fading + new for old, new in zip(self._recent, (*self._window, elapsed), strict=True)]
        self._window = [0.0, 0.0, 0.0]
        self._updated = now
        if self._quiet:
            return
        if self._notebook:
            self._show_in_notebook()
            return
        if not self._out.is_terminal:
            self.message("".join(text for text, _ in (*self._progress(), *self._numbers())))
            return
        if self._live is None:
            self._live = rich.live.Live(console=self._out, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(self._lines(), refresh=True)

    def _show_in_notebook(self) -> None:
        """The live lines in an output of their own, above all that is printed later, whose content is replaced."""
        from IPython.display import display

        if self._output is None:
            self._output = display(self._lines(), display_id=True)
        else:
            self._output.update(self._lines())

    def _progress(self) -> list[tuple[str, str]]:
        """How far and how fast, as pieces of (text, style)."""
        epoch = min(self._epochs, (self._step - 1) // self._steps_per_epoch + 1)
        _, images, waited, seconds = self._recent
        speed, share = images / max(seconds, 1e-9), waited / max(seconds, 1e-9)
        return [
            (f"epoch {epoch}/{self._epochs}  step {self._step}/{self._planned()}", "bold"),
            (f"  ETA {duration(self.eta())}", "magenta"),
            (f"  {speed:,.{0 if speed >= 100 else 1}f} images/s", "green"),
            (f"  data wait {share:.0%}", "yellow" if share > 0.2 else "dim"),
        ]

    def _numbers(self) -> list[tuple[str, str]]:
        """The losses and the learning rate, as pieces of (text, style)."""
        shown = [
            (f"  {name} {_number(self._losses[name], 3)}", "cyan" if name == "loss" else "dim cyan")
            for name in ("loss", "matching", "denoising", "one_to_many")
            if name in self._losses
        ]
        rate = self._losses.get("lr")
        return shown if rate is None else [*shown, (f"  lr {rate:.1e}", "dim")]

    def _lines(self) -> Text:
        done = round(_BAR * self._step / max(1, self._planned()))
        dash, overflow = ("-", "crop") if self._out.options.ascii_only else ("━", "ellipsis")
        bar = [(dash * done, "green"), (dash * (_BAR - done) + " ", "bright_black")]
        lines = Text.assemble(*bar, *self._progress(), no_wrap=True, overflow=overflow)
        return lines.append("\n").append(Text.assemble(" " * (_BAR - 1), *self._numbers()))

    def _restart_clock(self) -> None:
        """Whatever was done between two steps, evaluation above all, is not training speed."""
        self._updated = self._stepped = time.perf_counter()
        self._window = [0.0, 0.0, 0.0]


def duration(seconds: float | None) -> str:
    """Seconds as people read them: 8.4s, 1:05, 2:03:04."""
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
