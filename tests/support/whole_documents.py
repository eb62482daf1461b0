"""COCO documents that are in memory as dictionaries, read by the rules of files."""

from collections.abc import Iterable

from dndetr.data.formats.coco_blocks import Block
from dndetr.data.formats.coco_document import Gathered
from dndetr.data.records import Problem


class Whole:
    """A document that is in memory as a dictionary."""

    def __init__(self, document: dict):
        self._document = document

    def blocks(self, key: str) -> Iterable[Block]:
        return [Block(key, None, None, self._document[key])]


def find_problems(document: dict) -> list[Problem]:
    """What is wrong with the entries of a document, in file order: ids, sizes, references and boxes."""
    return Gathered(Whole(document)).problems
