"""A file that is missing under the annotations' name, though it is visibly there under another."""

import json
import unicodedata

import pytest
from PIL import Image
from splits import read_split

from dndetr.data.errors import DataError
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.review.image_files import file_problems
from dndetr.data.transforms import Unresized

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9.png") for form in ("NFC", "NFD"))
MEANT = {
    "case": ("img_1.png", "IMG_1.PNG"),
    "extension": ("a.png", "a.jpeg"),
    "no-extension": ("a", "a.png"),
    "backslashes": ("one\\a.png", "one/a.png"),
    "another-system": ("C:\\data\\a.png", "a.png"),
    "quoted": ("two%20words.png", "two words.png"),
    "unquoted": ("two words.png", "two%20words.png"),
    "composed": (COMPOSED, DECOMPOSED),
    "decomposed": (DECOMPOSED, COMPOSED),
    "too-many-folders": ("images/train/a.png", "a.png"),
    "too-few-folders": ("a.png", "one/a.png"),
    "several": ("ONE\\two%20words.png", "one/Two Words.JPG"),
}


@pytest.fixture
def asked_for(make_document, make_folder):
    """``asked_for(name, present)``: a split whose first image names a file, and holds others instead."""

    def make(name, *present):
        content = make_document()
        root = make_folder(content)
        (root / "train" / "0.png").unlink()
        for other in present:
            (root / "train" / other).parent.mkdir(exist_ok=True)
            Image.new("RGB", (60, 40)).save(root / "train" / other, format="PNG")
        content["images"][0]["file_name"] = name
        document = root / "annotations" / "instances_train.json"
        document.write_text(json.dumps(content))
        return read_split(root, "train")

    return make


@pytest.mark.parametrize(("name", "present"), MEANT.values(), ids=MEANT)
def test_the_nearest_name_on_disk_is_given(asked_for, name, present):
    split = asked_for(name, present)
    (problem,) = file_problems(split)
    form = " (in another Unicode normal form)" if name in (COMPOSED, DECOMPOSED) else ""
    assert (
        f"{name} is missing, but there is {present!r}{form}; correct file_name, rename the file or" in problem.message
    )


def test_the_closest_of_several_is_given(asked_for):
    split = asked_for("one/a.png", "two/a.png", "one/a.JPG", "one/A.png", "a.png")
    assert "but there is 'one/A.png';" in file_problems(split)[0].message


@pytest.mark.parametrize(("name", "present"), [("0001.png", "0002.png"), ("scan.001", "scan.002"), ("a.png", "ab.png")])
def test_another_image_is_not_taken_for_it(asked_for, name, present):
    split = asked_for(name, present)
    assert f"{name} is missing; put it there or remove" in file_problems(split)[0].message


def test_training_says_the_same(asked_for):
    split = asked_for("A.PNG", "a.png")
    with pytest.raises(DataError, match=r"image 11: .*A.PNG is missing, but there is 'a.png'; correct file_name"):
        FolderDataset(split, Unresized())


def test_a_link_that_leads_nowhere_is_called_that(asked_for):
    split = asked_for("link.png")
    (split.folder / "link.png").symlink_to(split.folder / "gone.png")
    assert "link.png is missing: the link leads nowhere; mend it or remove" in file_problems(split)[0].message
