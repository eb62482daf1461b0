"""The files that annotations name: which of them are not there, and which file on the disk may be meant."""

import os
import unicodedata
from collections.abc import Iterator
from functools import cache, cached_property
from urllib.parse import unquote

from PIL import Image

from .known_folders import LARGE, KnownFolders
from .records import Problem, Records


def missing_files(records: Records) -> list[Problem]:
    """Those images of a split whose file is not in its folder, among those of a large one that are to be looked at."""
    if len(records) >= LARGE:
        return _missing_of_many(records)
    listed, missing = cache(listing), MissingFiles(records)
    folder, problems = str(records.folder), []
    for index, name in enumerate(records.names):
        inner, _, base = name.rpartition("/")
        # A listing costs less than to ask for each file.
        if base not in listed(os.path.join(folder, inner)) and not os.path.isfile(os.path.join(folder, name)):
            problems.append(Problem("missing file", missing.sentence(index)))
    return problems


def _missing_of_many(records: Records) -> list[Problem]:
    """The same one by one: a list of so many names would take more memory than all else."""
    known, missing, folder = KnownFolders(records, "there"), MissingFiles(records), str(records.folder)
    problems = [
        Problem("missing file", missing.sentence(index))
        for index, name in records.named(known.to_look_at())
        if not os.path.isfile(os.path.join(folder, name))
    ]
    if not problems:
        known.keep()
    return problems


def listing(folder: str) -> frozenset[str]:
    """Names of what is in a folder; none where that cannot be asked."""
    try:
        return frozenset(os.listdir(folder))
    except (OSError, ValueError):
        return frozenset()


class MissingFiles:
    """What to say of images without a file; the folder is looked through once, and only where that is asked."""

    def __init__(self, records: Records):
        self._records = records

    def sentence(self, index: int) -> str:
        """Where the image's file should be, and the file that may be meant instead."""
        name, folder = self._records.names[index], self._records.folder
        correct = "correct file_name, " if self._records.numbered else ""
        if os.path.islink(folder / name):
            said = ": the link leads nowhere; mend it"
        elif os.path.isfile(elsewhere := self._records.root / name):
            relative = f" (it is relative to that folder, so not {name!r}); put it there"
            said = relative if self._records.numbered else f", but there is {elsewhere}; move it there"
        elif found := next((self._present[form] for form in _forms(name) if form in self._present), None):
            same = unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", found)
            form = " (in another Unicode normal form)" if same else ""
            said = f", but there is {found!r}{form}; {correct}rename the file"
        else:
            said = "; put it there"
        return f"{self._records.called(index)}{folder / name} is missing{said} or remove the image from the annotations"

    @cached_property
    def _present(self) -> dict[tuple[int, str], str]:
        """The files of the folder by each of their forms, the first by name where several share one."""
        names = sorted(
            os.path.relpath(os.path.join(folder, file), self._records.folder)
            for folder, _, files in os.walk(self._records.folder)
            for file in files
        )
        return {form: name for name in reversed(names) for form in _forms(name)}


def _forms(name: str) -> Iterator[tuple[int, str]]:
    """What remains of a name without what programs and systems change in it, from the closest form to the loosest."""
    plain = unicodedata.normalize("NFKC", unquote(name).replace("\\", "/")).strip().casefold()
    path = os.path.normpath(plain)
    for place, part in enumerate((path, os.path.basename(path))):
        stem, ending = os.path.splitext(part)
        yield 2 * place, part
        yield 2 * place + 1, stem if ending in Image.registered_extensions() else part
