"""The predict command: images, folders and videos in; drawn boxes and JSON out, or one plain line."""

import errno
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import short_run, write_pictures

import dndetr
from dndetr import predict
from dndetr.detector import Detector


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


def test_unreadable_images_are_named_and_skipped_on_request(run, pictures, capsys):
    torn = torn_folder(pictures)
    assert predict.main([str(run), torn, "--skip-unreadable", "--output", "out"]) == 0
    out, error = capsys.readouterr()
    assert error.startswith("warning: torn/b.jpg: ") and error.count("\n") == 1 and "in 1 images: out" in out
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.jpg", "predictions.json"]
    assert predict.main([str(run), f"{torn}/b.jpg", "--skip-unreadable"]) == 1
    assert capsys.readouterr().err.startswith("error: torn/b.jpg: ") and not list(Path().glob("runs/*"))


def test_of_a_folder_only_what_pillow_opens_is_taken(run, pictures):
    Path("photos").mkdir()
    content = (pictures / "0.jpg").read_bytes()
    for name in ("a.JPG", "c.mpo"):
        (Path("photos") / name).write_bytes(content)
    for name in ("._a.JPG", "b.pdf", "b.mpg", "b.mp4", "b.palm"):
        (Path("photos") / name).write_bytes(b"not a picture")
    (Path("photos") / "folder.jpg").mkdir()
    assert predict.main([str(run), "photos", "--output", "out"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.JPG", "c.mpo.png", "predictions.json"]


def test_no_picture_is_written_over_another(run):
    Path("photos").mkdir()
    colours = {"w.webp": "red", "w.webp.png": "green", "w.webp-2.png": "blue"}
    for name, colour in colours.items():
        Image.new("RGB", (64, 48), colour).save(Path("photos") / name)
    assert predict.main([str(run), "photos", "--output", "out", "--threshold", "1"]) == 0
    for name, strongest in (("w.webp.png", 1), ("w.webp-2.png", 2), ("w.webp-3.png", 0)):
        assert np.argmax(Image.open(Path("out") / name).getpixel((60, 44))) == strongest
    written = json.loads(Path("out/predictions.json").read_text())
    assert {image["file"] for image in written["images"]} == set(colours)


def test_failing_into_a_folder_of_the_users_leaves_it_as_it_was(run, pictures, capsys):
    Path("real").mkdir()
    Path("real/.checkpoint.pt.1.tmp").write_text("what a killed run left")
    Path("link").symlink_to("real")
    torn = torn_folder(pictures)
    for output in ("link", "real"):
        assert predict.main([str(run), torn, "--output", output]) == 1
        assert capsys.readouterr().err.startswith("error: torn/b.jpg: ")
        assert [path.name for path in Path("link").iterdir()] == [".checkpoint.pt.1.tmp"]
    assert predict.main([str(run), torn, "--output", "new/deep/out"]) == 1
    assert not Path("new").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=["interrupt", "memory"])
def test_a_failure_removes_only_what_was_written(run, pictures, monkeypatch, error):
    found, calls = Detector.predict, []

    def failing(self, images, *arguments):
        calls.append(images)
        if len(calls) == 3:
            Path("out/mine.txt").write_text("not the command's")
            raise error
        return found(self, images, *arguments)

    monkeypatch.setattr(predict, "_AT_ONCE", 2)
    monkeypatch.setattr(Detector, "predict", failing)
    with pytest.raises(type(error)):
        predict.run(predict.Arguments(run, pictures, Path("out")))
    assert [path.name for path in Path("out").iterdir()] == ["mine.txt"]


def test_a_full_disk_is_told_with_the_file(run, pictures, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dndetr.files.os.fsync", full)
    assert predict.main([str(run), str(pictures), "--output", "out"]) == 1
    assert capsys.readouterr().err == "error: cannot write out/predictions.json: No space left on device\n"
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("nowhere.jpg", [], "nowhere.jpg: no such image, folder or video"),
        (".", [], ".: no images in this folder"),
        ("0.jpg", ["--batch-size", "-1"], "--batch-size -1: give 1 or more"),
        ("0.jpg", ["--threshold", "nan"], "--threshold nan: give a score from 0 to 1"),
        ("/dev/null", [], "/dev/null: no such image"),
        ("0.jpg", ["--preset", "dn-detr-r50"], "has its own configuration; leave out --preset"),
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


def film(path: str, pictures: list[Image.Image]) -> None:
    av = pytest.importorskip("av", reason="videos need the extra video (PyAV)")
    with av.open(path, "w") as written:
        stream = written.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = *pictures[0].size, "yuv420p"
        for picture in pictures:
            written.mux(stream.encode(av.VideoFrame.from_image(picture)))
        written.mux(stream.encode())


def frames_of(path: str) -> list[Image.Image]:
    av = pytest.importorskip("av")
    with av.open(path) as written:
        return [frame.to_image() for frame in written.decode(video=0)]


def test_a_video_becomes_a_video(run, pictures, capsys):
    film("film.avi", [Image.open(pictures / f"{n % 6}.jpg").convert("RGB").resize((98, 66)) for n in range(20)])
    assert predict.main([str(run), "film.avi", "--output", "out", "--threshold", "0"]) == 0
    written = json.loads(Path("out/predictions.json").read_text())
    assert written["video"] == "film.avi" and [row["frame"] for row in written["frames"]] == list(range(20))
    assert written["frames"][10]["seconds"] == pytest.approx(2.0)
    assert all(len(row["detections"]) == 90 for row in written["frames"])
    frames = frames_of("out/film.mp4")
    assert len(frames) == 20 and frames[0].size == (98, 66)
    Path("torn.mp4").write_bytes(Path("out/film.mp4").read_bytes()[:500])
    assert predict.main([str(run), "torn.mp4", "--output", "torn"]) == 1
    assert capsys.readouterr().err.startswith("error: torn.mp4: cannot be read as a video")
    assert not Path("torn").exists()


# As a track's header has it: what x and y become, in 16.16 fixed point, and where the corner comes to lie.
@pytest.mark.parametrize(
    ("matrix", "size", "red"),
    [
        ((0, 1, 0, -1, 0, 0, 66, 0), (66, 98), (60, 49)),
        ((0, -1, 0, 1, 0, 0, 0, 98), (66, 98), (6, 49)),
        ((-1, 0, 0, 0, -1, 0, 98, 66), (98, 66), (49, 60)),
    ],
    ids=["right", "left", "over"],
)
def test_a_video_is_turned_upright_as_its_file_says(run, matrix, size, red):
    pixels = np.zeros((66, 98, 3), np.uint8)
    pixels[:33], pixels[33:] = (255, 0, 0), (0, 0, 255)  # red above, blue below
    film("film.mp4", [Image.fromarray(pixels)] * 3)
    content = bytearray(Path("film.mp4").read_bytes())
    place = content.index(b"tkhd") + 4 + 40  # a header of version 0
    content[place : place + 36] = struct.pack(">9i", *(value << 16 for value in matrix), 1 << 30)
    Path("film.mp4").write_bytes(content)
    assert predict.main([str(run), "film.mp4", "--output", "out", "--threshold", "1"]) == 0
    frames = frames_of("out/film.mp4")
    assert [frame.size for frame in frames] == [size] * 3
    opposite = (size[0] - red[0], size[1] - red[1])
    assert frames[0].getpixel(red)[0] > 200 > 50 > frames[0].getpixel(opposite)[0]


def test_a_video_that_cannot_be_written_names_the_file(run, monkeypatch, capsys):
    av = pytest.importorskip("av")
    film("film.avi", [Image.new("RGB", (98, 66))])

    def full(*arguments):
        raise av.error.OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(predict, "entry", full)  # called where frames are written
    assert predict.main([str(run), "film.avi", "--output", "out"]) == 1
    assert capsys.readouterr().err == "error: cannot write out/film.mp4: No space left on device\n"
    assert not Path("out").exists()
