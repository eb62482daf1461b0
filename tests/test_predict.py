"""The predict command: images, folders and videos in; drawn boxes and JSON out, or one plain line."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from short_runs import short_run, write_pictures

import dndetr
from dndetr import predict


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures") / "val"


@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return short_run(folder, "--data", str(pictures.parent), "--images.canvas", "96", "128")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_a_folder_gives_pictures_and_json(run, pictures, capsys):
    assert predict.main([str(run), str(pictures), "--output", "out", "--threshold", "0"]) == 0
    names = [f"{number}.jpg" for number in range(6)]
    assert sorted(path.name for path in Path("out").iterdir()) == [*names, "predictions.json"]
    written = json.loads(Path("out/predictions.json").read_text())
    assert written["classes"] == [{"id": 3, "name": "cell"}, {"id": 7, "name": "dust"}, {"id": 12, "name": "hair"}]
    assert [image["file"] for image in written["images"]] == names
    assert (written["images"][4]["width"], written["images"][4]["height"]) == (90, 120)  # turned by its EXIF data
    found = dndetr.load(run).predict([pictures / name for name in names], threshold=0)
    ids = {"cell": 3, "dust": 7, "hair": 12}
    for image, prediction in zip(written["images"], found, strict=True):
        rows = image["detections"]
        assert [row["name"] for row in rows] == prediction.names
        assert all(row["category_id"] == ids[row["name"]] for row in rows)
        assert [row["score"] for row in rows] == pytest.approx(prediction.scores.tolist(), abs=1e-6)
        boxes = torch.tensor([row["box_xyxy"] for row in rows])
        torch.testing.assert_close(boxes, prediction.boxes_xyxy, atol=1e-3, rtol=0)
    assert "540 objects in 6 images: out" in capsys.readouterr().out


def test_boxes_are_drawn_above_the_threshold(run, pictures):
    for name, threshold in (("all", "0"), ("none", "1")):
        assert predict.main([str(run), str(pictures / "0.jpg"), "--output", name, "--threshold", threshold]) == 0
    drawn, plain = (Image.open(Path(name) / "0.jpg") for name in ("all", "none"))
    assert drawn.size == plain.size and drawn.tobytes() != plain.tobytes()
    assert json.loads(Path("none/predictions.json").read_text())["images"][0]["detections"] == []


def test_other_formats_become_png_and_the_default_folder_is_new(run, pictures):
    Image.open(pictures / "0.jpg").convert("P").save("a.gif")
    assert predict.main([str(run / "best.pt"), "a.gif"]) == predict.main([str(run), "a.gif"]) == 0
    assert sorted(path.name for path in Path("runs/predictions-2").iterdir()) == ["a.gif.png", "predictions.json"]
    assert json.loads(Path("runs/predictions-1/predictions.json").read_text())["images"][0]["file"] == "a.gif"


def torn_folder(pictures: Path) -> str:
    Path("torn").mkdir()
    content = (pictures / "0.jpg").read_bytes()
    Path("torn/a.jpg").write_bytes(content)
    Path("torn/b.jpg").write_bytes(content[: len(content) // 2])
    Path("torn/notes.txt").write_text("not an image, and not taken for one")
    return "torn"


@pytest.mark.parametrize("output", [[], ["--output", "out"]], ids=["default", "output"])
def test_an_unreadable_image_is_named_and_nothing_stays(run, pictures, output, capsys):
    assert predict.main([str(run), torn_folder(pictures), *output]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: torn/b.jpg: ") and error.count("\n") == 1
    assert not Path("out").exists() and not list(Path().glob("runs/*"))


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("nowhere.jpg", [], "nowhere.jpg: no such image, folder or video"),
        (".", [], ".: no images in this folder"),
        ("0.jpg", ["--batch-size", "-1"], "a batch size of -1: give 1 or more"),
        ("0.jpg", ["--threshold", "nan"], "--threshold nan: give a score from 0 to 1"),
        ("/dev/null", [], "/dev/null: no such image"),
        ("0.jpg", ["--preset", "dn-detr-r50"], "its backbone does not fit"),
        ("0.jpg", ["--output", "used"], "--output used exists and is not empty"),
    ],
    ids=["missing", "empty", "batch", "threshold", "device", "preset", "used"],
)
def test_mistakes_are_one_plain_line(run, pictures, source, flags, message, capsys):
    if source == "0.jpg":
        source = str(pictures / source)
    if "used" in flags:
        Path("used").mkdir()
        Path("used/mine").write_text("kept")
    assert predict.main([str(run), source, *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(Path().glob("runs/*")) and (not Path("used").exists() or Path("used/mine").read_text() == "kept")


def test_videos_without_the_extra_name_it(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    Path("film.mp4").write_bytes(b"")
    assert predict.main([str(run), "film.mp4"]) == 1
    assert capsys.readouterr().err == 'error: videos need PyAV: pip install -e ".[video]"\n'


def test_a_video_becomes_a_video(run, pictures, capsys):
    av = pytest.importorskip("av", reason="videos need the extra video (PyAV)")
    with av.open("film.avi", "w") as film:
        stream = film.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 98, 66, "yuv420p"
        for number in range(20):
            frame = Image.open(pictures / f"{number % 6}.jpg").convert("RGB").resize((98, 66))
            film.mux(stream.encode(av.VideoFrame.from_image(frame)))
        film.mux(stream.encode())
    assert predict.main([str(run), "film.avi", "--output", "out", "--threshold", "0"]) == 0
    written = json.loads(Path("out/predictions.json").read_text())
    assert written["video"] == "film.avi" and [row["frame"] for row in written["frames"]] == list(range(20))
    assert written["frames"][10]["seconds"] == pytest.approx(2.0)
    assert all(len(row["detections"]) == 90 for row in written["frames"])
    with av.open("out/film.mp4") as film:
        frames = [frame.to_image() for frame in film.decode(video=0)]
    assert len(frames) == 20 and frames[0].size == (98, 66)
    Path("torn.mp4").write_bytes(Path("out/film.mp4").read_bytes()[:500])
    assert predict.main([str(run), "torn.mp4", "--output", "torn"]) == 1
    assert capsys.readouterr().err.startswith("error: torn.mp4: cannot be read as a video")
    assert not Path("torn").exists()
