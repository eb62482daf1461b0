"""What classes are called where names alone do not tell them apart."""

import pytest

from dndetr.data.classes import distinct_names


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ([(1, "cat"), (2, "Cat"), (9, " [red]$x$ 100% _y")], ["cat", "Cat", " [red]$x$ 100% _y"]),
        ([(1, "person"), (2, "dog"), (3, "person")], ["person (id 1)", "dog", "person (id 3)"]),
        ([(0, ""), (4, "  ")], ["(id 0)", "(id 4)"]),
        ([(1, "cat"), (2, "cat ")], ["cat (id 1)", "cat (id 2)"]),
        ([(1, "\u00e9"), (2, "e\u0301")], ["\u00e9 (id 1)", "\u00e9 (id 2)"]),
        ([(1, "a"), (2, "a"), (3, "a (id 1)")], ["a (id 1)", "a (id 2)", "a (id 1) (id 3)"]),
    ],
    ids=["their own", "repeated", "empty", "a space", "composed", "like one with its id"],
)
def test_every_class_has_a_name_of_its_own(classes, names):
    assert distinct_names(classes) == names and len(set(names)) == len(names)
