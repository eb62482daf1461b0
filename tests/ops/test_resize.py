"""Pictures resized by C++ on every instruction set: Pillow's, bit by bit."""

import importlib
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dndetr.ops import _backend, resize

# The package exports the function under the module's name.
op = importlib.import_module("dndetr.ops.resize")

SIDES = st.integers(1, 70)
PARTS = st.tuples(st.floats(0, 1), st.floats(0, 1))


def pillows(picture, box, size, hflip, vflip):
    resized = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR, box=box, reducing_gap=3.0))
    return np.flip(resized, [axis for axis, flipped in enumerate((vflip, hflip)) if flipped])


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("name", op.CASES)
def test_pillows_bits(simd, name, flips):
    case = op.make_case(name)
    for backend in ("cpp", "reference"):
        found = resize(*case, *flips, backend)
        assert found.dtype == np.uint8 and np.array_equal(found, pillows(*case, *flips))


@pytest.mark.parametrize("name", op.CASES)
def test_what_becomes_less_tall_is_left_to_pillow(extension, name):
    with mock.patch.object(op, "_resize", wraps=op._resize) as ours:
        resize(*op.make_case(name), backend="cpp")
    assert ours.called == (name not in ("less-tall", "much-smaller"))


@given(SIDES, SIDES, st.integers(0, 60), SIDES, PARTS, PARTS, st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_any_part_in_any_size(height, width, taller, new_width, across, down, hflip, vflip, seed):
    if _backend.extension_obstacle("resize"):
        pytest.skip("the extension was not built")
    (x0, x1), (y0, y1) = sorted(np.float32(across) * width), sorted(np.float32(down) * height)
    box = tuple(map(float, (x0, y0, x1, y1)))
    if not (box[0] < box[2] <= width and box[1] < box[3] <= height):
        return
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    case = picture, box, (height + taller, new_width), hflip, vflip
    assert np.array_equal(resize(*case, "cpp"), pillows(*case))


def test_extreme_colours_stay_in_range(simd):
    for level in (0, 255):
        picture = Image.new("RGB", (13, 11), (level, 255 - level, level))
        found = resize(picture, (0.3, 0.7, 12.9, 10.1), (37, 29), backend="cpp")
        assert (found == (level, 255 - level, level)).all()


def test_wrong_input_is_an_error():
    picture = Image.new("RGB", (8, 6))
    for box in ((0, 0, 9, 6), (0, 0, 8, 6.5), (-1, 0, 8, 6), (3, 0, 3, 6), (0, float("nan"), 8, 6)):
        with pytest.raises(ValueError, match="is no part of a picture of 8x6 pixels"):
            resize(picture, box, (12, 16))
    with pytest.raises(ValueError, match=r"pictures are RGB, sizes positive; got L, \(12, 16\)"):
        resize(picture.convert("L"), (0, 0, 8, 6), (12, 16))
    with pytest.raises(ValueError, match=r"pictures are RGB, sizes positive; got RGB, \(12, 0\)"):
        resize(picture, (0, 0, 8, 6), (12, 0))


def test_another_rounding_is_not_taken(extension):
    def lighter(*given):
        return own(*given) + np.uint8(1)

    own = op._resize
    _backend.forget()
    with mock.patch.object(op, "_resize", lighter), pytest.warns(UserWarning, match="resize cannot use its cpp"):
        assert _backend.choose("resize")[0] == "reference"
    _backend.forget()
