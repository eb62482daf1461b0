"""What is written down while a run trains: rows of the log, TensorBoard's scalars, and warnings that the rows give."""

from collections.abc import Callable
from pathlib import Path

from .tensorboard import Board
from ..config import Config
from .folder import RunLog
from .early_warnings import Watch


class Journal:
    """The log of a run in ``folder``, which may have rows already, with whoever reads it along.

    steps: of the whole run; say: shows a warning to the user.
    """

    def __init__(self, folder: Path, config: Config, steps: int, say: Callable[[str], None]):
        self.log, self._watch, self._say = RunLog(folder), Watch(config, steps), say
        rows = self.log.rows()
        for row in rows:
            self._watch.see(row)  # what there was to say about these was said
        self._board = Board(folder, rows) if config.tensorboard else None

    def write(self, event: str, step: int, **fields) -> None:
        """Append a row, and a warning if it gives reason for one."""
        row = self.log.write(event, step, **fields)
        if self._board is not None:
            self._board.write(row)
        if (warning := self._watch.see(row)) is not None:
            self.warn(step, warning)

    def warn(self, step: int, message: str) -> None:
        """Show a warning and keep it in the log."""
        self.log.write("warning", step, message=message)
        self._say(f"warning: {message}")

    def close(self) -> None:
        """Finish TensorBoard's file."""
        if self._board is not None:
            self._board.close()
