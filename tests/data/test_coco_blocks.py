"""COCO's JSON block by block: whatever the size of a block, it is what Python's decoder makes of the whole."""

import copy
import json
import time

import numpy as np
import pytest
from whole_documents import find_problems

from dndetr.data.errors import DataError
from dndetr.data.formats.coco_blocks import BLOCK, Document
from dndetr.data.formats.coco_document import Gathered

BLOCKS = (1, 333, 2000, BLOCK)
LARGEST = 2**63 - 1
ODD_NAMES = ["a},{b.png", 'quo"te}, {.png', "back\\slash}],[{.png", "画像.png", "tab.png", "a..b/c.png", "😀.png"]


def document(seed: int) -> dict:
    """Images and annotations with whatever may stand in a document, in no order."""
    draw = np.random.default_rng(seed)
    ids = [LARGEST, -LARGEST, 0, -1, *draw.choice(10**6, 16, replace=False).tolist()]
    images = [
        {"id": number, "width": int(draw.integers(50, 90)), "height": int(draw.integers(50, 90)), "file_name": name}
        | [{}, {"coco_url": "http://x/},{"}, {"tags": [{"id": 3}, {"id": 4}]}][place % 3]
        for place, (number, name) in enumerate(zip(ids, ODD_NAMES * 5, strict=False))
    ]
    annotations = []
    for number in draw.permutation(60).tolist():
        box = draw.choice(
            (draw.integers(0, 60, 4).tolist(), [*draw.normal(20, 15, 2).tolist(), 3.5, 0]), axis=0
        ).tolist()
        more = [
            {"iscrowd": 1, "segmentation": {"counts": "a},{b", "size": [3, 4]}},
            {"iscrowd": True, "area": 12.5, "segmentation": [[1, 2, 3, 4], []]},
            {"area": None, "iscrowd": None, "attributes": [{"id": 1, "image_id": 2}, {"id": 5}], "note": '"},{"'},
            {"area": 7, "iscrowd": 0, "score": 1e-300, "keypoints": [{"id": [{}, {"a": []}]}]},
            {},
        ][int(draw.integers(5))]
        entry = {"id": LARGEST - number if number % 3 else number, "image_id": ids[int(draw.integers(len(ids) - 2))]}
        annotations.append(entry | {"bbox": box, "category_id": int(draw.choice((7, 3, -5)))} | more)
    categories = [{"id": number, "name": f"}},{{{number}", "supercategory": "none"} for number in (7, 3, -5)]
    return {"info": [{"a": "],["}], "annotations": annotations, "categories": categories, "images": images, "more": {}}


def columns_of(content: dict) -> dict:
    """What is to be gathered of a document without problems, entry by entry."""
    place = {image["id"]: at for at, image in enumerate(content["images"])}
    label = {category["id"]: at for at, category in enumerate(content["categories"])}
    rows = content["annotations"]
    areas = [entry["bbox"][2] * entry["bbox"][3] if entry.get("area") is None else entry["area"] for entry in rows]
    return {
        "names": [image["file_name"] for image in content["images"]],
        "ids": [image["id"] for image in content["images"]],
        "sizes": [[image["height"], image["width"]] for image in content["images"]],
        "image": [place[entry["image_id"]] for entry in rows],
        "label": [label[entry["category_id"]] for entry in rows],
        "boxes": [entry["bbox"] for entry in rows],
        "crowd": [bool(entry.get("iscrowd")) for entry in rows],
        "areas": areas,
        "annotations": [entry["id"] for entry in rows],
    }


def gathered(path, block: int, folder=None) -> dict:
    found = Gathered(Document(path, block), folder)
    assert found.problems == []
    objects = dict(zip(("image", "label", "boxes", "crowd", "areas", "annotations"), found.objects, strict=True))
    arrays = {"ids": found.ids, "sizes": found.sizes} | objects
    return {"names": found.names} | {name: array.tolist() for name, array in arrays.items()}


WRITTEN = {
    "as-usual": json.dumps,
    "close": lambda content: json.dumps(content, separators=(",", ":")),
    "wide": lambda content: json.dumps(content, indent=3),
    "unicode": lambda content: json.dumps(content, ensure_ascii=False),
    "marked": lambda content: "\ufeff" + json.dumps(content),
    "blanks": lambda content: json.dumps(content).replace('}, {"', '}\n\t, \r{"'),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
def test_blocks_of_any_size_are_the_whole(tmp_path, write, block):
    for seed in range(2):
        content = document(seed)
        (tmp_path / "a.json").write_text(write(content), encoding="utf-8")
        expected = columns_of(json.loads((tmp_path / "a.json").read_text(encoding="utf-8-sig")))
        assert gathered(tmp_path / "a.json", block) == expected
        assert gathered(tmp_path / "a.json", block, tmp_path) == expected


def test_a_block_is_a_part(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(document(0)))
    blocks = list(Document(tmp_path / "a.json", 2000).blocks("annotations"))
    assert len(blocks) > 5 and all(0 < len(block.entries()) < 60 for block in blocks)
    assert all(block.typed for block in blocks)
    assert [entry for block in blocks for entry in block.entries()] == document(0)["annotations"]


LENIENT = {
    "nan-unread": lambda c: c["annotations"][40].update(score=float("nan")),
    "infinity-unread": lambda c: c["images"][3].update(scale=[float("inf"), float("-inf")]),
    "nan-outside": lambda c: c.update(version=float("nan")),
    "half-a-surrogate": lambda c: c["annotations"][5].update(note="\ud800 and \\ud800 and \\\ud800"),
    "whole-float-ids": lambda c: [e.update(id=float(1000 + n), image_id=float(c["images"][5]["id"]))
                                  for n, e in enumerate(c["annotations"][:30])],
    "whole-float-sizes": lambda c: c["images"][3].update(width=64.0, height=48.0),
    "whole-float-crowd": lambda c: c["annotations"][3].update(iscrowd=1.0),
    "whole-float-category": lambda c: c["categories"][0].update(id=7.0),
    "no-annotations": lambda c: c.update(annotations=[]),
}  # fmt: skip


@pytest.mark.parametrize("change", LENIENT.values(), ids=LENIENT)
def test_what_python_reads_is_read(tmp_path, change):
    content = document(1)
    change(content)
    (tmp_path / "a.json").write_text(json.dumps(content))
    for block in BLOCKS:
        assert gathered(tmp_path / "a.json", block) == columns_of(content)


def test_of_a_field_that_is_there_twice_the_last_counts(tmp_path):
    text = json.dumps(document(0)).replace('"bbox": ', '"bbox": [1, 2, 3, 4], "bbox": ', 5)
    (tmp_path / "a.json").write_text(text)
    assert gathered(tmp_path / "a.json", 333) == columns_of(document(0))


def put(which, place, **fields):
    return lambda content: content[which][place].update(fields)


def drop(which, place, field):
    return lambda content: content[which][place].pop(field)


def twice(which, *places):
    return lambda content: content[which].extend(copy.deepcopy(content[which][place]) for place in places)


BROKEN = {
    "unknown-image": put("annotations", 50, image_id=10**9),
    "unknown-images": lambda c: [entry.update(image_id=10**9 + n) for n, entry in enumerate(c["annotations"][::7])],
    "text-image": put("annotations", 3, image_id="17"),
    "unknown-category": put("annotations", 55, category_id=8),
    "true-category": put("annotations", 55, category_id=True),
    "no-box": drop("annotations", 30, "bbox"),
    "long-box": put("annotations", 30, bbox=[1, 2, 3, 4, 5]),
    "text-box": put("annotations", 30, bbox=[1, "2", 3, 4]),
    "nan-box": put("annotations", 30, bbox=[1, float("nan"), 3, 4]),
    "endless-box": put("annotations", 30, bbox=[1, 2, float("inf"), 4]),
    "far-box": put("annotations", 30, bbox=[1e9, 2, 3, 4]),
    "long-number": put("annotations", 30, bbox=[10**400, 2, 3, 4]),
    "negative-box": put("annotations", 30, bbox=[9, 9, -4, 5]),
    "nan-area": put("annotations", 30, area=float("nan")),
    "negative-area": put("annotations", 30, area=-1),
    "vast-area": put("annotations", 30, area=10**11),
    "crowd-of-two": put("annotations", 30, iscrowd=2),
    "text-crowd": put("annotations", 30, iscrowd="0"),
    "annotation-twice": twice("annotations", 3, 58, 3),
    "annotation-without-id": drop("annotations", 20, "id"),
    "lowest-id": put("annotations", 20, id=-(2**63)),
    "long-id": put("annotations", 20, id=2**63),
    "image-twice": twice("images", 5, 1),
    "long-image-id": lambda c: [put("images", 6, id=2**70)(c), put("annotations", 9, image_id=2**70)(c)],
    "odd-image-id-and-minus-one": lambda c: [put("images", 3, id="x")(c), put("annotations", 9, image_id=-1)(c)],
    "image-id-half": put("images", 6, id=2.5),
    "no-name": drop("images", 6, "file_name"),
    "empty-name": put("images", 6, file_name=""),
    "name-with-zero": put("images", 6, file_name="a\0b"),
    "name-of-a-half": put("images", 6, file_name="\ud800"),
    "name-outside": put("images", 6, file_name="../a.png"),
    "absolute-name": put("images", 6, file_name="/a.png"),
    "no-width": drop("images", 6, "width"),
    "zero-height": put("images", 6, height=0),
    "huge": put("images", 6, height=90_000, width=90_000),
    "huge-number": put("images", 6, height=2**80),
    "category-twice": twice("categories", 1),
    "category-name": put("categories", 0, name=3),
    "category-id": put("categories", 0, id=None),
    "shares": lambda c: [entry.update(bbox=[0.1, 0.2, 0.5, 0.5]) for entry in c["annotations"]],
    "shares-and-a-fault": lambda c: [
        *(entry.update(bbox=[0.1, 0.2, 0.5, 0.5]) for entry in c["annotations"]),
        c["annotations"][8].update(iscrowd=5),
    ],
    "no-lists": lambda c: c.update(annotations=[{}], images=[{}], categories=[{}]),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_problems_are_those_of_the_rules(tmp_path, change):
    content = document(2)
    change(content)
    (tmp_path / "a.json").write_text(json.dumps(content))
    expected = find_problems(json.loads((tmp_path / "a.json").read_text()))
    assert expected
    for block in BLOCKS:
        assert Gathered(Document(tmp_path / "a.json", block)).problems == expected


def test_many_faults_together_keep_their_order(tmp_path):
    content = document(3)
    for change in (change for name, change in BROKEN.items() if name not in ("no-lists", "shares")):
        change(content)
    (tmp_path / "a.json").write_text(json.dumps(content))
    expected = find_problems(content)
    assert len(expected) > 30
    for block in BLOCKS:
        assert Gathered(Document(tmp_path / "a.json", block)).problems == expected


def test_images_that_are_sound_are_kept_whatever_the_others_are(tmp_path):
    content = document(0)
    put("images", 1, height=0)(content)
    put("images", 2, id="x")(content)
    (tmp_path / "a.json").write_text(json.dumps(content))
    for block in BLOCKS:
        found = Gathered(Document(tmp_path / "a.json", block))
        assert found.names == [image["file_name"] for place, image in enumerate(content["images"]) if place != 1]
        assert found.ids[:3].tolist() == [LARGEST, -1, -1] and len(found.ids) == len(found.sizes) == len(found.names)


def test_files_that_are_cut_off_or_spoilt_are_no_json(tmp_path):
    draw, whole = np.random.default_rng(0), json.dumps(document(0)).encode()
    path = tmp_path / "a.json"
    for at in draw.integers(0, len(whole), 20).tolist():
        path.write_bytes(whole[:at])
        for block in (333, BLOCK):
            with pytest.raises(DataError, match=r"a.json: not valid JSON \(.*\); is the file complete\?$"):
                Gathered(Document(path, block))
        for damage in (b"}", b"\xff", b"]", b'"', b"NaNo"):
            spoilt = whole[:at] + damage + whole[at:]
            path.write_bytes(spoilt)
            try:
                json.loads(spoilt.decode("utf-8-sig"))
            except ValueError:
                with pytest.raises(DataError):
                    Gathered(Document(path, 333))
                continue
            Gathered(Document(path, 333))


@pytest.mark.parametrize("text", ["", " ", "null", "[" * 100_000, '{"images": ' + "[" * 100_000])
def test_files_that_are_hardly_json(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a.json: (not valid JSON|the top level must be)"):
        Document(tmp_path / "a.json")


@pytest.mark.parametrize("of", ["images", "annotations"])
def test_an_entry_longer_than_a_block_is_read_at_once(tmp_path, of):
    """Each of its inner ends looks like the end of an entry: to try all of them would take minutes."""
    content = document(0)
    content[of][5]["track"] = [{"t": place, "x": 3 * place, "y": 7} for place in range(130_000)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    assert path.stat().st_size > BLOCK
    started = time.process_time()
    found = gathered(path, BLOCK)
    assert time.process_time() - started < 20  # 2 s
    assert found == columns_of(content)
