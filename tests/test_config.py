"""What settings mean: numbers of denoising groups, drops of the learning rate, parts that only some models have."""

import ast
import inspect
import json
from dataclasses import replace

import pytest

from dndetr import config as settings_of_runs
from dndetr.config import Config, DenoisingConfig, LossConfig, OptimizerConfig, from_dict, to_dict
from dndetr.model_config import ModelConfig
from dndetr.presets import PRESETS


@pytest.mark.parametrize(
    ("settings", "slots", "groups"),
    [
        ({"groups": 5}, 8, 5),
        ({"groups": 5}, 512, 1),
        ({"groups": 5, "max_queries": 500}, 512, 0),
        ({"groups": 5, "contrastive": True, "max_queries": 79}, 8, 4),
        ({"groups": 100, "contrastive": True, "fill": 200}, 1, 100),
        ({"groups": 100, "contrastive": True, "fill": 200}, 8, 12),
        ({"groups": 100, "contrastive": True, "fill": 200}, 100, 1),
        ({"groups": 100, "contrastive": True, "fill": 200}, 300, 1),
        ({"groups": 100, "contrastive": True, "fill": 200}, 512, 0),
        ({"groups": 100, "fill": 200}, 8, 25),
        ({"groups": 3, "fill": 200}, 8, 3),
        ({"groups": 0, "fill": 200}, 8, 0),
    ],
)
def test_groups_for_a_number_of_objects(settings, slots, groups):
    assert DenoisingConfig(**settings).groups_for(slots) == groups


def test_dino_denoises_crowds_too():
    denoising = PRESETS["dino-r50"]().denoising
    assert [denoising.groups_for(slots) for slots in (8, 16, 32, 64, 128, 256, 512)] == [12, 6, 3, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("settings", "epochs", "drops"),
    [
        ({"drops": ()}, 12, (11,)),
        ({"drops": ()}, 24, (20,)),
        ({"drops": ()}, 36, (30,)),
        ({"drops": (), "schedule": "multistep"}, 36, (30,)),
        ({}, 50, (40,)),
        ({"drops": (0.5, 0.8), "schedule": "multistep"}, 50, (25, 40)),
        ({"drops": (0.5, 0.8)}, 50, (25,)),
    ],
)
def test_epochs_after_which_the_rate_drops(settings, epochs, drops):
    assert OptimizerConfig(**settings).drop_epochs(epochs) == drops


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"patience": 0}, "--patience 0: give 1 or more"),
        ({"hours": 0.0}, "--hours 0.0: give a positive number"),
        ({"hours": float("nan")}, "--hours nan: give a positive number"),
        ({"hours": float("inf")}, "--hours inf: give a positive number"),
    ],
)
def test_when_a_run_may_end(settings, told):
    with pytest.raises(ValueError, match=told):
        Config(**settings)


@pytest.mark.parametrize("variant", ["dn-detr", "dn-deformable-encoder"])
@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"proposals": "selected"}, "--model.proposals selected: give --model.proposals none with"),
        ({"look_forward_twice": True}, "--model.look-forward-twice: give --model.no-look-forward-twice with"),
        ({"query_scale": False}, "--model.no-query-scale: give --model.query-scale with"),
    ],
)
def test_parts_of_the_deformable_decoder_alone(variant, part, told):
    with pytest.raises(ValueError, match=told):
        ModelConfig(variant=variant, **part)


def test_a_second_set_of_queries_has_no_patterns_and_some_repeats():
    with pytest.raises(ValueError, match=r"^--model.one-to-many 9: give --model.patterns 0 too"):
        ModelConfig(one_to_many=9, patterns=3)
    with pytest.raises(ValueError, match=r"^--model.one-to-many -1: give 0"):
        ModelConfig(one_to_many=-1)
    for repeats in (0, -1):
        with pytest.raises(ValueError, match=rf"^--loss.repeats {repeats}: give 1 or more"):
            LossConfig(repeats=repeats)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"alpha": -0.5}, "--loss.alpha -0.5: give 0 to 1"),
        ({"alpha": 1.5}, "--loss.alpha 1.5: give 0 to 1"),
        ({"alpha": float("nan")}, "--loss.alpha nan: give 0 to 1"),
        ({"cost_position": -0.5}, "--loss.cost-position -0.5: give 0 or more"),
        ({"one_to_many": float("inf")}, "--loss.one-to-many inf: give 0 or more"),
    ],
)
def test_losses_take_no_less_than_nothing(settings, told):
    with pytest.raises(ValueError, match=told):
        LossConfig(**settings)


def test_contents_are_selected_with_proposals():
    config = PRESETS["dn-deformable-detr-r50"]().model
    with pytest.raises(ValueError, match=r"--model.content selected: give --model.proposals too"):
        replace(config, content="selected")
    assert replace(config, content="selected", proposals="selected").content == "selected"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_file(name):
    config = PRESETS[name]()
    assert isinstance(config, Config) and config.preset == name
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_every_flag_has_one_line_of_help():
    """tyro takes the help from the string under each field."""
    tree = ast.parse(inspect.getsource(settings_of_runs))
    for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        fields = [(place, node) for place, node in enumerate(kind.body) if isinstance(node, ast.AnnAssign)]
        for place, field in fields:
            if ast.unparse(field.annotation).endswith("Config"):
                continue  # a group of flags, which has its class's docstring
            below = kind.body[place + 1] if place + 1 < len(kind.body) else None
            text = ast.literal_eval(below.value) if isinstance(below, ast.Expr) else ""
            assert text.endswith(".") and "\n" not in text, f"{kind.name}.{field.target.id} has no line of help"
