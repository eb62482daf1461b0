"""A validation split for data without one, and the file that keeps it."""

import json
from functools import cached_property
from pathlib import Path

import numpy as np

from ..demands import demand_val_share
from ..files import demand_file, write_json_atomic
from .classes import listed
from .errors import DataError
from .records import Records, Source
from .stratified import divide

_ANEW = "or remove the file to divide anew"


class Divided:
    """A data set whose train split is divided into train and val.

    share: of the images for val. file: a JSON file with the names of the images on each side, {"train": [...], "val":
    [...]}: it decides where it is there, and is written where it is not. DataError where there is a val split already,
    where an image is on neither side or on both, or for names that are no images.
    """

    def __init__(self, source: Source, share: float | None = None, file: str | Path | None = None):
        demand_val_share(share)
        if "val" in source.splits:
            flags = [flag for flag, value in (("--val-share", share), ("--split-file", file)) if value is not None]
            raise DataError(f"{source.root}: there is a val split already; leave out {' and '.join(flags)}")
        self._source, self._share, self._file = source, share, None if file is None else Path(file)
        self._names = None
        if self._file is not None and self._file.exists():
            self._names = _read(self._file)
        elif self._file is not None:
            if share is None:
                raise DataError(f"--split-file {file}: no such file; to have it made give --val-share 0.2 too")
            demand_file(self._file, "give another --split-file")
        self.root, self.splits = source.root, tuple(dict.fromkeys(("train", "val", *source.splits)))
        how = f"{100 * (share or 0):.3g}% of the images are for validation"
        self.about = f"{source.about}; {how if self._names is None else f'divided as in {self._file}'}"

    def read(self, split: str) -> Records:
        """One of the sides, or another split that the data set has; the whole where that has problems."""
        if split not in ("train", "val"):
            return self._source.read(split)
        return self._whole if self._whole.problems else self._whole.take(self._sides[split], name=split)

    @cached_property
    def _whole(self) -> Records:
        return self._source.read("train")

    @cached_property
    def _sides(self) -> dict[str, list[int]]:
        """The images of each side."""
        records = self._whole
        if self._names is not None:
            return _as_in(self._file, self._names, records)
        val = divide(records, self._share)
        sides = {"train": np.flatnonzero(~val).tolist(), "val": np.flatnonzero(val).tolist()}
        if self._file is not None:
            names = {side: [records.names[index] for index in indices] for side, indices in sides.items()}
            write_json_atomic(self._file, names, indent=1)
        return sides


def _as_in(file: Path, names: dict[str, list[str]], records: Records) -> dict[str, list[int]]:
    """The images of each side as a file has them."""
    train, val, known = set(names["train"]), set(names["val"]), set(records.names)
    strange, left = (train | val) - known, known - train - val
    for found, what, advice in (
        (strange, f"not among the images of {records.file}", "take it out"),
        (train & val, "on both sides", "leave it on one"),
        (left, "on neither side", "put it on one"),
    ):
        if found:
            raise DataError(f"{file}: {listed(sorted(found), 3)}: {what}; {advice}, {_ANEW}")
    sides = {"train": train, "val": val}
    return {side: [index for index, name in enumerate(records.names) if name in sides[side]] for side in sides}


def _read(file: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"--split-file {file}: cannot be read ({error.strerror}); give another") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error}); mend it, {_ANEW}") from error
    if not (isinstance(content, dict) and set(content) == {"train", "val"} and all(map(_are_names, content.values()))):
        what = 'give {"train": [names of image files], "val": [...]}, each with one name or more'
        raise DataError(f"{file}: not a division into train and val; {what}, {_ANEW}")
    return content


def _are_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)
