"""Samples of a data set with their boxes: all classes among them, and some of the images with warnings."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..data.classes import distinct_names
from ..data.folder_dataset import FolderDataset
from ..data.review.findings import WARNING, Finding
from .samples import draw_samples

_SAMPLES = 12  # images on the sheet
_SUSPICIOUS = 0.25  # share of them for images with warnings, where there are such


def draw_data(path: Path, datasets: Sequence[FolderDataset], findings: Sequence[Finding], title: str) -> int:
    """Images of every split with their boxes; a caption also names the rarest finding -> how many were drawn."""
    samples, names = [], []
    for dataset in datasets:
        names = names or distinct_names(dataset.classes)
        records, kinds = dataset.records, _kinds(dataset, findings)
        for index in _choose(dataset, _SAMPLES // len(datasets), list(kinds)):
            sample = dataset.sample(index)
            called = f"image {sample.image_id}" if records.numbered else Path(records.names[index]).name
            caption = f"{records.name} {called}: {len(sample.labels)} objects"
            boxes, labels = sample.boxes_xyxy.tolist(), sample.labels.tolist()
            samples.append(
                (dataset.picture(index), boxes, labels, ", ".join(filter(None, (caption, kinds.get(index)))))
            )
    if samples:
        draw_samples(path, samples, names, title)
    return len(samples)


def _kinds(dataset: FolderDataset, findings: Sequence[Finding]) -> dict[int, str]:
    """The rarest kind of warning about an image of a split, for each with any, the rarest first."""
    # By their ids: unreadable images have left the data set, and the others have moved up.
    split, place = dataset.records.name, {number: index for index, number in enumerate(dataset.ids)}
    kinds: dict[int, str] = {}
    for finding in sorted(findings, key=lambda finding: len(finding.cases)):
        for where in (where for case in finding.cases for where in case if finding.severity == WARNING):
            number = int(where.records.ids[where.image])
            if where.records.name == split and number in place:
                kinds.setdefault(place[number], finding.kind)
    return kinds


def _choose(dataset: FolderDataset, count: int, suspicious: Sequence[int]) -> list[int]:
    """Images from all over a split, some suspicious; each other adds what was seen least among those before it."""
    chosen = list(suspicious[: int(_SUSPICIOUS * count)])
    candidates = (
        [round(at * (len(dataset) - 1) / 199) for at in range(200)] if len(dataset) > 200 else range(len(dataset))
    )
    candidates = [index for index in candidates if index not in chosen]
    seen = Counter(label for index in chosen for label in set(dataset.labels(index)))
    while candidates and len(chosen) < count:
        best = max(candidates, key=lambda index: sum(0.1 ** seen[label] for label in set(dataset.labels(index))))
        candidates.remove(best)
        chosen.append(best)
        seen.update(set(dataset.labels(best)))
    return sorted(chosen)
