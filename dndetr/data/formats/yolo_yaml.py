"""YOLO's data.yaml: names, splits and where they are; every mistake with its line."""

import re
from pathlib import Path
from typing import NamedTuple

import yaml

from ..errors import DataError
from ..limits import is_plain

_KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


class Entry(NamedTuple):
    """A path of a split, as it is written, and its line."""

    path: str
    line: int


class Description(NamedTuple):
    """What a file says: the folder its paths start from, if any; class names; paths of each split; numbers behind a
    box in a row with keypoints."""

    file: Path
    path: Entry | None
    names: list[str]
    splits: dict[str, list[Entry]]
    keypoints: int | None


def read_description(file: Path) -> Description:
    """A data.yaml; DataError, with the line, for what it must not say."""
    top = _parse(file)
    if not isinstance(top, yaml.MappingNode):
        raise DataError(f"{file}: the top level must be keys such as train, val and names")
    keys = _mapping(file, top)
    splits = {}
    for split, names in _KEYS.items():
        found = [key for key in names if key in keys and not _is_nothing(keys[key])]
        if len(found) > 1:
            raise DataError(f"{_at(file, keys[found[1]])}: {found[0]} and {found[1]} are both there; leave one of them")
        if found:
            splits[split] = _entries(file, found[0], keys[found[0]])
    if not splits:
        raise DataError(f"{file}: names no train, val or test; give the folders of the images, train: images/train")
    path = keys.get("path")
    start = None if path is None or _is_nothing(path) else Entry(_text(file, "path", path), _line(path))
    return Description(file, start, _names(file, keys), splits, _keypoints(file, keys.get("kpt_shape")))


def looks_like_one(file: Path) -> bool:
    """Whether a YAML file describes a data set."""
    try:
        top = _parse(file)
    except DataError:
        return False
    keys = {key.value for key, _ in top.value} if isinstance(top, yaml.MappingNode) else set()
    return bool(keys & {"names", "nc"}) and bool(keys & {key for names in _KEYS.values() for key in names})


def _parse(file: Path) -> yaml.Node | None:
    try:
        # Texts as they are: "no" and "on" are names of classes, not of truth values.
        return yaml.compose(file.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise DataError(f"{file}{line}: not valid YAML ({error.problem})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error


def _mapping(file: Path, node: yaml.MappingNode) -> dict[str, yaml.Node]:
    keys: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise DataError(f"{_at(file, key)}: a key must be a text or a number")
        if key.value in keys:
            raise DataError(f"{_at(file, key)}: {key.value!r} is there twice; leave one of them")
        keys[key.value] = value
    return keys


def _names(file: Path, keys: dict[str, yaml.Node]) -> list[str]:
    node, count = keys.get("names"), keys.get("nc")
    number = None if count is None or _is_nothing(count) else _count(file, count)
    if node is None or _is_nothing(node):
        if number is None:
            raise DataError(f"{file}: there is no list 'names'; give the names of the classes")
        return [f"class_{label}" for label in range(number)]
    if isinstance(node, yaml.SequenceNode):
        names = [_text(file, "names", entry) for entry in node.value]
    elif isinstance(node, yaml.MappingNode):
        numbered = {}
        for key, entry in _mapping(file, node).items():
            if not re.fullmatch("0|[1-9][0-9]{0,8}", key):
                raise DataError(f"{_at(file, entry)}: names has key {key!r}; number the classes from 0")
            numbered[int(key)] = _text(file, "names", entry)
        names = [numbered[label] for label in sorted(numbered)]
        if sorted(numbered) != list(range(len(numbered))):
            lacking = next(label for label in range(len(numbered) + 1) if label not in numbered)
            raise DataError(f"{_at(file, node)}: names has no class {lacking}; number the classes from 0 without gaps")
    else:
        raise DataError(f"{_at(file, node)}: names is {node.value!r}; give a list of names")
    if number is not None and number != len(names):
        raise DataError(f"{_at(file, count)}: nc is {number}, but there are {len(names)} names; correct one of them")
    return names


def _count(file: Path, node: yaml.Node) -> int:
    text = node.value if isinstance(node, yaml.ScalarNode) else None
    if text is None or not re.fullmatch("[0-9]{1,6}", text) or int(text) == 0:
        raise DataError(f"{_at(file, node)}: nc must be the number of classes")
    return int(text)


def _keypoints(file: Path, node: yaml.Node | None) -> int | None:
    """How many numbers a row has behind its box: kpt_shape is the number of points, and of numbers for each."""
    if node is None or _is_nothing(node):
        return None
    sides = [entry.value for entry in node.value] if isinstance(node, yaml.SequenceNode) else []
    if len(sides) != 2 or not all(isinstance(side, str) and re.fullmatch("[0-9]{1,4}", side) for side in sides):
        raise DataError(f"{_at(file, node)}: kpt_shape must be two numbers, of points and of numbers for each")
    return int(sides[0]) * int(sides[1])


def _entries(file: Path, key: str, node: yaml.Node) -> list[Entry]:
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return [Entry(_text(file, key, entry), _line(entry)) for entry in nodes]


def _text(file: Path, key: str, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise DataError(f"{_at(file, node)}: {key} must be a text, or a list of texts")
    text = node.value.strip()
    if not text:
        raise DataError(f"{_at(file, node)}: {key} has an empty entry; give it a text")
    if not is_plain(text):
        raise DataError(f"{_at(file, node)}: {key} has {text!r}; take its control characters out")
    return text


def _is_nothing(node: yaml.Node) -> bool:
    if isinstance(node, yaml.ScalarNode):
        return not node.value or (node.style is None and node.value in ("~", "null"))
    return isinstance(node, yaml.SequenceNode) and not node.value


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _at(file: Path, node: yaml.Node) -> str:
    return f"{file}:{_line(node)}"
