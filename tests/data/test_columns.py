"""Columns that look like lists and are none."""

import pickle

import numpy as np
import pytest

from dndetr.data import columns
from dndetr.data.columns import Column, Names

TEXTS = ["a.jpg", "", "täßt/画像.png", "\ud800 alone", "caf\udce9.jpg", "a\x00b", "\U0001f600" * 3]


@pytest.mark.parametrize("texts", [[], [""], TEXTS, TEXTS * 40])
def test_names_are_the_texts(texts, monkeypatch):
    monkeypatch.setattr(columns, "_BLOCK", 3)
    names = Names.of(texts)
    assert list(names) == texts and names == texts and len(names) == len(texts)
    assert [names[place] for place in range(len(texts))] == texts
    assert names[-2:] == texts[-2:] and names[::-1] == texts[::-1] and names[1:4] == texts[1:4]
    assert pickle.loads(pickle.dumps(names)) == texts == Names.of(names)
    with pytest.raises(IndexError):
        names[len(texts)]


def test_names_differ_from_others():
    names = Names.of(["a", "b"])
    assert names != ["a"] and names != ["a", "c"] and names != "ab" and names != Names.of(["b", "a"])
    assert "b" in names and "c" not in names and names.index("b") == 1 and names[-1] == "b"


@pytest.mark.parametrize(("values", "same"), [(np.arange(7), [*range(7)]), (np.arange(14).reshape(7, 2), None)])
def test_columns_give_plain_values(values, same, monkeypatch):
    monkeypatch.setattr(columns, "_BLOCK", 2)
    column, same = Column(values), same or [(2 * n, 2 * n + 1) for n in range(7)]
    assert column == same and list(column) == same and column[2] == same[2] and column[-1] == same[-1]
    assert column[1:5] == same[1:5] and isinstance(column[1:5], Column) and column != same[:-1]
    kind = type(same[0])
    assert all(type(value) is kind for value in column) and type(column[3]) is kind
    assert np.array_equal(np.asarray(column), values) and np.asarray(column, np.float32).dtype == np.float32
    assert pickle.loads(pickle.dumps(column)) == column and max(column) == same[-1]
    with pytest.raises(IndexError):
        column[7]
