"""Pascal VOC folders: where their parts are, and what their files become.

Layout: ``JPEGImages/``, ``Annotations/<image>.xml`` and ``ImageSets/Main/<split>.txt``, in the folder itself or in the
only such folder within (``VOCdevkit/VOC2012``). Without lists in ``ImageSets`` nobody has divided the images. Or each
XML file beside its image, in a folder per split, as Roboflow writes it, or in one folder, as LabelImg does.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from ..classes import listed
from ..errors import DataError
from ..folders import walk
from ..image import is_image_name
from ..image_header import UNKNOWN, upright_size
from ..limits import is_plain, leads_out
from ..natural_order import natural_key
from ..records import Objects, Problem, Records, make_objects
from ..split_names import NAMES, names_of, no_split, way_without
from ..units import are_shares
from .voc_lists import find_class_file, find_lists, lists_of_splits, read_classes, read_rows
from .voc_xml import Annotation, read_annotation

_IMAGES, _ANNOTATIONS = ("JPEGImages", "images"), ("Annotations", "annotations")
_DEEPEST = 2  # levels below the folder that is given


def find(path: Path) -> "VocSource | None":
    """The Pascal VOC data set in a folder or below it, if there is one; DataError where there are several."""
    level = [path]
    for _ in range(_DEEPEST + 1):
        if len(homes := [folder for folder in level if _is_home(folder)]) > 1:
            names = listed([str(home.relative_to(path)) for home in homes])
            raise DataError(f"{path}: there are several Pascal VOC folders, {names}; give one of them")
        if homes:
            return VocSource(path, homes[0])
        level = [folder / name for folder in level for name in sorted(next(os.walk(folder), ("", [], []))[1])]
    return None


class VocSource:
    """A Pascal VOC folder; home: where its parts are, at or below the root."""

    def __init__(self, root: Path, home: Path):
        self.root, self._home = root, home
        self._lists = find_lists(home)
        if _has_parts(home):
            self._images, self._annotations = _part(home, _IMAGES), _part(home, _ANNOTATIONS)
            self._files = lists_of_splits(self._lists) or {"train": self._annotations}
        else:
            self._images = self._annotations = home
            self._files = _folders_of_splits(home) or {"train": home}
        self._read: dict[str, Annotation] = {}
        self.splits = tuple(split for split in self._files if split != "test" or self._is_annotated(split))
        file = next(iter(self._files.values()))
        where = str((file if len(self._files) == 1 else file.parent).relative_to(root))
        self.about = f"Pascal VOC, {'XML files beside the images' if self._images == self._annotations else where}"

    def read(self, split: str) -> Records:
        """A split by the name of its list, of which ``val`` may also be called valid, and the like."""
        for folder, what in ((self._annotations, "XML files"), (self._images, "images")):
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder; put the {what} there")
        file = self._file(split)
        members, problems = self._members(file, split)
        stems, names, more = self._with_images(members)
        problems += [problem for stem in members for problem in self._annotation(stem).problems] + more
        annotations = [self._annotation(stem) for stem in stems]
        corners = np.array([box for each in annotations for box in each.corners], np.float64).reshape(-1, 4)
        if are_shares(corners):
            what = "all lie within [0, 1] and seem to be shares of the image's sides"
            problems.append(Problem("units", f"the boxes {what}; give xmin, ymin, xmax, ymax in pixels"))
        sizes = [each.size or self._size(name) for each, name in zip(annotations, names, strict=True)]
        classes = [] if problems else [*enumerate(self._classes, 1)]
        return Records(
            name=split,
            root=self.root,
            file=file,
            folder=self._images,
            classes=classes,
            names=names,
            ids=np.arange(1, len(names) + 1),
            sizes=np.array(sizes, np.int64).reshape(-1, 2),
            objects=make_objects([], [], []) if problems else _objects(annotations, corners, self._classes),
            remarks=[*_remarks(annotations, corners), *(self._unlisted() if split == "train" else ())],
            problems=problems,
        )

    def _file(self, split: str) -> Path:
        """What a split is read from: a list, or a folder of annotations."""
        file = self._files.get(split) or self._lists.get(split)
        if file is None:
            beside = self._images == self._annotations
            tried = [self._home / (name if beside else f"ImageSets/Main/{name}.txt") for name in names_of(split)]
            found = self._lists.values() or self._files.values()
            relative = partial(os.path.relpath, start=self.root)
            raise no_split(self.root, split, map(relative, tried), map(relative, found))
        return file

    def _members(self, file: Path, split: str) -> tuple[list[str], list[Problem]]:
        """The annotations of a split, in its order, and what is wrong with its list."""
        if file not in self._lists.values():
            within = "" if file == self._annotations else f"{file.relative_to(self._annotations)}{os.sep}"
            stems = [stem for stem in self._xml if stem.startswith(within)]
            if not stems:
                raise DataError(f"{file}: there are no XML files; put them there")
            return sorted(stems, key=natural_key), []
        first, problems = {}, []
        rows = read_rows(file)
        if not rows:
            way = way_without(split, "remove the file")
            raise DataError(f"{file}: the list is empty; write the name of one image a line{way}")
        for line, row in rows:
            stem = self._stem(row)
            if stem is not None and stem not in first:
                first[stem] = line
                continue
            if stem is not None:
                what = f"image {row!r} is there already, in line {first[stem]}; take one out"
            elif leads_out(row):
                what = f"{row!r} leads out of the folder; write the name of an image in {self._images.name}"
            elif not is_plain(row):
                what = f"{row!r} has control characters; correct the line"
            else:
                missing = self._annotations / f"{row}.xml"
                what = f"image {row!r} has no file {missing}; add it (background has no objects) or take the line out"
            problems.append(Problem("list", what, f"{file}:{line}"))
        return list(first), problems

    def _with_images(self, members: Sequence[str]) -> tuple[list[str], list[str], list[Problem]]:
        """Annotations and the names of their images, without those whose image cannot be told: these are problems."""
        stem_of, problems = {}, []
        for stem in members:
            name = self._image(stem)
            if name is None:
                several = " and ".join(self._images_by_stem[stem])
                what = f"{several} are both there for it; remove one, or give the name in <filename>"
            elif name in stem_of:
                what = f"<filename> is {name!r}, as that of {stem_of[name]}.xml; correct one"
            elif not is_plain(name):
                problems.append(Problem("image file name", f"{name!r} has control characters; rename the file"))
                continue
            else:
                stem_of[name] = stem
                continue
            problems.append(Problem("image file name", what, str(self._annotations / self._xml[stem])))
        return list(stem_of.values()), list(stem_of), problems

    def _image(self, stem: str) -> str | None:
        """The image of an annotation, by its own name before <filename>, which many a tool leaves wrong."""
        own, named = self._images_by_stem.get(stem, []), self._annotation(stem).file_name
        named = os.path.join(os.path.dirname(stem), os.path.basename(named))
        if not own:
            if named in self._image_names and os.path.splitext(named)[0] not in self._xml:
                return named
            return stem + (os.path.splitext(named)[1] if is_image_name(named) else ".jpg")
        return own[0] if len(own) == 1 else named if named in own else None

    def _size(self, name: str) -> tuple[int, int]:
        """The (height, width) of an image file; none where it has none, of which the check of the files has to say."""
        path = os.path.join(self._images, name)
        with suppress(DataError):
            if os.path.isfile(path):  # to open a pipe would wait for its other end
                return upright_size(path)
        return UNKNOWN

    def _annotation(self, stem: str) -> Annotation:
        if stem not in self._read:
            self._read[stem] = read_annotation(self._annotations / self._xml[stem], self._given_classes)
        return self._read[stem]

    def _stem(self, row: str) -> str | None:
        """The annotation that a line of a list names, maybe in quotes or with the ending of the image."""
        bare = row.strip('"')
        names = (bare, os.path.splitext(bare)[0]) if is_image_name(bare) else (bare,)
        return next((name for name in names if name in self._xml), None)

    def _is_annotated(self, split: str) -> bool:
        """Whether a list has any image with annotations: competitions keep those for testing to themselves."""
        try:
            return any(self._stem(row) is not None for _, row in read_rows(self._files[split]))
        except DataError:
            return True  # and whoever reads it will hear of it

    def _unlisted(self) -> Iterator[str]:
        if self._listed and (count := len(self._xml.keys() - self._listed)):
            yield f"{count:,} annotated {'image' if count == 1 else 'images'} in no list of ImageSets left out"

    @cached_property
    def _listed(self) -> set[str]:
        """The annotations that any list has; whatever is wrong with a list is said where it is read."""
        found = set()
        for file in self._lists.values():
            with suppress(DataError):
                found.update(self._stem(row) for _, row in read_rows(file))
        return found & self._xml.keys()

    @cached_property
    def _given_classes(self) -> list[str] | None:
        file = find_class_file(self._home)
        return None if file is None else read_classes(file)

    @cached_property
    def _classes(self) -> list[str]:
        """Names in label order: those of the file of classes, or all that objects of any split have."""
        if self._given_classes is not None:
            return self._given_classes
        return sorted({name for stem in self._listed or self._xml for name in self._annotation(stem).names})

    @cached_property
    def _xml(self) -> dict[str, str]:
        """The files of annotations by their names without endings."""
        return {os.path.splitext(name)[0]: name for name in _files_in(self._annotations) if _is_xml(name)}

    @cached_property
    def _image_names(self) -> set[str]:
        return {name for name in _files_in(self._images) if is_image_name(name)}

    @cached_property
    def _images_by_stem(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in sorted(self._image_names):
            found.setdefault(os.path.splitext(name)[0], []).append(name)
        return found


def _is_home(folder: Path) -> bool:
    """Whether a folder holds the parts of a data set, or images with XML files of their names beside them."""
    return _has_parts(folder) or bool(_folders_of_splits(folder)) or _has_pairs(folder)


def _has_parts(folder: Path) -> bool:
    """Whether two of the three parts are there, or the annotations alone."""
    parts = ("JPEGImages", "Annotations", "ImageSets")
    if sum((folder / part).is_dir() for part in parts) > 1:
        return True
    return any(_is_xml(name) for part in _ANNOTATIONS for name in _files_in(folder / part))


def _is_xml(name: str) -> bool:
    return name.lower().endswith(".xml")


def _has_pairs(folder: Path) -> bool:
    names = next(os.walk(folder), ("", [], []))[2]
    stems = {os.path.splitext(name)[0] for name in filter(_is_xml, names)}
    return any(os.path.splitext(name)[0] in stems for name in names if is_image_name(name))


def _folders_of_splits(home: Path) -> dict[str, Path]:
    """The folder of each split that has one with images and XML files."""
    found = {}
    for split in NAMES:
        if folder := next((home / name for name in names_of(split) if _has_pairs(home / name)), None):
            found[split] = folder
    return found


def _part(home: Path, names: Sequence[str]) -> Path:
    """The part of a data set that has one of these names, the first where there is none."""
    return next((home / name for name in names if (home / name).is_dir()), home / names[0])


def _files_in(folder: Path) -> Iterator[str]:
    """The files in a folder and those below it, relative to it, without those that systems hide there."""
    for place, files in walk(folder):
        within = os.path.relpath(place, folder)
        for name in files:
            if not name.startswith("."):
                yield name if within == os.curdir else os.path.join(within, name)


def _objects(annotations: Sequence[Annotation], corners: np.ndarray, classes: Sequence[str]) -> Objects:
    """The objects in columns; corners [m, 4] are counted from 1, and the pixels of both belong to the box."""
    label_of = {name: label for label, name in enumerate(classes)}
    return make_objects(
        [index for index, each in enumerate(annotations) for _ in each.names],
        [label_of[name] for each in annotations for name in each.names],
        np.concatenate((corners[:, :2] - 1, corners[:, 2:] - corners[:, :2] + 1), axis=1),
        [hard for each in annotations for hard in each.difficult],
    )


def _remarks(annotations: Sequence[Annotation], corners: np.ndarray) -> Iterator[str]:
    if count := sum(map(sum, (each.difficult for each in annotations))):
        yield f"{count:,} difficult {'object' if count == 1 else 'objects'} taken as crowd regions"
    if count := int((corners[:, :2] < 1).any(axis=1).sum()):
        those = "1 box begins" if count == 1 else f"{count:,} boxes begin"
        why = "where Pascal VOC counts from: if a tool has counted from 0, all boxes lie a pixel too far up and left"
        yield f"{those} below 1, {why}"
