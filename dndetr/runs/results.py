"""Results on the disk: the folder of a command's, with all of them in it or as it was before; a run's detections."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..files import write_json_rows, writing
from ..scoring.results import Results
from .folder import output_folder
from .listener import Listener, Run


class ResultsFolder:
    """A folder, and what was written into it; made by ``results_folder``."""

    def __init__(self, path: Path):
        self.path = path
        self.files: list[Path] = []

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """The path of a file, to be written within."""
        path = self.path / name
        self.files.append(path)
        with writing(path):
            yield path


@contextlib.contextmanager
def results_folder(output: Path | None, name: str, root: str | Path = "runs") -> Iterator[ResultsFolder]:
    """The folder that the user asked for, or else a new one, ``root/name-1`` or the next.

    If the block fails, what it wrote is removed, since half a result looks like a whole one; the folder, and those
    above it, only where they are new and nothing else is in them.
    """
    with output_folder(output, name, root) as folder:
        results = ResultsFolder(folder)
        try:
            yield results
        except BaseException:
            for file in results.files:
                with contextlib.suppress(OSError):  # the error that is on its way says more
                    file.unlink()
            raise


class DetectionsFile(Listener):
    """``detections_val.json``: those of the last evaluation, in COCO's results format."""

    def run_started(self, run: Run) -> None:
        self._path = run.folder / "detections_val.json"

    def evaluated(self, row: dict, results: Results, best: bool) -> None:
        write_json_rows(self._path, results)
