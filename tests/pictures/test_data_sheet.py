"""Which samples of a data set are drawn, and what their captions say."""

import pytest
from splits import read_split

from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.review.findings import NOTE, WARNING, Finding, Place
from dndetr.data.transforms import Unresized
from dndetr.pictures import data_sheet
from dndetr.shapes import write_shapes


@pytest.fixture
def dataset(tmp_path):
    write_shapes(tmp_path / "set", train=30, val=1)
    return FolderDataset(read_split(tmp_path / "set", "train"), Unresized())


@pytest.fixture
def captions(monkeypatch):
    """Those of the images that are drawn, instead of a picture."""
    drawn = []
    monkeypatch.setattr(data_sheet, "draw_samples", lambda path, samples, names, title: drawn.extend(samples))
    return lambda: [caption for *_, caption in drawn]


def test_images_with_warnings_are_among_those_drawn_and_say_so(dataset, captions, tmp_path):
    whole = dataset.records
    numbers = whole.ids.tolist()
    common = Finding(WARNING, "tiny box", "train", "", [(Place(whole, at, (0,)),) for at in range(20)])
    rare = Finding(WARNING, "doubled box", "train", "", [(Place(whole, 17, (0, 1)),), (Place(whole, 3, (0, 1)),)])
    mild = Finding(NOTE, "repeated picture", "train", "", [(Place(whole, 29), Place(whole, 28))])
    dataset.leave_out([3])  # it cannot be read, and the others move up
    assert data_sheet.draw_data(tmp_path / "a.png", [dataset], [common, rare, mild], "title") == 12
    told = {caption.split(":")[0]: caption for caption in captions()}
    assert len(told) == 12 and told[f"train image {numbers[17]}"].endswith(" objects, doubled box")
    tiny = [name for name, caption in told.items() if caption.endswith(", tiny box")]
    assert len(tiny) >= 2 and set(tiny) <= {f"train image {numbers[at]}" for at in range(20)}
    assert not any("repeated" in caption for caption in told.values())


def test_without_warnings_captions_only_count(dataset, captions, tmp_path):
    assert data_sheet.draw_data(tmp_path / "a.png", [dataset], [], "title") == 12
    assert all(caption.endswith(" objects") for caption in captions())
