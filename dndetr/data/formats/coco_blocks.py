"""COCO's JSON, whatever its size: its lists in blocks of some megabytes, of which no more than one is in memory.

The lists are found first, as pieces of the mapped file. A block is then what lies between two boundaries of entries. A
cut that looks like one, ``},``, may lie within a text or a nested list; but then what is cut off does not decode, and
another cut is tried. Entries decode into small typed objects, or, where one has not the types that it should have, all
of their block into dictionaries, with what Python's own decoder accepts: NaN, 3.0 as an id, halves of surrogates.
"""

import codecs
import contextlib
import itertools
import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..errors import DataError

BLOCK = 4 << 20
"""Bytes of a block."""
_EXPLAINED = 1 << 28  # bytes of a broken file up to which Python's decoder is asked where it is broken
_LONGEST = 1 << 28  # bytes of an entry
_BLANK = 1 << 16  # bytes up to which a list may hold nothing but blanks
_TRIED = 4  # cuts that look like boundaries
_PYTHON, _BLANKS = json.JSONDecoder(), re.compile(r"\s*")
_NEAR_THE_END = 1 << 16  # of a block, where its boundary is looked for first
# What Python accepts and the JSON standard does not, and the same number of bytes that it does.
_LENIENT = re.compile(rb"-?Infinity|NaN|\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_LISTS = ("images", "annotations", "categories")
_NEEDED = {"images": "", "categories": "; add the classes"}  # the lists that may not be empty, and what to do
# Numbers that some tools write as 3.0.
_WHOLE = {
    "images": ("id", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "iscrowd"),
    "categories": ("id",),
}


class ImageEntry(msgspec.Struct, gc=False):
    """What is read of an image; a field that is added here is read, and checked for its type, with the others."""

    id: int
    height: int
    width: int
    file_name: str | None = None
    coco_url: str | None = None
    neg_category_ids: list[int] | None = None
    not_exhaustive_category_ids: list[int] | None = None


class ObjectEntry(msgspec.Struct, gc=False):
    """What is read of an annotation."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int | bool | None = None
    area: float | None = None


_TYPES = {"images": ImageEntry, "annotations": ObjectEntry}


class Block:
    """Entries of a list one after the other: ``typed``, where all have the types that they should have."""

    def __init__(self, key: str, text: bytes | None, typed: list | None, entries: list | None = None):
        self._key, self._text, self._entries, self.typed = key, text, entries, typed

    def entries(self) -> list[dict]:
        """The same as dictionaries, in full; whole numbers that are written as 3.0 are integers."""
        if self._entries is None:
            self._entries = json.loads(self._text)
        for entry in self._entries:
            for field in _WHOLE[self._key]:
                value = entry.get(field)
                if isinstance(value, float) and value.is_integer():
                    entry[field] = int(value)
        return self._entries


class Document:
    """An annotation file whose top level has the three lists images, annotations and categories.

    block: bytes read at a time. DataError, here or on the way, where it is no such file.
    """

    def __init__(self, path: Path, block: int = BLOCK):
        self.path, self._block = path, block
        self._content, self._places = _open(path)
        for key in _LISTS:
            place = self._places.get(key)
            if place is None or self._content[place.start : place.start + 1] != b"[":
                raise DataError(f"{path}: there is no list {key!r}; is this a COCO annotation file of boxes?")

    def blocks(self, key: str) -> Iterator[Block]:
        """Blocks of the list ``images``, ``annotations`` or ``categories``."""
        place, size = self._places[key], self._block
        at, stop = place.start + 1, place.stop - 1
        if stop - at <= _BLANK and not self._content[at:stop].strip():
            if key in _NEEDED:
                raise DataError(f"{self.path}: the list of {key} is empty{_NEEDED[key]}")
            return
        while at < stop:
            whole = stop - at <= size
            cuts = [stop] if whole else itertools.islice(self._cuts(key, at, at + size), _TRIED)
            cut, block = next(((cut, found) for cut in cuts if (found := self._decode(key, at, cut))), (0, None))
            if block is None and not whole:
                cut, block = self._one_by_one(key, at, at + size)
            if block is None and (whole or size > _LONGEST):
                raise _no_json(self.path)
            if block is None:  # an entry longer than a block
                size *= 2
                continue
            yield block
            size = self._block
            at = stop if cut == stop else self._content.find(b",", cut) + 1

    def _cuts(self, key: str, at: int, end: int) -> Iterator[int]:
        """Where the block that begins at ``at`` may end before ``end``, the likeliest first."""
        start = self._places[key].start
        first = re.compile(rb'\[\s*\{\s*("(?:[^"\\]|\\.)*")').match(self._content, start)
        boundaries = [rb"\}(?=\s*,)"]
        if first:  # entries mostly begin with the same field
            boundaries.insert(0, rb"\}(?=\s*,\s*\{\s*" + re.escape(first[1]) + rb"\s*:)")
        for boundary, near in itertools.product(map(re.compile, boundaries), (True, False)):
            since = max(at, end - _NEAR_THE_END) if near else at
            found = [match.end() for match in boundary.finditer(self._content, since, end)]
            yield from reversed(found)

    def _one_by_one(self, key: str, at: int, end: int) -> tuple[int, Block | None]:
        """Where the last whole entry before ``end`` ends, and the block up to there: slower, whatever entries hold.

        None where there is none, or no comma behind it, as in a list that is about to end.
        """
        try:
            text = codecs.getincrementaldecoder("utf-8")().decode(self._content[at:end])
        except UnicodeDecodeError as error:
            raise _no_json(self.path, error) from error
        place = last = 0
        with contextlib.suppress(ValueError, RecursionError):  # of what is cut off
            while True:
                _, place = _PYTHON.raw_decode(text, _BLANKS.match(text, place).end())
                place = _BLANKS.match(text, place).end()
                if text[place : place + 1] != ",":
                    break
                last, place = place, place + 1
        cut = at + len(text[:last].encode())
        return (cut, self._decode(key, at, cut)) if last else (0, None)

    def _decode(self, key: str, at: int, cut: int) -> Block | None:
        """The block between two places of the file; None where that is no list of entries."""
        text = b"[" + self._content[at:cut] + b"]"
        if not text.isascii():
            self._demand_utf8(text)  # msgspec passes over what it does not read
        try:
            if key in _TYPES:
                return Block(key, text, _DECODERS[key].decode(text))
        except (msgspec.DecodeError, RecursionError):
            pass
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{self.path}: every entry of {key!r} must be an object")
        return Block(key, text, None, entries)

    def _demand_utf8(self, text: bytes) -> None:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise _no_json(self.path, error) from error


_DECODERS = {key: msgspec.json.Decoder(list[kind]) for key, kind in _TYPES.items()}


def _open(path: Path) -> tuple[mmap.mmap, dict[str, slice]]:
    """A file's content, and where in it the values of its top level are, by their names."""
    with open(path, "rb") as file:
        if not file.seek(0, 2):
            raise _no_json(path)
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin = 3 if content[:3] == b"\xef\xbb\xbf" else 0  # some tools begin with a byte order mark
        try:
            return content, _places(content, begin)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass
        # A copy of those pages alone that have something to replace, for which the standard decoder finds its way.
        plain = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for match in _LENIENT.finditer(plain):
        plain[match.start() : match.end()] = _standard(match[0])
    try:
        return content, _places(plain, begin)
    except msgspec.ValidationError:
        raise DataError(f"{path}: the top level must be an object with images, annotations and categories") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _no_json(path, error) from error


def _standard(text: bytes) -> bytes:
    """As many bytes that are JSON to all, in the place of those that are not."""
    if text[:1] == b"\\":
        return rb"\u0020"
    sign = b"-" if text[:1] == b"-" else b""
    return sign + b"0." + b"0" * (len(text) - len(sign) - 2)


def _places(content: mmap.mmap, begin: int) -> dict[str, slice]:
    view = memoryview(content)
    found = msgspec.json.decode(view[begin:], type=dict[str, msgspec.Raw])
    origin = _address(view)
    places = {}
    for key in _LISTS:
        if key in found:
            value = memoryview(found[key])
            start = _address(value) - origin
            places[key] = slice(start, start + len(value))
    return places


def _address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


def _no_json(path: Path, error: Any = "a number that is none") -> DataError:
    """The error of a file that is not JSON: in Python's words, with the line, where that does not take too long."""
    if path.stat().st_size <= _EXPLAINED:
        try:
            json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as found:
            error = found
    return DataError(f"{path}: not valid JSON ({error}); is the file complete?")
