"""Geometry and colours of the transforms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dndetr.config import ImagesConfig
from dndetr.data.sample import IMAGENET, MEAN, STD, denormalise, normalisation
from dndetr.data.transforms import (
    FixedEvaluation,
    FixedTraining,
    OfficialEvaluation,
    OfficialTraining,
    Unresized,
    View,
    short_side,
)
from dndetr.ops import normalise

SIZES = st.tuples(st.integers(20, 900), st.integers(20, 900))
TRANSFORMS = st.sampled_from(
    [
        OfficialTraining(),
        OfficialTraining(sides=(96, 128), longest=200, crop_sides=(80, 100), crop_min=64, crop_max=90),
        OfficialEvaluation(),
        FixedTraining(),
        FixedTraining(canvas=(64, 96), crop=1.0),
        FixedEvaluation(canvas=(50, 70)),
        Unresized(hflip=0.5),
    ]
)


@st.composite
def boxed(draw):
    """A size (height, width) and some boxes in it, float64 xyxy."""
    height, width = draw(SIZES)
    corner = st.tuples(st.floats(0, width - 1), st.floats(0, height - 1), st.floats(0.01, 1), st.floats(0.01, 1))
    boxes = [(x, y, x + w * (width - x), y + h * (height - y)) for x, y, w, h in draw(st.lists(corner, max_size=5))]
    return (height, width), np.array(boxes).reshape(-1, 4)


@given(boxed(), TRANSFORMS, st.integers(0, 2**32))
def test_boxes_stay_in_the_image_and_keep_an_area(case, transform, seed):
    size, boxes = case
    view = transform.view(size, np.random.default_rng(seed))
    moved, kept = view.boxes(boxes)
    height, width = view.size
    assert moved.dtype == np.float32 and len(moved) == kept.sum()
    assert (moved >= 0).all() and (moved <= (width, height, width, height)).all()
    assert (moved[:, 2:] > moved[:, :2]).all()
    x0, y0, x1, y1 = view.region
    assert 0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0]


@given(boxed(), st.booleans(), st.booleans())
def test_mirroring_twice_changes_nothing(case, hflip, vflip):
    size, boxes = case
    view = View(size, (0, 0, size[1], size[0]), size, hflip, vflip)
    once, _ = view.boxes(boxes)
    twice, kept = view.boxes(once)
    assert kept.all()
    assert np.abs(twice - boxes).max(initial=0) < 1e-3
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    assert (view.picture(Image.fromarray(view.picture(picture))) == np.asarray(picture)).all()


@given(boxed(), st.integers(0, 2**32))
def test_a_crop_drops_exactly_the_boxes_that_lose_too_much(case, seed):
    size, boxes = case
    view = FixedTraining(crop=1.0, min_visible=0.4).view(size, np.random.default_rng(seed))
    _, kept = view.boxes(boxes)
    x0, y0, x1, y1 = view.region
    for (a, b, c, d), stays in zip(boxes, kept, strict=True):
        share = max(min(c, x1) - max(a, x0), 0) * max(min(d, y1) - max(b, y0), 0) / ((c - a) * (d - b))
        assert stays == (share >= 0.4) or abs(share - 0.4) < 1e-6


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("vflip", [False, True])
def test_picture_and_boxes_move_together(hflip, vflip):
    """A bright rectangle is found where the moved box says, after crop, stretch and mirroring."""
    image = Image.new("RGB", (200, 150))
    image.paste((255, 255, 255), (60, 40, 110, 90))
    view = View((150, 200), (20.5, 10.25, 180.5, 130.25), (96, 240), hflip, vflip)
    (box,), _ = view.boxes(np.array([[60.0, 40.0, 110.0, 90.0]]))
    bright = view.picture(image)[..., 0] > 127
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert np.abs(box - found).max() <= 1
    halved = image.resize((100, 75), Image.Resampling.BOX)
    assert np.abs(view.picture(halved).astype(int) - view.picture(image)).mean() < 4


@pytest.mark.parametrize(
    ("size", "side", "longest", "wanted"),
    [
        ((480, 640), 800, 1333, (800, 1066)),  # 1066.67 is cut off
        ((640, 480), 800, 1333, (1066, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((300, 640), 800, 1333, (625, 1333)),  # 624.8 is rounded; 625 * 640 / 300 = 1333.3
        ((800, 900), 800, 1333, (800, 900)),
        ((500, 500), 480, 1333, (480, 480)),
        ((333, 500), 600, None, (600, 900)),
        ((1, 5000), 800, 1333, (1, 1333)),
        ((5000, 1), 800, 1333, (1333, 1)),
        ((3, 5000), 800, 1333, (1, 1666)),  # 0.8 is rounded, and the long side follows it
    ],
)
def test_the_official_rounding(size, side, longest, wanted):
    assert short_side(size, side, longest) == wanted


def test_the_official_recipe_draws_what_it_should():
    transform, rng = OfficialTraining(), np.random.default_rng(0)
    views = [transform.view((480, 640), rng) for _ in range(2000)]
    whole = [view for view in views if view.region == (0, 0, 640, 480)]
    assert 0.45 < len(whole) / len(views) < 0.55
    assert 0.45 < np.mean([view.hflip for view in views]) < 0.55
    assert {min(view.size) for view in whole} == set(range(480, 801, 32))
    assert max(max(view.size) for view in views) <= 1333
    for x0, y0, x1, y1 in {view.region for view in views} - {(0, 0, 640, 480)}:
        # In the image resized to a short side of 400, 500 or 600, the crop is 384 to 600 whole pixels on each side.
        crops = [((x1 - x0) * w / 640, (y1 - y0) * h / 480) for h, w in ((400, 533), (500, 666), (600, 800))]
        assert any(all(383.99 < n < 600.01 and abs(n - round(n)) < 1e-6 for n in crop) for crop in crops)


def test_the_fixed_recipe_draws_what_it_should():
    transform, rng = FixedTraining(canvas=(24, 32)), np.random.default_rng(0)
    views = [transform.view((480, 640), rng) for _ in range(2000)]
    cropped = [view.region for view in views if view.region != (0, 0, 640, 480)]
    assert 0.76 < len(cropped) / len(views) < 0.84
    widths = np.array([x1 - x0 for x0, _, x1, _ in cropped]) / 640
    assert 0.6 <= widths.min() < 0.61 and 0.99 < widths.max() <= 1
    assert all(0.45 < np.mean([getattr(view, flip) for view in views]) < 0.55 for flip in ("hflip", "vflip"))
    assert {view.size for view in views} == {(24, 32)}


def test_colours_change_as_told():
    rng = np.random.default_rng(1)
    picture = rng.integers(60, 190, (16, 16, 3), dtype=np.uint8)
    unchanged = FixedTraining(brightness=0, contrast=0, colour=0).colours(picture, rng)
    assert torch.allclose(unchanged, IMAGENET, rtol=1e-6, atol=0)
    grey = np.repeat(picture[..., :1], 3, axis=2)
    back = _levels(grey, FixedTraining(brightness=0, contrast=0, colour=0.9).colours(grey, rng))
    assert np.abs(back - grey).max() < 1e-3  # grey has no colour to change
    back = _levels(picture, FixedTraining(brightness=0.3, contrast=0, colour=0).colours(picture, rng))
    factor = back / picture
    assert factor.std() < 1e-4 and 0.7 < factor.mean() < 1.3 and abs(factor.mean() - 1) > 1e-3
    flat = np.full_like(picture, 90)
    back = _levels(flat, FixedTraining(brightness=0, contrast=0.3, colour=0).colours(flat, rng))
    assert np.abs(back - 90).max() < 1e-3  # a flat picture has no contrast to change


def _shown(picture: np.ndarray, colours: torch.Tensor) -> torch.Tensor:
    """What a model sees of a picture: [3, h, w]."""
    return normalise(torch.from_numpy(picture)[None], colours[None], torch.tensor([picture.shape[:2]]))[0]


def _levels(picture: np.ndarray, colours: torch.Tensor) -> np.ndarray:
    mean, std = np.array(MEAN), np.array(STD)
    return (_shown(picture, colours).permute(1, 2, 0).numpy() * std + mean) * 255


OTHER = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


@pytest.mark.parametrize("kind", [Unresized, OfficialTraining, OfficialEvaluation, FixedTraining, FixedEvaluation])
def test_every_transform_ends_with_its_own_normalisation(kind):
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    usual, other = (
        _shown(picture, kind(**colours).colours(picture, np.random.default_rng(3))).permute(1, 2, 0)
        for colours in ({}, OTHER)
    )
    levels = usual * torch.tensor(STD) + torch.tensor(MEAN)
    torch.testing.assert_close(other * torch.tensor(OTHER["std"]) + torch.tensor(OTHER["mean"]), levels)
    assert not torch.allclose(usual, other)


def test_pictures_of_another_normalisation_come_back():
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    images = ImagesConfig(**OTHER)
    image = _shown(picture, normalisation(images))
    assert (denormalise(image, normalisation(images)) == picture).all()
    assert torch.equal(normalisation(ImagesConfig()), IMAGENET)


def test_normalisation_and_back():
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    image = _shown(picture, FixedEvaluation().colours(picture))
    assert torch.allclose(image[0, 0, 0], torch.tensor((picture[0, 0, 0] / 255 - MEAN[0]) / STD[0]).float(), atol=1e-5)
    assert (denormalise(image) == picture).all()
