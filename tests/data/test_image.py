"""Image files of every kind come out as upright 8-bit RGB."""

import numpy as np
import pytest
from PIL import Image

from dndetr.data.errors import DataError
from dndetr.data.image import read_image

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
