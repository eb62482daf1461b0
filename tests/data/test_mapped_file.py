"""Arrays in a file: what is read of them is what was written, whichever way it is read."""

import pickle

import numpy as np
import pytest

from dndetr.data import mapped_file, spool
from dndetr.data.mapped_file import ArrayWriter, Damaged, Mapped, in_use, map_arrays
from dndetr.data.spool import Spool, in_order

ARRAYS = {
    "rows": np.arange(400, dtype=np.float64).reshape(100, 4),
    "numbers": np.arange(-50, 50),
    "flags": np.arange(100) % 3 == 0,
    "nothing": np.empty((0, 4)),
    "one": np.array([7], np.int32),
}


@pytest.fixture
def path(tmp_path):
    with open(tmp_path / "a", "xb") as file:
        writer = ArrayWriter(file)
        for name, array in ARRAYS.items():
            writer.add(name, (array[at : at + 33] for at in range(0, len(array), 33)), array.dtype, array.shape[1:])
            assert np.array_equal(writer.so_far()[name], array)
        writer.finish({"said": ["ä", 1]})
    return tmp_path / "a"


@pytest.mark.parametrize("short", [0, 100, 1 << 20])
def test_what_was_written_is_read(path, monkeypatch, short):
    """Mapped, or read where a part is short."""
    monkeypatch.setattr(mapped_file, "_SHORT", short)
    arrays, words = map_arrays(path)
    assert words == {"said": ["ä", 1]} and arrays.keys() == ARRAYS.keys()
    draw = np.random.default_rng(0)
    for name, array in ARRAYS.items():
        found = arrays[name]
        assert isinstance(found, Mapped) and found.dtype == array.dtype and np.array_equal(found, array)
        places = draw.integers(-len(array) - 3, len(array) + 3, (40, 2)).tolist()
        for index in [slice(a, b) for a, b in places] + [slice(None), slice(None, None, -2), slice(1, 9, 3)]:
            assert np.array_equal(found[index], array[index]) and type(found[index]) is np.ndarray
            assert found[index].dtype == array.dtype and found[index].shape == array[index].shape
        for place in range(-len(array), len(array)):
            assert np.array_equal(found[place], array[place])
        with pytest.raises(IndexError):
            found[len(array)]
        if len(array) > 1:
            chosen = draw.integers(0, len(array), 9)
            assert np.array_equal(found[chosen], array[chosen]) and type(found[chosen]) is np.ndarray
            assert np.array_equal(found[found == array[3]], array[array == array[3]])
            assert found.max() == array.max() and type(found + 1) is np.ndarray
        assert not found.flags.writeable or not len(found)


def test_pickles_are_places(path):
    rows = map_arrays(path)[0]["rows"]
    content = pickle.dumps([rows, rows[:2], rows + 1])
    again = pickle.loads(content)
    assert all(np.array_equal(a, b) for a, b in zip(again, [rows, rows[:2], rows + 1], strict=True))
    assert len(pickle.dumps(rows)) < 300 and isinstance(again[0], Mapped)


def test_a_file_is_in_use_as_long_as_an_array_is_there(path):
    assert not in_use(path)
    arrays, _ = map_arrays(path)
    rows = arrays.pop("rows")
    del arrays
    assert in_use(path) and rows[5, 0] == 20
    del rows
    assert not in_use(path)


def test_a_writer_that_has_not_finished_left_no_such_file(path, tmp_path):
    with open(tmp_path / "b", "xb") as file:
        ArrayWriter(file).add("numbers", [np.arange(9)], np.int64)
    with pytest.raises(Damaged):
        map_arrays(tmp_path / "b")


@pytest.mark.parametrize("in_file", [False, True])
def test_a_spool_is_all_that_was_added(tmp_path, monkeypatch, in_file):
    monkeypatch.setattr(spool, "_ROWS", 3)
    column, expected = Spool(float, (2,), tmp_path if in_file else None), np.empty((0, 2))
    assert column.array().shape == (0, 2)
    for count in (4, 0, 1, 5):
        block = np.random.default_rng(count).random((count, 2))
        column.add(block)
        expected = np.concatenate((expected, block))
        assert np.array_equal(column.array(), expected) and column.array().dtype == np.float64
    assert not [*tmp_path.iterdir()]
    for order in (None, np.random.default_rng(0).permutation(10)):
        blocks = list(in_order(column.array(), order))
        assert len(blocks) == 4 and np.array_equal(
            np.concatenate(blocks), expected if order is None else expected[order]
        )
