"""What LVIS states of its images, and where these were found, in an index."""

import numpy as np
import pytest
from lvis_folders import write_lvis
from splits import read_split

from dndetr.data.columns import Names
from dndetr.data.formats import coco
from dndetr.data.mapped_file import Mapped


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where indexes are, which files of any size have."""
    monkeypatch.setattr(coco, "SMALLEST", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dndetr" / "index"


def test_what_was_looked_for_is_in_it(tmp_path, folder, monkeypatch):
    root = write_lvis(tmp_path / "lvis", 6)
    records, again = (read_split(root, "train") for _ in range(2))
    assert isinstance(again.names, Names) and isinstance(again.verified.stated, Mapped)
    monkeypatch.setattr(coco, "SMALLEST", 1 << 40)
    expected = read_split(root, "train")
    for found in (records, again):
        assert found.names == expected.names and found.verified.stated.any()
        assert found.coco_dict() == expected.coco_dict()
        part, wanted = (each.take([1, 3, 4]).verified for each in (found, expected))
        assert np.array_equal(part.stated, wanted.stated)
        for given, other in ((part.absent, wanted.absent), (part.partial, wanted.partial)):
            assert all(map(np.array_equal, given, other))


def test_images_that_are_found_elsewhere_later_make_it_anew(tmp_path, folder):
    """Names of published sets are what was found on the disk, so an index holds as long as the folders do."""
    root = write_lvis(tmp_path / "lvis", 6)
    before = list(read_split(root, "train").names)
    assert sum(name.startswith("train2017/") for name in before) == 5
    (made,) = folder.glob("*.arrays")
    assert list(read_split(root, "train").names) == before and [*folder.glob("*.arrays")] == [made]
    (root / "images").mkdir()
    (root / "train2017").rename(root / "images" / "train2017")
    moved = [f"images/{name}" if name.startswith("train") else name for name in before]
    assert list(read_split(root, "train").names) == moved
