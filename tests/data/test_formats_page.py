"""The page's example of a format of one's own: it is read, and what is wrong is told, like any other."""

import re
import types
from dataclasses import replace

import pytest
from PIL import Image

from dndetr.data import source
from dndetr.data.errors import DataError
from dndetr.data.training import TrainingData
from dndetr.presets import preset_named


@pytest.fixture
def data(root, tmp_path, monkeypatch):
    """A set in the format that the page adds, of two training images and one for validation."""
    page = (root / "docs" / "formats.md").read_text()
    module = types.ModuleType("boxes_csv")
    exec(re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)[0], module.__dict__)
    monkeypatch.setattr(source, "FORMATS", (module, *source.FORMATS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    for name in "abc":
        Image.new("RGB", (64, 48)).save(folder / "images" / f"{name}.png")
    (folder / "classes.txt").write_text("dog\ncat\n")
    (folder / "train.csv").write_text("a.png,dog,1,2,30,20\nb.png,cat,4,5,6,7.5\na.png,cat,3,3,9,9\n")
    (folder / "val.csv").write_text("c.png,cat,4,5,6,7.5\n")
    return folder


def test_it_is_read(data):
    records = source.open_source(data).read("train")
    assert records.classes == [(1, "dog"), (2, "cat")] and records.names == ["a.png", "b.png"]
    assert records.objects.image.tolist() == [0, 0, 1] and records.objects.label.tolist() == [0, 1, 1]
    assert records.objects.boxes.tolist() == [[1, 2, 30, 20], [3, 3, 9, 9], [4, 5, 6, 7.5]]
    training = TrainingData(replace(preset_named("small"), data=str(data), batch_size=2))
    assert any("CSV of boxes" in line for line in training.about) and training.images == {"train": 2, "val": 1}


@pytest.mark.parametrize(
    "row",
    ["b.png,wolf,1,2,3,4", "b.png,cat,1,2,3", "b.png,cat,1,2,3,nan", "b.png,cat,1,2,-3,4", "b.png,cat,x,2,3,4", ""],
)
def test_what_is_wrong_is_told(data, row):
    (data / "train.csv").write_text(f"a.png,dog,1,2,30,20\n{row}\n")
    with pytest.raises(DataError, match=r"train.csv:2: \[.* is not image,class,x,y,width,height; correct or remove it"):
        TrainingData(replace(preset_named("small"), data=str(data), batch_size=2))


def test_a_split_that_is_not_there_is_told(data):
    (data / "val.csv").unlink()
    with pytest.raises(DataError, match=r"no 'val' split; looked for val.csv; there is train.csv; .*--val-share"):
        TrainingData(replace(preset_named("small"), data=str(data), batch_size=2))
