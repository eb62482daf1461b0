"""Records of large annotation files in mapped arrays: as in memory, whoever makes the index and however that ends."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_folders import write_small
from large_coco import write_large
from splits import read_split

from dndetr.data import index
from dndetr.data.errors import DataError
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.formats import coco
from dndetr.data.mapped_file import ArrayWriter, Mapped
from dndetr.data.records import Objects, Records
from dndetr.data.transforms import FixedTraining, Unresized
from dndetr.data.verified import Lists, Verified


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where indexes are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dndetr" / "index"


@pytest.fixture
def indexing(monkeypatch):
    """Files of any size have an index."""
    monkeypatch.setattr(coco, "SMALLEST", 0)


@pytest.fixture
def unread(monkeypatch):
    """From its call on no annotation file may be read."""

    def gather(*_, **__):
        raise AssertionError("it is read again")

    return lambda: monkeypatch.setattr(coco, "Gathered", gather)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def same(one: Records, other: Records) -> bool:
    """Whether all fields are, with their types."""
    arrays = [(getattr(one, name), getattr(other, name)) for name in ("ids", "sizes")]
    arrays += [*zip(one.objects, other.objects, strict=True), *zip(one.summary[:3], other.summary[:3], strict=True)]
    fields = ("name", "root", "file", "folder", "classes", "numbered", "remarks", "problems")
    return (
        all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in arrays)
        and all(getattr(one, name) == getattr(other, name) for name in fields)
        and one.names == list(other.names)
        and one.summary.remarks == other.summary.remarks
    )


def generated(root: Path, images: int, objects: int, seed: int) -> Path:
    """A folder without image files: crowds, flat boxes, boxes outside, images without objects, ids of all sizes."""
    draw = np.random.default_rng(seed)
    ids = draw.choice(np.array([2**63 - 1, 1 - 2**63, 0, *range(5, 5 + images)]), images, replace=False).tolist()
    boxes = draw.integers(-10, 60, (objects, 4)) + draw.choice((0, 0.25), (objects, 4))
    boxes[:, 2:] = np.abs(boxes[:, 2:]) * draw.choice((0, 1), (objects, 2), p=(0.1, 0.9))
    which = draw.integers(0, max(1, images - 1), objects).tolist()
    document = {
        "annotations": [
            {"id": 7 * place - 3, "image_id": ids[image], "bbox": box, "category_id": int(draw.choice((5, 2, 9)))}
            | [{}, {"iscrowd": 1}, {"area": 3.25}, {"iscrowd": 0, "area": None}][place % 4]
            for place, (image, box) in enumerate(zip(which, boxes.tolist(), strict=True))
        ],
        "images": [
            {"id": number, "file_name": f"{'täß画'[place % 4]}{place}.png", "height": 50, "width": 40 + place % 20}
            for place, number in enumerate(ids)
        ],
        "categories": [
            {"id": 9, "name": "a", "supercategory": "all"},
            {"id": 2, "name": "b", "supercategory": "all"},
            {"id": 1, "name": "all", "supercategory": "none"},
            {"id": 5, "name": "c"},
        ],
    }
    (root / "annotations").mkdir(parents=True)
    (root / "train").mkdir()
    (root / "annotations" / "instances_train.json").write_text(json.dumps(document))
    return root


@pytest.mark.parametrize(("images", "objects"), [(1, 0), (1, 1), (1, 9), (40, 0), (40, 300), (300, 40)])
def test_indexed_records_are_those_in_memory(tmp_path, indexing, unread, monkeypatch, folder, images, objects):
    for seed in range(3):
        root = generated(tmp_path / str(seed), images, objects, seed)
        monkeypatch.setattr(coco, "SMALLEST", 1 << 40)
        expected = read_split(root, "train")
        assert not isinstance(expected.ids, Mapped) and expected.problems == [] and expected.remarks
        monkeypatch.setattr(coco, "SMALLEST", 0)
        assert same(read_split(root, "train"), expected)
    assert len(files(folder)) == 3
    unread()
    for seed in range(3):
        again = read_split(tmp_path / str(seed), "train")
        assert isinstance(again.ids, Mapped) and isinstance(again.objects.boxes, Mapped)
    assert same(again, expected)
    assert again.coco_dict() == expected.coco_dict()
    assert same(again.take(range(0, images, 2)), expected.take(range(0, images, 2)))


def test_samples_of_an_index_are_the_same(tmp_path, indexing, monkeypatch):
    root = write_small(tmp_path / "set")
    mapped = FolderDataset(read_split(root, "train"), FixedTraining((24, 32)), seed=3)
    monkeypatch.setattr(coco, "SMALLEST", 1 << 40)
    plain = FolderDataset(read_split(root, "train"), FixedTraining((24, 32)), seed=3)
    assert isinstance(mapped.records.ids, Mapped) and not isinstance(plain.records.ids, Mapped)
    for number in range(3):
        a, b = mapped.sample(number, 2), plain.sample(number, 2)
        assert np.array_equal(a.pixels, b.pixels) and torch.equal(a.boxes_xyxy, b.boxes_xyxy)
        assert torch.equal(a.labels, b.labels) and a.labels.dtype == b.labels.dtype
        assert (a.image_id, a.original_size) == (b.image_id, b.original_size)
        assert mapped.extent(number, 4) == plain.extent(number, 4) and mapped.labels(number) == plain.labels(number)
    for name in ("ids", "sizes", "counts", "class_counts", "classes", "remarks"):
        assert getattr(mapped, name) == getattr(plain, name)
    mapped.leave_out([0])
    plain.leave_out([0])
    assert mapped.ids == plain.ids and mapped.counts == plain.counts and mapped.class_counts == plain.class_counts
    assert torch.equal(mapped.sample(1).boxes_xyxy, plain.sample(1).boxes_xyxy)


def test_small_files_and_problems_have_no_index(tmp_path, monkeypatch, folder):
    root = generated(tmp_path / "set", 20, 20, 0)
    assert not isinstance(read_split(root, "train").ids, Mapped) and not folder.exists()
    monkeypatch.setattr(coco, "SMALLEST", 0)
    file = root / "annotations" / "instances_train.json"
    file.write_text(file.read_text().replace('"category_id": 5', '"category_id": 6', 1))
    assert [problem.kind for problem in read_split(root, "train").problems] == ["unknown category"]
    assert files(folder) == []


def test_a_change_of_equal_size_makes_it_anew(tmp_path, indexing, folder):
    root = generated(tmp_path / "set", 20, 20, 0)
    before, (kept,) = read_split(root, "train"), files(folder)
    file = root / "annotations" / "instances_train.json"
    stamp = os.stat(file)
    file.write_text(file.read_text().replace('"width": 40', '"width": 49'))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = read_split(root, "train")
    assert os.stat(file).st_size == stamp.st_size and after.sizes.max() != before.sizes[0, 1] == 40
    assert after.sizes[0, 1] == 49 and len(files(folder)) == 2  # the old one is in use
    del before
    os.utime(file)
    assert read_split(root, "train").sizes[0, 1] == 49
    assert kept not in files(folder)


@pytest.mark.parametrize("damage", ["empty", "cut", "begin", "end", "table", "short"])
def test_a_damaged_index_is_made_anew(tmp_path, indexing, folder, damage):
    root = generated(tmp_path / "set", 20, 50, 0)
    expected, (name,) = read_split(root, "train"), files(folder)
    content = (folder / name).read_bytes()
    changed = {
        "empty": b"",
        "cut": content[:-1000],
        "begin": b"x" + content[1:],
        "end": content[:-1] + b"x",
        "table": content[:-200] + b"x" * 100 + content[-100:],
        "short": content[:20],
    }[damage]
    (folder / name).unlink()
    (folder / name).write_bytes(changed)
    assert same(read_split(root, "train"), expected) and (folder / name).read_bytes() == content


def test_old_versions_are_removed(tmp_path, indexing, folder, monkeypatch):
    first, second = (generated(tmp_path / name, 20, 50, 0) for name in "ab")
    read_split(first, "train")
    monkeypatch.setattr(index, "_VERSION", index._VERSION + 1)
    read_split(second, "train")
    (name,) = files(folder)
    assert name.startswith(f"{index._VERSION}-")


def test_the_limit_takes_what_was_not_used_for_longest(tmp_path, indexing, folder, monkeypatch):
    roots = [generated(tmp_path / str(n), 20, 50, n) for n in range(4)]
    used = read_split(roots[0], "train")
    read_split(roots[1], "train")
    times = {name: (folder / name).stat().st_mtime_ns for name in files(folder)}
    first, second = sorted(times, key=times.get)
    size = (folder / first).stat().st_size
    monkeypatch.setenv("DNDETR_INDEX_GB", str(2.5 * size / 1e9))
    read_split(roots[2], "train")
    assert first in files(folder) and second not in files(folder) and len(files(folder)) == 2  # the first is in use
    assert used.names[0] == "t0.png"
    del used
    read_split(roots[3], "train")
    assert first not in files(folder) and len(files(folder)) == 2


def test_a_limit_that_is_no_number_is_told(tmp_path, indexing, monkeypatch, folder):
    monkeypatch.setenv("DNDETR_INDEX_GB", "much")
    with pytest.raises(ValueError, match=r"^DNDETR_INDEX_GB=much: give a number of gigabytes, such as 20$"):
        read_split(generated(tmp_path / "set", 20, 50, 0), "train")
    assert not folder.exists()


def test_a_cache_that_cannot_be_written_is_said_and_done_without(tmp_path, indexing, monkeypatch):
    root = generated(tmp_path / "set", 20, 50, 0)
    expected = read_split(root, "train")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"kept in memory, .* cannot write .*file/dndetr.*; set XDG_CACHE_HOME to"):
        assert same(read_split(root, "train"), expected)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.warns(UserWarning, match="no home"):
        assert same(read_split(root, "train"), expected)


def test_a_full_disk_leaves_nothing(tmp_path, indexing, folder, monkeypatch):
    root = generated(tmp_path / "set", 20, 50, 0)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ArrayWriter, "finish", full)
    with pytest.warns(UserWarning, match=r"cannot write .*arrays: No space left on device"):
        found = read_split(root, "train")
    assert files(folder) == [] and not isinstance(found.ids, Mapped)
    monkeypatch.undo()
    monkeypatch.setattr(coco, "SMALLEST", 1 << 40)
    assert same(found, read_split(root, "train"))


def test_errors_of_the_annotations_are_told_as_they_are(tmp_path, indexing):
    root = generated(tmp_path / "set", 20, 50, 0)
    (root / "annotations" / "instances_train.json").write_text('{"images": [')
    with pytest.raises(DataError, match="not valid JSON"):
        read_split(root, "train")


def test_pickles_name_the_file(tmp_path, indexing, folder):
    root = write_small(tmp_path / "set")
    dataset = FolderDataset(read_split(root, "train"), Unresized())
    parts = read_split(root, "train").objects.boxes[:2]
    assert pickle.loads(pickle.dumps(parts)).tolist() == parts.tolist()
    for array in (dataset.records.objects.boxes, dataset.records.ids, dataset.records.objects.boxes[:0]):
        assert np.array_equal(pickle.loads(pickle.dumps(array)), array)
    again = pickle.loads(pickle.dumps(dataset))
    assert isinstance(again.records.objects.boxes, Mapped) and same(again.records, dataset.records)
    assert torch.equal(again.sample(0).boxes_xyxy, dataset.sample(0).boxes_xyxy)
    program = "import pickle, sys; print(pickle.load(sys.stdin.buffer).objects.boxes[:2].tolist())"

    def elsewhere():
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        content = pickle.dumps(dataset.records)
        return subprocess.run([sys.executable, "-c", program], input=content, capture_output=True, env=environment)

    assert elsewhere().stdout.decode().strip() == str(parts.tolist())
    for path in folder.glob("*.arrays"):
        path.unlink()
    assert b"was removed while a run needs it; start the run again" in elsewhere().stderr


def test_a_pickle_does_not_grow_with_the_data(tmp_path, indexing):
    sizes = []
    for images, objects in ((10, 10), (2000, 5000)):
        root = generated(tmp_path / str(images), images, objects, 0)
        sizes.append(len(pickle.dumps(read_split(root, "train"))))
    assert sizes[1] < sizes[0] + 200


def forked(work) -> int:
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return process


def test_of_several_processes_one_makes_it(tmp_path, indexing, monkeypatch, folder):
    root, made = generated(tmp_path / "set", 50, 200, 0), tmp_path / "made"
    gather = coco.Gathered

    def slowly(*arguments, **named):
        with open(made, "a") as file:
            file.write("x")
        time.sleep(1)
        return gather(*arguments, **named)

    monkeypatch.setattr(coco, "Gathered", slowly)
    processes = [forked(lambda: np.testing.assert_(len(read_split(root, "train")) == 50)) for _ in range(3)]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0, 0]
    assert made.read_text() == "x" and len(files(folder)) == 1


@pytest.mark.parametrize("where", ["gathering", "writing"])
def test_a_killed_build_leaves_nothing_locked_and_nothing_half(tmp_path, indexing, monkeypatch, folder, where):
    root, begun = generated(tmp_path / "set", 50, 200, 0), tmp_path / "begun"

    def wait(*_, **named):
        begun.touch()
        time.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(*((coco, "Gathered") if where == "gathering" else (index, "summarise")), wait)
        process = forked(lambda: read_split(root, "train"))
        while not begun.exists():
            time.sleep(0.01)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert len(files(folder)) == (where == "writing")
    assert len(read_split(root, "train")) == 50
    (name,) = files(folder)
    assert name.endswith(".arrays") and not name.startswith(".")


def private(pid: int | str = "self") -> float:
    """Megabytes that a process has for itself."""
    rows = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(row[1]) for row in rows if row[0] in ("Private_Clean:", "Private_Dirty:")) / 1024


@pytest.mark.slow
def test_a_large_set_costs_little_memory_and_starts_at_once(tmp_path, unread, monkeypatch):
    """A twentieth of 1.7 million images with 25 million boxes, and a twentieth of the limits."""
    monkeypatch.setattr("dndetr.data.folder_dataset.missing_files", lambda records: [])
    write_large(tmp_path / "set", 85_000, 1_250_000)
    started = time.process_time()
    records = read_split(tmp_path / "set", "train")
    assert records.problems == [] and time.process_time() - started < 180 / 20 * 2  # of user and system on two cores
    del records
    unread()
    before, started = private(), time.process_time()
    dataset = FolderDataset(read_split(tmp_path / "set", "train"), Unresized())
    assert time.process_time() - started < 0.2
    draw = np.random.default_rng(0)
    chosen = draw.integers(0, len(dataset), 20_000).tolist()
    found = sum(dataset.extent(image)[2] for image in chosen)
    assert found > 200_000 and private() - before < 15

    def work():
        start = private()
        for image in chosen:
            dataset.extent(image)
        assert private() - start < 15

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert os.waitpid(forked(work), 0)[1] == 0
    program = (
        "import pickle, sys; d = pickle.load(sys.stdin.buffer); from test_index import private; a = private();"
        f"[d.extent(i) for i in {chosen[:5000]}]; print(private() - a)"
    )
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    said = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps(dataset),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert float(said.stdout) < 15, said.stderr


def test_the_columns_are_those_of_objects():
    """A field more would have to be read, and be written to an index of another version."""
    assert Objects._fields == ("image", "label", "boxes", "crowd", "areas", "ids")
    assert Verified._fields == ("stated", "absent", "partial") and Lists._fields == ("labels", "starts")
    assert index._VERSION == 2
