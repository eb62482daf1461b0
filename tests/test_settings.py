"""Settings by name: their groups, their types, and what is said of mistakes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest

from dndetr import train
from dndetr.config import Config, DenoisingConfig
from dndetr.model_config import BackboneConfig
from dndetr.settings import changed, flat, in_python


def test_groups_are_dicts_dataclasses_or_names_with_dots():
    backbone = {"depth": 34, "outputs": [3, 4]}
    expected = {"model.backbone.depth": 34, "model.backbone.outputs": (3, 4)}
    assert flat({"model": {"backbone": backbone}}) == expected
    assert flat({"model.backbone": backbone}) == flat({"model": {"backbone.depth": 34, "backbone.outputs": (3, 4)}})
    assert flat({"model.backbone.depth": 34, "model.backbone.outputs": (3, 4)}) == expected
    whole = flat({"denoising": DenoisingConfig(groups=3), "epochs": 2})
    assert whole == {f"denoising.{name}": value for name, value in vars(DenoisingConfig(groups=3)).items()} | {
        "epochs": 2
    }


def test_what_is_not_given_stays_as_it_is():
    small = train.starting_point("small", None)
    found = changed(small, flat({"denoising": {"groups": 1}, "model": {"backbone": {"frozen": 0}}, "lr": 1}))
    assert (found.denoising.groups, found.denoising.contrastive, found.model.width) == (1, True, 128)
    assert (found.model.backbone, found.lr) == (BackboneConfig(depth=18, frozen=0, outputs=(2, 3)), 1.0)
    whole = changed(small, flat({"denoising": DenoisingConfig(groups=1)}))
    assert whole.denoising == DenoisingConfig(groups=1)


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("--epochs 3 --lr 1 --quiet", {"epochs": 3, "lr": 1, "quiet": True}),
        ("--data some/where --init x.pth", {"data": Path("some/where"), "init": Path("x.pth")}),
        ("--optimizer.drops 0.5 1 --images.no-augment", {"optimizer.drops": [0.5, 1], "images.augment": False}),
        ("--model.temperature 10 20 --seed 7", {"model": {"temperature": (10, 20)}, "seed": np.int64(7)}),
        ("--log-every 4 --model.backbone.bottleneck True", {"log_every": 4, "model.backbone.bottleneck": True}),
        ("--overfit 8 --preset small --epochs 3", {"overfit": 8, "preset": "small", "epochs": 3}),
        ("--preset tiny --optimizer.drops", {"optimizer": {"drops": ()}}),
    ],
)  # fmt: skip
def test_they_make_what_the_flags_make(flags, settings):
    given = flat(settings)
    made = changed(train.starting_point(given.get("preset"), given.get("overfit")), given)
    expected = train.parse(flags.split())
    assert made == expected and repr(made) == repr(expected)  # 1 equals 1.0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"epochs": "many"}, "epochs 'many': give a whole number"),
        ({"epochs": 2.5}, "epochs 2.5: give a whole number"),
        ({"epochs": True}, "epochs True: give a whole number"),
        ({"lr": False}, "lr False: give a number"),
        ({"lr": 10**400}, "000: give a number"),
        ({"model": {"backbone": {"depth": np.bool_(True)}}}, "give one of 18, 34, 50, 101"),
        ({"quiet": 1}, "quiet 1: give True or False"),
        ({"data": 3}, "data 3: give a string or None"),
        ({"max_steps_per_epoch": 1.5}, "max_steps_per_epoch 1.5: give a whole number or None"),
        ({"precision": "half"}, "precision 'half': give one of 'auto', 'float32', 'bfloat16'"),
        ({"model": {"backbone": {"depth": 19}}}, "model.backbone.depth 19: give one of 18, 34, 50, 101"),
        ({"model": {"temperature": (1, 2, 3)}}, "model.temperature (1, 2, 3): give (a number, a number)"),
        ({"optimizer": {"drops": "0.8"}}, "optimizer.drops '0.8': give a list, each a number"),
        ({"optimizer": {"drops": [0.8, None]}}, "optimizer.drops [0.8, None]: give a list, each a number"),
        ({"denoising": 3}, "denoising 3: give a dict of its settings, or a DenoisingConfig"),
        ({"denoising": DenoisingConfig(groups="3" and 3.5)}, "denoising.groups 3.5: give a whole number"),
        ({"denoising": {"groups": 2}, "denoising.groups": 2}, "denoising.groups is given twice: leave out one of them"),
        ({"epochz": 2}, "there is no setting epochz: did you mean epochs? (there are preset, data, "),
        ({"groups": 3}, "there is no setting groups: did you mean denoising.groups? (there are preset, "),
        ({"denoising_groups": 3}, "there is no setting denoising_groups: did you mean denoising.groups?"),
        ({"denoising": {"group": 3}}, "did you mean denoising.groups? (in denoising there are groups, "),
        ({"epochs.more": 3}, "there is no setting epochs.more: did you mean epochs?"),
        ({"xyzzy": 3}, "there is no setting xyzzy (there are preset, "),
        ({"given": {}}, "there is no setting given"),
    ],
)  # fmt: skip
def test_mistakes_are_one_plain_line(settings, told):
    with pytest.raises(ValueError) as error:
        flat(settings)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_types_of_every_kind():
    @dataclass(frozen=True)
    class Some:
        size: int | Literal["auto"] = 2
        places: tuple[Literal["a", "b"], ...] = ()
        pair: tuple[int, str] | None = None
        share: Annotated[float, "of the run"] = 0.5

    good = {"size": "auto", "places": ["b", "a"], "pair": [1, "x"], "share": 1}
    assert flat(good, Some) == {"size": "auto", "places": ("b", "a"), "pair": (1, "x"), "share": 1.0}
    assert flat({"places": "b"}, Some) == {"places": ("b",)}  # as the command takes it
    assert flat({"size": 3, "places": (), "pair": None}, Some) == {"size": 3, "places": (), "pair": None}
    for name, value, wanted in (
        ("size", "car", "a whole number or 'auto'"),
        ("size", True, "a whole number or 'auto'"),
        ("places", ["c"], "a list, each one of 'a', 'b'"),
        ("places", "c", "a list, each one of 'a', 'b'"),
        ("pair", (1, 2), "(a whole number, a string) or None"),
        ("share", "half", "a number"),
    ):
        with pytest.raises(ValueError) as error:
            flat({name: value}, Some)
        assert str(error.value) == f"{name} {value!r}: give {wanted}"


def test_numbers_of_numpy_are_numbers():
    given = {"epochs": np.int64(3), "lr": np.float32(0.5), "quiet": np.bool_(True), "model.backbone.depth": np.int8(18)}
    found = flat(given | {"images.canvas": [np.int64(64), 64], "batch_size": np.int32(2)})
    assert found["epochs"] == 3 and found["images.canvas"] == (64, 64) and found["quiet"] is True
    json.dumps(found)  # as a run keeps its settings


def test_every_setting_of_the_command_is_one():
    config = Config()
    every = flat({name: value for name, value in vars(config).items() if name != "given"})
    assert len(every) > 80 and changed(config, every) == config


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("--epochs 0: give 1 or more", "epochs 0: give 1 or more"),
        ("lower --batch-size, or --model.encoder-layers.", "lower batch_size, or model.encoder_layers."),
        ("--model.no-query-scale: give --model.query-scale", "model.query_scale=False: give model.query_scale=True"),
        ("--init: python -m dndetr.predict --output y, or", "init: python -m dndetr.predict --output y, or"),
        ("my--data and --nothing-of-ours stay", "my--data and --nothing-of-ours stay"),
    ],
)  # fmt: skip
def test_what_is_said_of_flags_is_said_of_settings(text, told):
    assert in_python(text) == told
