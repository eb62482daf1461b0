"""A whole step, counted: every part is there, sums are right, and settings cost what they should."""

from dataclasses import replace

import pytest
import torch

from dndetr import train
from dndetr.counting.gpus import GPUS, gpu_named
from dndetr.counting.report import DEAREST, numbers, words
from dndetr.counting.step import count_step
from dndetr.models.build import build_model

CANVAS, OBJECTS, CLASSES = (128, 128), 8, 3
H200 = GPUS["h200"]


def tiny(*flags):
    return train.parse(["--preset", "tiny", "--batch-size", "2", "--optimizer.ema", "0", *flags])


def total(config) -> dict:
    return numbers(*count_step(config, CANVAS, OBJECTS, CLASSES), H200)["total"]


@pytest.fixture(scope="module")
def plain():
    return count_step(tiny(), CANVAS, OBJECTS, CLASSES)


def test_stages_add_up(plain):
    operations, names = plain
    assert {each.stage for each in operations} <= set(names) and len(names) == len(set(names))
    found = numbers(operations, names, H200)
    for key, whole in found["total"].items():
        assert sum(stage[key] for stage in found["stages"].values()) == pytest.approx(whole, rel=1e-12)
    expected = {"backbone", "decoder", "matching", "losses", "backward of decoder", "optimizer", "everything else"}
    assert expected <= set(found["stages"]) and list(found["stages"]) == [n for n in names if n in found["stages"]]
    assert len(found["dearest"]) == DEAREST
    seconds = [each["seconds"] for each in found["dearest"]]
    assert seconds == sorted(seconds, reverse=True) and sum(seconds) < found["total"]["seconds"]


def test_products_come_twice_in_backward(plain):
    """One for each factor, but for the first layers of what is frozen."""
    found = numbers(*plain, H200)["stages"]
    for part in ("decoder", "backbone"):
        ratio = found[f"backward of {part}"]["flop"] / found[part]["flop"]
        assert 1.7 < ratio <= 2
    assert found["optimizer"]["flop"] == found["matching"]["flop"] == 0


def test_the_optimizer_reads_and_writes_every_parameter(plain):
    """Weight and two averages there and back, the gradient there, and a step and learning rates."""
    with torch.device("meta"):
        model = build_model(tiny().model, CLASSES)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    (adamw,) = {each.name for each in plain[0] if each.name.startswith("_fused")}
    moved = sum(each.bytes for each in plain[0] if each.name == adamw)
    assert 28 * trained <= moved < 28.1 * trained


def test_twice_the_images_are_twice_the_operations(plain):
    one = numbers(*plain, H200)["total"]
    two = total(replace(tiny(), batch_size=4))
    assert two["flop"] == pytest.approx(2 * one["flop"], rel=1e-3) and two["kernels"] >= one["kernels"]
    accumulated = total(tiny("--accumulate", "2"))
    assert accumulated["flop"] == 2 * one["flop"] and accumulated["kernels"] > 1.5 * one["kernels"]


def test_what_is_left_out_is_not_counted(plain):
    one = numbers(*plain, H200)["total"]
    assert total(tiny("--denoising.groups", "0"))["flop"] < one["flop"]
    assert total(tiny("--model.one-to-many", "30"))["flop"] > one["flop"]
    averaged = total(tiny("--optimizer.ema", "0.99"))
    assert averaged["kernels"] > one["kernels"] and averaged["flop"] == one["flop"]


def test_fused_ops_save_kernels_and_bytes(plain, monkeypatch):
    monkeypatch.setenv("DNDETR_BACKEND_ADD_NORM", "reference")
    one, apart = numbers(*plain, H200)["total"], total(tiny())
    assert apart["kernels"] > one["kernels"] and apart["bytes"] > one["bytes"]


def test_gradients_of_one_of_several_processes_come_while_backward_runs(plain):
    """Each parameter's once, and not all at the end; weights are lowered one by one, with the same operations."""
    arrived = []
    operations, _ = count_step(tiny(), CANVAS, OBJECTS, CLASSES, lambda *told: arrived.append(told))
    with torch.device("meta"):
        model = build_model(tiny().model, CLASSES)
    assert len({id(parameter) for parameter, _ in arrived}) == len(arrived)
    shapes = sorted(tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad)
    assert sorted(tuple(parameter.shape) for parameter, _ in arrived) == shapes
    places = [place for _, place in arrived]
    stages = [each.stage for each in operations]
    first = next(place for place, stage in enumerate(stages) if "backward" in stage)
    assert places == sorted(places) and first < places[0] and places[-1] <= stages.index("optimizer")
    assert places[len(places) // 2] - first < 0.8 * (places[-1] - first)
    alone = numbers(*plain, H200)["total"]
    shared = numbers(operations, sorted(set(stages)), H200)["total"]
    assert shared["flop"] == alone["flop"] and shared["kernels"] > alone["kernels"]


@pytest.mark.parametrize("flags", [("--model.checkpointing",), ("--precision", "float32")])
def test_what_cannot_be_counted_is_refused(flags):
    with pytest.raises(ValueError, match=flags[0]):
        count_step(tiny(*flags), CANVAS, OBJECTS, CLASSES)


def test_words_have_every_stage(plain):
    found = numbers(*plain, H200)
    lines = words(found)
    assert [line.split("  ")[0] for line in lines[1 : len(found["stages"]) + 2]] == [*found["stages"], "total"]
    assert len(lines) == len(found["stages"]) + 4 + DEAREST


def test_only_cards_of_the_table_have_names():
    with pytest.raises(ValueError, match="--gpu h100x: choose one of h200, h100, a100, rtx-4090"):
        gpu_named("h100x")
    assert [name for name, card in GPUS.items() if card.source == "measured"] == ["h200"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small", "dn-detr-r50", "dn-deformable-detr-r50", "dino-r50"])
def test_every_kind_of_detector(preset):
    operations, names = count_step(train.parse(["--preset", preset, "--batch-size", "1"]), (256, 320), 20, 91)
    found = numbers(operations, names, H200)
    assert found["total"]["kernels"] > 500 and found["stages"]["matching"]["kernels"] >= 1
