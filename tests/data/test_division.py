"""A validation split for data without one: classes on both sides, the share kept, the same images every time."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dndetr.data.division import Divided
from dndetr.data.errors import DataError
from dndetr.data.records import Records, make_objects
from dndetr.data.source import open_source
from dndetr.data.stratified import divide


def records_of(image, label, names, classes: int, crowd=None) -> Records:
    """Records of these objects, with boxes that do not matter."""
    count = len(names)
    return Records(
        name="train",
        root=Path("set"),
        file=Path("set/train.json"),
        folder=Path("set/train"),
        classes=[(number, f"class {number}") for number in range(classes)],
        names=list(names),
        ids=np.arange(count),
        sizes=np.full((count, 2), 100),
        objects=make_objects(image, label, np.ones((len(image), 4)), crowd),
    )


def with_classes(sets, classes: int, crowd=None) -> Records:
    """Records of images that have these classes."""
    pairs = [(image, label) for image, labels in enumerate(sets) for label in sorted(labels)]
    image, label = zip(*pairs, strict=True) if pairs else ((), ())
    return records_of(image, label, [f"{number}.jpg" for number in range(len(sets))], classes, crowd)


def lost(sets, val) -> int:
    """Classes of several images that are on one side alone."""
    found = set().union(*sets)
    sides = {label: [side for labels, side in zip(sets, val, strict=True) if label in labels] for label in found}
    return sum(len(side) > 1 and len(set(side)) == 1 for side in sides.values())


class Given:
    """A source of these records."""

    def __init__(self, records: Records, splits=("train",)):
        self.root, self.about, self.splits, self._records = Path("set"), "given", splits, records

    def read(self, split: str) -> Records:
        if split != "train":
            raise DataError(f"no {split}")
        return self._records


SETS = st.lists(st.sets(st.integers(0, 5)), min_size=2, max_size=8)
SHARES = st.sampled_from([0.001, 0.1, 0.2, 0.5, 0.8, 0.999])


def fewest_lost(sets) -> int:
    """By all divisions that leave an image on each side."""
    return min(lost(sets, val) for val in itertools.product((False, True), repeat=len(sets)) if len(set(val)) == 2)


@settings(max_examples=50, deadline=None)
@given(SETS, SHARES)
def test_no_division_has_more_classes_on_both_sides(sets, share):
    val = divide(with_classes(sets, 6), share)
    assert lost(sets, val) == fewest_lost(sets)
    assert 0 < val.sum() < len(sets)


@pytest.mark.parametrize(
    ("images", "fewest"),
    [
        # Found by those that stopped at the first class, or went to and fro between the same images.
        ("bfgklmqrsu acdfimopq acehjkmnp bhjlpsu abcehijlrst dfghkmnost", 2),
        ("beh dh abg j fgi ach g adehj cfi df ", 0),
        ("befhjlmnruw bckoqrst acfgst cfmo agoprsv acimtw bdefjl dehijqtw hknv eopu", 1),
    ],
)
def test_what_is_hard_to_divide(images, fewest):
    sets = [{ord(letter) - ord("a") for letter in image} for image in images.split(" ")]
    found = lost(sets, divide(with_classes(sets, 26), 0.2))
    assert found == fewest_lost(sets) == fewest


def test_a_class_that_cannot_be_on_both_sides_keeps_no_other_from_it():
    triangle = [{0, 2}, {0, 1}, {1, 2}]  # of whose classes one is on one side
    path = [{3, 4}, {3, 5}, {4, 6}, {5, 7}, {6, 7}]  # the sides of a ring of odd length: one more
    sets = [*triangle, *path, *({8, 9} for _ in range(2))]
    assert lost(sets, divide(with_classes(sets, 10), 0.2)) == 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sets(st.integers(0, 3)), min_size=2, max_size=8), SHARES, st.randoms(use_true_random=False))
def test_neither_the_order_of_images_nor_that_of_classes_matters(sets, share, random):
    images, classes = list(range(len(sets))), list(range(4))
    val = divide(with_classes(sets, 4), share)
    random.shuffle(images)
    random.shuffle(classes)
    pairs = [(place, classes[label]) for place, image in enumerate(images) for label in sets[image]]
    random.shuffle(pairs)
    image, label = zip(*pairs, strict=True) if pairs else ((), ())
    moved = records_of(image, label, [f"folder/{index}.jpg" for index in images], 4)
    assert divide(moved, share).tolist() == val[images].tolist()


@given(st.integers(2, 60), st.floats(0.001, 0.999))
def test_the_share_is_kept_where_classes_let_it(count, share):
    wanted = min(max(1, round(share * count)), count - 1)
    for sets in ([set()] * count, [{0}] * count, [{number} for number in range(count)]):
        assert divide(with_classes(sets, count), share).sum() == wanted


def test_each_class_has_its_share_and_so_have_images_without_objects():
    rng = np.random.default_rng(0)
    sets = [{int(label) for label in rng.geometric(0.3, rng.integers(0, 4)) if label < 12} for _ in range(2000)]
    val = divide(with_classes(sets, 12), 0.2)
    assert val.sum() == 400
    for images in ([label in labels for labels in sets] for label in range(1, 12)):
        assert abs(val[images].mean() - 0.2) <= 0.01 + 1 / sum(images)
    assert abs(val[[not labels for labels in sets]].mean() - 0.2) < 0.01


def test_a_class_of_one_image_is_learned():
    sets = [{0}] * 20 + [{number} for number in range(1, 21)]
    val = divide(with_classes(sets, 21), 0.2)
    assert (val[:20].sum(), val[20:].sum()) == (8, 0)


def test_crowd_regions_do_not_make_a_class_known():
    sets, crowd = [{0}, {0}, {0}, {0, 1}, {1}], [False] * 4 + [True, True]
    assert (
        divide(with_classes(sets, 2, crowd), 0.4).tolist() == divide(with_classes([{0}] * 4 + [set()], 2), 0.4).tolist()
    )


def test_images_of_one_file_stay_together():
    names = ["a.jpg", "b.jpg"] * 20 + ["c.jpg"]
    val = divide(records_of(range(41), [0] * 41, names, 1), 0.4)
    assert val.sum() in (1, 20) and len({(name, side) for name, side in zip(names, val, strict=True)}) == 3


def test_one_image_cannot_be_divided():
    with pytest.raises(DataError, match=r"set/train.json: one image cannot be divided; add others, or a val split"):
        divide(with_classes([{0}], 1), 0.2)


@pytest.mark.parametrize("classes", [80, 1000])
def test_a_set_as_large_as_coco_takes_seconds(classes):
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, classes + 1) ** 1.5
    label = rng.choice(classes, 1_000_000, p=weights / weights.sum())
    image = np.sort(rng.integers(0, 120_000, len(label)))
    records = records_of(image, label, [f"{number:012d}.jpg" for number in range(120_000)], classes)
    started = time.process_time()
    val = divide(records, 0.2)
    assert time.process_time() - started < 3
    assert val.sum() == 24_000


SIX = [{0, 1}, {0}, {1}, set(), {0}, {1}]


def test_both_sides_make_the_whole():
    records = with_classes(SIX, 2)
    source = Divided(Given(records, ("train", "test")), 0.3)
    train, val = source.read("train"), source.read("val")
    assert source.splits == ("train", "val", "test") and source.about == "given; 30% of the images are for validation"
    assert (train.name, val.name, len(train), len(val)) == ("train", "val", 4, 2)
    assert sorted(train.names + val.names) == records.names and train.classes == val.classes == records.classes
    assert len(train.objects.image) + len(val.objects.image) == len(records.objects.image)
    with pytest.raises(DataError, match="no test"):
        source.read("test")
    assert "; 0.1% of" in Divided(Given(records), 0.001).about


def test_a_file_keeps_the_division(tmp_path):
    records, file = with_classes(SIX, 2), tmp_path / "split.json"
    divided = Divided(Given(records), 0.3, file)
    assert not file.exists()
    names = {side: divided.read(side).names for side in ("train", "val")}
    assert json.loads(file.read_text()) == names
    again = Divided(Given(records), None, file)
    assert {side: again.read(side).names for side in names} == names
    assert again.about == f"given; divided as in {file}"
    file.write_text(json.dumps({"train": names["val"], "val": names["train"][::-1]}))
    other = Divided(Given(records), 0.3, file)  # the file decides, and the order is that of the data
    assert (other.read("train").names, other.read("val").names) == (names["val"], names["train"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": ["0.jpg"', r"split.json: not valid JSON \(.*\); mend it, or remove the file to divide anew"),
        ("[" * 100_000, r"split.json: not valid JSON"),
        ("[]", r"split.json: not a division into train and val; give \{.*each with one name or more"),
        ('{"train": ["0.jpg"], "val": []}', "not a division into train and val"),
        ('{"train": ["0.jpg"], "val": "1.jpg"}', "not a division into train and val"),
        ('{"train": [0], "val": ["1.jpg"]}', "not a division into train and val"),
        ('{"train": ["0.jpg"], "val": ["1.jpg"], "test": ["2.jpg"]}', "not a division into train and val"),
        (
            '{"train": ["0.jpg"], "val": ["7.jpg"]}',
            r"split.json: 7.jpg: not among the images of set/train.json; take it",
        ),
        ('{"train": ["0.jpg", "1.jpg"], "val": ["1.jpg"]}', r"split.json: 1.jpg: on both sides; leave it on one, or"),
        ('{"train": ["0.jpg"], "val": ["1.jpg", "1.jpg"]}', r"2.jpg, 3.jpg, 4.jpg and 1 more: on neither side; put"),
    ],
)
def test_files_that_are_no_division_are_errors(tmp_path, content, message):
    file = tmp_path / "split.json"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        Divided(Given(with_classes(SIX, 2)), 0.2, file).read("train")
    assert file.read_text() == content


def test_flags_that_cannot_be_met_are_told_at_once(tmp_path):
    records, file = with_classes(SIX, 2), tmp_path / "split.json"
    with pytest.raises(DataError, match=r"set: there is a val split already; leave out --val-share$"):
        Divided(Given(records, ("train", "val")), 0.2)
    with pytest.raises(DataError, match=r"leave out --val-share and --split-file$"):
        Divided(Given(records, ("train", "val")), 0.2, file)
    with pytest.raises(DataError, match=r"split.json: no such file; to have it made give --val-share 0.2 too"):
        Divided(Given(records), None, file)
    with pytest.raises(OSError, match=r"cannot be made: No such file or directory.*give another --split-file"):
        Divided(Given(records), 0.2, tmp_path / "nowhere" / "split.json")
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\); give another"):
        Divided(Given(records), 0.2, tmp_path)
    for share in (0.0, 1.0, -0.2, 2.0, float("nan")):
        with pytest.raises(ValueError, match=r"--val-share .*: give a share between 0 and 1, such as 0.2"):
            Divided(Given(records), share)
    assert list(tmp_path.iterdir()) == []


def test_a_set_with_problems_is_not_divided(make_document, make_folder, tmp_path):
    content = make_document()
    content["annotations"][0]["category_id"] = 99
    source = open_source(make_folder(content), 0.5, tmp_path / "split.json")
    assert source.read("train") is source.read("val") and source.read("val").problems
    assert not (tmp_path / "split.json").exists()


def test_processes_at_once_write_the_same(make_document, make_folder, tmp_path):
    root = make_folder(make_document(images=((20, 20),) * 6))
    script = (
        "import sys; from dndetr.data.source import open_source; "
        "print(open_source(sys.argv[1], 0.3, sys.argv[2]).read('val').names)"
    )
    command = [sys.executable, "-c", script, str(root), str(tmp_path / "split.json")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = {process.communicate()[0] for process in processes}
    assert told == {f"{json.loads((tmp_path / 'split.json').read_text())['val']}\n"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "split.json"]
