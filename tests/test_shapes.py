"""``python -m dndetr.shapes DIR``."""

import numpy as np
import pytest
import torch
from splits import read_split

from dndetr import shapes
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.shapes import ShapesDataset
from dndetr.data.transforms import Unresized


def test_the_folder_is_the_data(tmp_path, capsys):
    target = tmp_path / "deep" / "shapes"
    assert shapes.main([str(target), "--train", "5", "--val", "3"]) == 0
    assert "5 training and 3 validation images" in capsys.readouterr().out
    assert sorted(p.name for p in target.parent.iterdir()) == ["shapes"]
    for split, length in (("train", 5), ("val", 3)):
        written, built_in = FolderDataset(read_split(target, split), Unresized()), ShapesDataset(split, length)
        assert written.classes == built_in.classes and len(written) == length
        made, truth = written.records.coco_dict(), built_in.coco_dict()
        assert made["images"] == truth["images"] and made["annotations"] == truth["annotations"]
        for index in range(length):
            a, b = written[index], built_in[index]
            assert np.array_equal(a.pixels, b.pixels) and torch.equal(a.colours, b.colours)
            assert torch.equal(a.boxes_xyxy, b.boxes_xyxy) and torch.equal(a.labels, b.labels)
            assert a.image_id == b.image_id


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "precious").write_text("x")
    assert shapes.main([str(tmp_path), "--train", "2", "--val", "2"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "not empty" in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("flags", "message"), [(["--size", "64"], "at least 128"), (["--val", "0"], "--val 0: at least one")]
)
def test_impossible_wishes_are_refused(tmp_path, capsys, flags, message):
    assert shapes.main([str(tmp_path / "new"), *flags]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_an_interrupted_run(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(shapes, "render", fail)
    assert shapes.main([str(tmp_path / "new"), "--train", "2", "--val", "2"]) == 1
    assert capsys.readouterr().err == f"error: cannot write {tmp_path / 'new'}: disk full\n"
    assert list(tmp_path.iterdir()) == []


def test_size_and_seed_reach_the_pictures(tmp_path):
    assert shapes.main([str(tmp_path / "a"), "--train", "1", "--val", "1", "--size", "160", "--seed", "4"]) == 0
    picture = np.asarray(FolderDataset(read_split(tmp_path / "a", "val"), Unresized()).picture(0))
    wanted, _, _ = shapes.render("val", 0, 160, 4)
    assert (picture == wanted.transpose(1, 2, 0)).all()
