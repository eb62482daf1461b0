"""What a detector may be handed: whatever is no image is named with its place."""

import io
import os
import re
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image

from dndetr.data.transforms import FixedEvaluation
from dndetr.data.user_images import UserImages, is_image

GOOD = np.zeros((4, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (None, "is a NoneType"),
        (Image.new("RGB", (0, 0)), "is a picture of 0x0 pixels"),
        (torch.zeros(3, 0, 5), "is a tensor of shape [3, 0, 5]"),
        (torch.zeros(4, 5), "is a tensor of shape [4, 5]"),
        (torch.full((3, 4, 5), 2.0), "has values from 2 to 2"),
        (np.zeros((4, 0, 3), dtype=np.uint8), "is an array uint8 [4, 0, 3]"),
        (np.zeros((4, 6, 3)), "is an array float64 [4, 6, 3]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_image(image, told):
    with pytest.raises(ValueError, match=re.escape(f"image 1 {told}")):
        UserImages([GOOD, image], None)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A picture on its side, turned upright by its EXIF."""
    path = tmp_path_factory.mktemp("pictures") / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    return path


class Elsewhere(os.PathLike):
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


class Stream(io.RawIOBase):
    """What cannot go back, as a connection."""

    def __init__(self, content):
        self._left = io.BytesIO(content)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self._left.readinto(buffer)


def at_its_end(content):
    buffer = io.BytesIO()
    buffer.write(content)
    return buffer


def temporary(content):
    file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(content)
    return file


OPENED = {
    "open file": lambda path: path.open("rb"),
    "BytesIO at its end": lambda path: at_its_end(path.read_bytes()),
    "temporary file": lambda path: temporary(path.read_bytes()),
    "stream": lambda path: Stream(path.read_bytes()),
    "PathLike": lambda path: Elsewhere(str(path)),
    "PathLike of bytes": lambda path: Elsewhere(os.fsencode(path)),
    "entry of a folder": lambda path: next(os.scandir(path.parent)),
}


@pytest.mark.parametrize("kind", OPENED)
def test_files_may_be_open_or_named_in_any_way(kind, file):
    transform = FixedEvaluation((32, 32))
    expected = UserImages([file], transform)
    given = OPENED[kind](file)
    assert is_image(given)
    images = UserImages([given], transform)
    assert images.sizes == expected.sizes == [(60, 40)]
    for _ in range(2):
        assert np.array_equal(images.sample(0).pixels, expected.sample(0).pixels)


def test_open_files_that_are_no_images_are_named(file, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with (
        open(tmp_path / "notes.txt") as text,
        pytest.raises(ValueError, match="image 1 is an open file that gives str"),
    ):
        UserImages([file, text], None)
    with pytest.raises(ValueError, match="image 0 is a closed file"):
        UserImages([text], None)
    with open(tmp_path / "notes.txt", "rb") as notes, pytest.raises(ValueError, match=r"notes\.txt: not an image"):
        UserImages([notes], FixedEvaluation((32, 32)))
    with pytest.raises(ValueError, match="image 1: not an image that can be read"):
        UserImages([file, io.BytesIO(b"none")], FixedEvaluation((32, 32)))
