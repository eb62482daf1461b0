"""Pascal VOC's XML: what is read of an annotation file, and everything that can be wrong with one."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element
from xml.parsers import expat

from ..limits import FARTHEST, LONGEST_SIDE, is_plain, too_many_pixels
from ..records import Problem

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Annotation(NamedTuple):
    """What a file says of its image; what cannot be used is among the problems instead.

    file_name: the image's, "" where it is not said; size: (height, width), None where it is not said. Of each object
    its class, its corners xmin, ymin, xmax, ymax as they are written, and whether it is difficult.
    """

    file_name: str = ""
    size: tuple[int, int] | None = None
    names: Sequence[str] = ()
    corners: Sequence[Sequence[float]] = ()
    difficult: Sequence[bool] = ()
    problems: Sequence[Problem] = ()


class _Wrong(Exception):
    """Something is wrong at an element: a kind, and what to say of it."""

    def __init__(self, element: Element, kind: str, message: str):
        super().__init__(message)
        self.element, self.kind, self.message = element, kind, message


def read_annotation(path: Path, classes: Collection[str] | None = None) -> Annotation:
    """Reads an annotation file; classes: the names that objects may have, by default any."""
    if not path.is_file():  # to open a pipe would wait for its other end
        return _unusable("is no file; put the annotations there", path)
    try:
        content = path.read_bytes()
        root = ElementTree.fromstring(content)
    except OSError as error:
        return _unusable(f"cannot be read ({error.strerror or error}); replace it", path)
    except ElementTree.ParseError as error:
        line, column = error.position
        said = f"not valid XML ({expat.ErrorString(error.code)}, column {column + 1})"
        return _unusable(f"{said}; is the file complete, and in UTF-8?", path, line)
    except (LookupError, ValueError) as error:
        return _unusable(f"not XML that can be read ({error}); save it in UTF-8", path)
    if root.tag != "annotation":
        return _unusable(f"begins with <{root.tag[:80]}>, not <annotation>; is this a file of Pascal VOC?", path)
    wrong, size, objects = [], None, []
    try:
        size = _size(root)
    except _Wrong as error:
        wrong.append(error)
    for number, element in enumerate(root.iterfind("object"), 1):
        try:
            objects.append(_object(element, number, classes))
        except _Wrong as error:
            wrong.append(error)
    file_name = (root.findtext("filename") or "").strip().replace("\\", "/")  # some write a path of Windows
    names, corners, difficult = zip(*objects, strict=True) if objects else ((), (), ())
    return Annotation(file_name, size, names, corners, difficult, _with_lines(wrong, root, content, path))


def _unusable(message: str, path: Path, line: int | None = None) -> Annotation:
    return Annotation(problems=[Problem("XML", message, str(path) if line is None else f"{path}:{line}")])


def _with_lines(wrong: Sequence[_Wrong], root: Element, content: bytes, path: Path) -> list[Problem]:
    """The problems of a file with the lines of their elements, which the fast parser does not know."""
    if not wrong:
        return []
    lines, parser = [], expat.ParserCreate()
    parser.StartElementHandler = lambda *_: lines.append(parser.CurrentLineNumber)
    parser.Parse(content, True)
    line_of = dict(zip(root.iter(), lines, strict=True))
    return [Problem(each.kind, each.message, f"{path}:{line_of[each.element]}") for each in wrong]


def _size(root: Element) -> tuple[int, int] | None:
    """The image's (height, width); None where one of them is absent, empty or 0, as some tools write it."""
    sides = []
    for tag in ("height", "width"):
        text = (root.findtext(f"size/{tag}") or "").strip()
        side = _number(text or "0")
        if side == 0:
            return None
        if side is None or not 0 < side <= LONGEST_SIDE or side % 1:
            what = f"<size> has {tag} {_short(text)}; give the file's {tag} in whole pixels, at most {LONGEST_SIDE:,}"
            raise _Wrong(root.find(f"size/{tag}"), "image size", what)
        sides.append(int(side))
    if what := too_many_pixels(*sides):
        raise _Wrong(root.find("size"), "image size", f"the image {what}")
    return sides[0], sides[1]


def _object(element: Element, number: int, classes: Collection[str] | None) -> tuple[str, list[float], bool]:
    """An object's class, corners, and whether it is difficult."""
    name = (element.findtext("name") or "").strip()
    if not name:
        raise _Wrong(element, "class name", f"object {number} has no name; give it that of its class")
    called = f"object {number} ({_short(name)})"
    if not is_plain(name):
        raise _Wrong(element.find("name"), "class name", f"the name of {called} has control characters; take them out")
    if classes is not None and name not in classes:
        what = f"the name of {called} is not in the list of classes; add it there or correct it"
        raise _Wrong(element.find("name"), "class name", what)
    return name, _box(element, called), _is_difficult(element, called)


def _box(element: Element, called: str) -> list[float]:
    """The corners of an object's box, or of the box around its polygon where that is all it has."""
    for tag in ("bndbox", *(f"bndbox/{corner}" for corner in _CORNERS)):
        if len(found := element.findall(tag)) > 1:
            raise _Wrong(found[1], "box", f"{called} has two <{found[1].tag}>; leave one of them")
    box = element.find("bndbox")
    if box is None:
        return _around_polygon(element, called)
    corners = [_coordinate(box, tag, box.findtext(tag), called) for tag in _CORNERS]
    if corners[2] < corners[0] or corners[3] < corners[1]:
        what = "has xmax below xmin" if corners[2] < corners[0] else "has ymax below ymin"
        raise _Wrong(box, "box", f"{called} {what}; correct or remove it")
    return corners


def _around_polygon(element: Element, called: str) -> list[float]:
    polygon = element.find("polygon")
    if polygon is None:
        if element.find("robndbox") is not None:
            what = f"{called} has a rotated box, which is not read; give it an upright <bndbox>"
            raise _Wrong(element.find("robndbox"), "rotated box", what)
        raise _Wrong(element, "box", f"{called} has no <bndbox>; draw or remove it")
    # Its points are <pt><x>, <y> in some programs' files and <x1>, <y1>, <x2>, ... in others'.
    sides = [
        [_coordinate(each, each.tag, each.text, called) for each in polygon.iter() if re.fullmatch(tag, each.tag)]
        for tag in (r"x\d*", r"y\d*")
    ]
    if not all(sides) or len(sides[0]) != len(sides[1]):
        lacks = "without points" if not any(sides) else "of points that lack an x or a y"
        raise _Wrong(polygon, "box", f"{called} has a polygon {lacks}; draw or remove it")
    return [min(sides[0]), min(sides[1]), max(sides[0]), max(sides[1])]


def _coordinate(element: Element, tag: str, text: str | None, called: str) -> float:
    value = _number(text)
    if value is None:
        said = f"has no {tag}" if text is None else f"has {tag} {_short(text.strip())}, which is no number"
    elif not -FARTHEST < value < FARTHEST:
        said = f"has {tag} {_short(text.strip())}, which is not finite, or beyond any image"
    else:
        return value
    raise _Wrong(element, "box", f"{called} {said}; correct or remove it")


def _is_difficult(element: Element, called: str) -> bool:
    text = (element.findtext("difficult") or "").strip()
    if text not in ("", "0", "1"):
        what = f"{called} has difficult {_short(text)}; give 0 or 1"
        raise _Wrong(element.find("difficult"), "difficult", what)
    return text == "1"


def _number(text: str | None) -> float | None:
    if text is None or "_" in text or not text.isascii():  # Python reads 1_0, and the digits of all scripts
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _short(text: str) -> str:
    said = repr(text)
    return said if len(said) <= 80 else f"{said[:77]}..."
