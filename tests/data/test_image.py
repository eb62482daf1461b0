"""Image files of every kind come out as upright 8-bit RGB."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, features

from dndetr.data.errors import DataError, UnreadableImage
from dndetr.data.image import KEPT, TURNED, UNDECIDED, read_header, read_image, read_turned

RAMP = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 85  # up to 65195


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "deep.png")
    assert (pixels(read_image(tmp_path / "deep.png")) == (RAMP >> 8).astype(np.uint8)[..., None]).all()


def test_grey_is_repeated(tmp_path):
    grey = (RAMP >> 8).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert (pixels(read_image(tmp_path / "grey.png")) == grey[..., None]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_becomes_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 6), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 6))
    image.convert(mode).save(tmp_path / "alpha.png", **({"transparency": 0} if mode == "P" else {}))
    if mode == "P":
        palette = Image.new("P", (8, 6), 1)
        palette.putpalette([9, 9, 9, 0, 0, 0])
        palette.paste(0, (0, 0, 4, 6))
        palette.save(tmp_path / "alpha.png", transparency=0)
    result = pixels(read_image(tmp_path / "alpha.png"))
    assert (result[:, :4] == 255).all() and (result[:, 4:] == 0).all()


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    red, green, blue = pixels(read_image(tmp_path / "cmyk.jpg"))[8, 8].astype(int)
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    upright = Image.fromarray(np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((16, 16), np.uint8)))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright if orientation == 1 else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    result = pixels(read_image(tmp_path / "turned.jpg", size=(32, 48)))
    assert np.abs(result[..., 0].astype(int) - np.asarray(upright)).max() < 12
    if orientation >= 5:  # annotated on the pixels as stored
        assert read_image(tmp_path / "turned.jpg", size=(48, 32)).size == (32, 48)


def test_a_size_that_the_file_does_not_have_is_an_error(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a.png: the file is 30x20 pixels, its annotation says 20x30"):
        read_image(tmp_path / "a.png", size=(30, 20))


def test_a_large_jpeg_is_decoded_smaller_but_never_too_small(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg", (480, 640), shrink=2.0).size == (640, 480)
    assert read_image(tmp_path / "a.jpg", (480, 640), shrink=3.5).size == (320, 240)
    assert read_image(tmp_path / "a.jpg", (480, 640), shrink=100).size == (80, 60)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none.png: no such image file"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match=r"text.png: not an image"):
        read_image(tmp_path / "text.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut.png: cannot be decoded"):
        read_image(tmp_path / "cut.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float.tif: .*floating-point"):
        read_image(tmp_path / "float.tif")


def exif(*entries: bytes) -> bytes:
    """EXIF data of orientation 6 and other entries of twelve bytes: tag, type, count, value."""
    body = struct.pack("<H", 1 + len(entries)) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + b"".join(entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + body + bytes(4)


ODD = {
    "negative-width": exif(struct.pack("<HHIi", 0x0100, 9, 1, -5)),
    "negative-unit": exif(struct.pack("<HHIi", 0x0128, 9, 1, -5)),
    "xmp-as-text": exif(struct.pack("<HHI4s", 700, 2, 4, b"abc")),
    "divided-by-zero": exif(struct.pack("<HHII", 0x011A, 5, 1, 38)) + struct.pack("<II", 72, 0),
}


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_odd_metadata_beside_the_orientation_are_not_in_the_way(tmp_path, data, name):
    Image.new("RGB", (48, 32)).save(tmp_path / name, exif=data)
    assert read_image(tmp_path / name, (48, 32)).size == (32, 48)


def test_metadata_that_are_none_turn_nothing(tmp_path):
    Image.new("RGB", (48, 32)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0")
    assert read_image(tmp_path / "a.jpg", (32, 48)).size == (48, 32)


@pytest.mark.parametrize(("orientation", "size"), [(6, (32, 48)), (1, (48, 32))])
@pytest.mark.parametrize("kind", [2, 3], ids=["text", "numbers"])
def test_a_tiff_with_metadata_of_another_type_is_read(tmp_path, orientation, size, kind):
    Image.new("RGB", (48, 32)).save(tmp_path / "a.tif", tiffinfo={0x0112: orientation, 700: b"text"})
    entry = struct.pack("<HHI", 700, 1, 4)
    content = (tmp_path / "a.tif").read_bytes()
    assert entry in content
    content = content.replace(entry, struct.pack("<HHI", 700, kind, 4 // (kind - 1)))
    (tmp_path / "a.tif").write_bytes(content)
    assert read_image(tmp_path / "a.tif").size == size


@pytest.mark.parametrize(
    "raised", [SyntaxError, EOFError, zlib.error, IndexError, RecursionError, KeyError, AssertionError]
)
@pytest.mark.parametrize("where", ["open", "getexif", "load"])
def test_whatever_a_plugin_raises_the_file_is_named(tmp_path, monkeypatch, where, raised):
    def fail(*_, **__):
        raise raised("one\nodd thing")

    Image.new("RGB", (4, 4)).save(tmp_path / "a.bmp")
    kind = type(Image.open(tmp_path / "a.bmp"))
    monkeypatch.setattr(*((Image, "open") if where == "open" else (kind, where)), fail)
    if where == "getexif":
        assert read_image(tmp_path / "a.bmp").size == (4, 4)
    else:
        with pytest.raises(UnreadableImage, match=r"a.bmp: cannot be decoded \('?one.*odd thing'?\); replace it"):
            read_image(tmp_path / "a.bmp")


@pytest.mark.parametrize("raised", [MemoryError, KeyboardInterrupt])
def test_what_is_not_the_files_fault_stays_what_it_is(tmp_path, monkeypatch, raised):
    def fail(_):
        raise raised

    Image.new("RGB", (4, 4)).save(tmp_path / "a.bmp")
    monkeypatch.setattr(type(Image.open(tmp_path / "a.bmp")), "load", fail)
    with pytest.raises(raised):
        read_image(tmp_path / "a.bmp")


FORMATS = ["a.jpg", "a.png", "a.webp", "a.tif", "lzw.tif", "a.mpo", "late.png"]
if features.check("avif"):
    FORMATS.append("a.avif")


def save_turned(path, picture: Image.Image, orientation: int) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    if path.suffix == ".tif":
        compression = "tiff_lzw" if path.stem == "lzw" else None
        return picture.save(path, tiffinfo={0x0112: orientation}, compression=compression)
    if path.name == "late.png":  # metadata behind the pixels
        picture.save(path)
        data = tags.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
        whole = path.read_bytes()
        path.write_bytes(whole[:-12] + chunk + whole[-12:])
        return None
    return picture.save(path, exif=tags, quality=95)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_lies_as_its_annotation_says(tmp_path, name, orientation):
    stored = Image.new("RGB", (48, 32), "white")
    stored.paste("red", (0, 0, 24, 16))
    save_turned(tmp_path / name, stored, orientation)
    corner = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    upright, turn = read_turned(tmp_path / name, (48, 32) if orientation >= 5 else (32, 48))
    assert upright.size == ((32, 48) if orientation >= 5 else (48, 32))
    assert turn == (None if orientation == 1 else UNDECIDED if orientation < 5 else TURNED)
    assert read_header(tmp_path / name) == upright.size[::-1]
    x, y = (int(side * (place + 0.5) / 2) for side, place in zip(upright.size, corner, strict=True))
    assert upright.getpixel((x, y))[1] < 60
    if orientation >= 5:
        kept, turn = read_turned(tmp_path / name, (32, 48))
        assert turn == KEPT and kept.size == (48, 32) and kept.getpixel((12, 8))[1] < 60
        with pytest.raises(DataError, match="the file is 32x48 pixels, its annotation says 31x48"):
            read_header(tmp_path / name, (48, 31))


def test_large_pictures_are_read_without_a_word_or_refused_in_one_line(tmp_path):
    # In a process of its own: pytest has filters of warnings, too.
    Image.new("1", (10_000, 9_500)).save(tmp_path / "large.png")
    code = f"from dndetr.data.image import read_header; print(read_header({str(tmp_path / 'large.png')!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("(9500, 10000)\n", "")
    content = bytearray((tmp_path / "large.png").read_bytes())
    content[16:24] = struct.pack(">II", 20_000, 10_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "large.png").write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"large.png: cannot be decoded \(.*200000000 pixels.*cut it into tiles"):
        read_header(tmp_path / "large.png")
