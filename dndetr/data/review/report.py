"""All that can be said of a data set before it is trained on: what is in its splits, and what is wrong with them."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np

from ...config import Config
from ..classes import Classes
from ..errors import DataError
from ..folder_dataset import FolderDataset
from ..records import NOTHING_TO_LEARN, Problem, Records, Source, class_problems
from ..training import evaluation_transform
from ..transforms import Unresized
from .boxes import box_findings
from .classes import class_findings
from .findings import ERROR, NOTE, WARNING, Finding, Place, problem_finding
from .image_files import MISSING, UNREADABLE, file_problems, told, turn_remarks
from .pictures import picture_findings

_READ_BY_TRAINING = ("train", "val")
_SEVERITIES = (ERROR, WARNING, NOTE)

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""What is being done with how many files -> within, to be called with the numbers of files done."""


class Report(NamedTuple):
    """One split: what is in it, what is wrong, and the data set as far as it can be used.

    counts: objects of each class, in label order; fingerprints: of the pictures that can be decoded, by place.
    """

    records: Records
    counts: list[int]
    remarks: list[str]
    problems: list[Finding]
    fingerprints: dict[int, bytes]
    dataset: FolderDataset | None

    @property
    def of_other_classes(self) -> bool:
        """Whether its classes are not those of training."""
        return any(problem.kind == "classes" for problem in self.problems)


class Review(NamedTuple):
    """A data set: a report on each split that can be read, and everything found, what stops a run first."""

    reports: list[Report]
    findings: list[Finding]

    def of(self, severity: str) -> list[Finding]:
        """The findings of that severity."""
        return [finding for finding in self.findings if finding.severity == severity]

    def as_json(self) -> dict:
        """What is in the splits, the verdict, and all findings in full."""
        return {
            "splits": {
                report.records.name: {
                    "file": str(report.records.file),
                    "images": len(report.records),
                    "objects": sum(report.counts),
                    "remarks": report.remarks,
                }
                for report in self.reports
            },
            "verdict": self.verdict(),
            "findings": [finding.as_json() for finding in self.findings],
        }

    def verdict(self) -> str:
        """A sentence on whether training would go on."""
        stops = [finding for finding in self.of(ERROR) if finding.split in _READ_BY_TRAINING]
        if stops:
            skipped = {finding.kind for finding in stops} == {UNREADABLE}
            unless = ", unless with --images.skip-unreadable" if skipped else ""
            return f"training would stop{unless}: {stops[0].message}"
        unseen = [name for name in _READ_BY_TRAINING if all(report.records.name != name for report in self.reports)]
        if unseen:
            return f"nothing here would stop training; {' and '.join(unseen)} not checked"
        return "training would start"


def review_source(source: Source, config: Config, progress: Progress, splits: Sequence[str] = ()) -> Review:
    """Everything found in these splits, by default train, val, and test where there is one, each image decoded.

    config: the run for which boxes are tiny and images crowded.
    """
    reports, obstacles = [], {}
    for name in dict.fromkeys(splits or ("train", "val", "test")):
        if not splits and name == "test" and name not in source.splits:
            continue  # what training does not need may be absent
        try:
            records = source.read(name)
        except DataError as error:
            # What training does not need may be absent, unless it is asked for.
            severity = ERROR if splits or name in _READ_BY_TRAINING else WARNING
            obstacles.setdefault(str(error), obstacle(error, name, severity))
            continue
        if any(report.records is records for report in reports):
            continue  # a set that cannot be divided is on neither side
        training = next((report.records.classes for report in reports if report.records.name == "train"), None)
        reports.append(_report(records, training or None, progress))
    sound = [report for report in reports if not report.records.problems]
    found = [finding for report in reports for finding in report.problems]
    found += picture_findings([(report.records, report.fingerprints) for report in reports])
    for report in sound:
        found += box_findings(report.records, evaluation_transform(config), config)
    found += class_findings([report.records for report in sound if not report.of_other_classes])
    found.sort(key=lambda finding: _SEVERITIES.index(finding.severity))
    return Review(reports, [*obstacles.values(), *found])


def obstacle(error: DataError, split: str, severity: str = ERROR) -> Finding:
    """What keeps a split from being read at all."""
    return Finding(severity, "split", split, str(error))


def _report(records: Records, training: Classes | None, progress: Progress) -> Report:
    """Everything wrong with a split, each image decoded; training: the classes of the training split."""
    problems = list(records.problems)
    if training is not None:
        problems += class_problems(records.classes, training)
    turns, fingerprints = Counter(), {}
    with progress(f"decoding {records.folder}", len(records)) as advance:
        files = file_problems(records, decode=True, progress=advance, turns=turns, fingerprints=fingerprints)
    dataset, remarks = None, [*records.remarks, *turn_remarks(turns)]
    if not problems and len(files) < len(records) and not any(problem.kind == MISSING for problem in files):
        dataset = FolderDataset(records, Unresized(), training or records.classes, cache_bytes=0)
        remarks = [*dataset.remarks, *turn_remarks(turns)]
        dataset.leave_out(problem.index for problem in files)
        if training is None and records.name == "train" and not any(dataset.counts):
            problems.append(Problem("objects", NOTHING_TO_LEARN))
    findings = [problem_finding(problem, records) for problem in problems]
    findings += [
        problem_finding(problem, records, [(Place(records, file.index),)])
        for file, problem in zip(files, told(files), strict=True)
    ]
    single = records.objects.label[~records.objects.crowd]
    counts = np.bincount(single, minlength=len(records.classes)).tolist()
    return Report(records, counts, remarks, findings, fingerprints, dataset)
