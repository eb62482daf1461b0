"""Canvases that a backbone's maps would not cover exactly are refused, with what to type."""

from dataclasses import replace

import pytest

from dndetr import train
from dndetr.config import Config
from dndetr.training.canvas import demand_canvas


def config_of(*flags: str) -> Config:
    return train.parse(["--preset", "small", "--data", "cells", *flags])


FIXED = ["--images.recipe", "fixed"]
OFFICIAL = ["--images.recipe", "official"]


@pytest.mark.parametrize(
    ("flags", "multiple"),
    [
        ([*FIXED, "--images.canvas", "224", "322"], 14),
        ([*FIXED, "--images.canvas", "241", "319"], 1),
        (OFFICIAL, 32),
        ([*OFFICIAL, "--images.multiple", "56"], 14),
        (["--images.recipe", "original"], 64),
        (["--data", "shapes", "--images.canvas", "1", "1"], 32),
    ],
)
def test_whole_multiples_will_do(flags, multiple):
    demand_canvas(config_of(*flags), multiple)


@pytest.mark.parametrize(
    ("flags", "multiple", "told"),
    [
        (
            [*FIXED, "--images.canvas", "240", "320"],
            14,
            "--images.canvas 240 320: .* of 14: give --images.canvas 238 322",
        ),
        (
            [*FIXED, "--images.canvas", "240", "320"],
            32,
            "--images.canvas 240 320: .* of 32: give --images.canvas 256 320",
        ),
        ([*FIXED, "--images.canvas", "5", "320"], 32, "give --images.canvas 32 320"),
        (OFFICIAL, 14, "--images.multiple 64: .* of 14: give --images.multiple 56"),
        (["--images.recipe", "original", "--images.multiple", "8"], 32, "give --images.multiple 32"),
        (["--data", "shapes"], 14, "--data shapes: these images are 128x128"),
    ],
)
def test_others_are_told_what_to_type(flags, multiple, told):
    config = config_of(*flags)
    with pytest.raises(ValueError, match=told) as error:
        demand_canvas(config, multiple)
    named = str(error.value).rpartition("give ")[2].split()
    if named[0].startswith("--images."):
        names = {"--images.canvas": tuple(map(int, named[1:])), "--images.multiple": int(named[-1])}
        field = named[0].removeprefix("--images.")
        images = replace(config.images, **{field: names[named[0]]})
        demand_canvas(replace(config, images=images), multiple)
