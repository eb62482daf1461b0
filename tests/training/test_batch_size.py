"""``--batch-size auto``: what is chosen from what was measured, and runs that measure."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from short_runs import stopped_after, write_pictures

from dndetr import profile, train
from dndetr.config import Config, DenoisingConfig
from dndetr.data.batch_shapes import dearest_slots
from dndetr.data.training import TrainingData
from dndetr.models.dn_detr import DNDETR
from dndetr.presets import PRESETS
from dndetr.runs.run_log import read_rows
from dndetr.training import batch_size
from dndetr.training.batch_size import largest_that_fits, with_fitting_batch
from dndetr.training.distributed import Processes
from dndetr.training.step import TrainStep

FEW = ["--epochs", "1", "--train-images", "32", "--val-images", "4", "--log-every", "1", "--quiet"]
SIZES = (1, 2, 4, 8, 16)
GIB = 2**30


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def tried(room: float, fixed: int, bytes_of) -> tuple[dict[int, int], list[int]]:
    """What fits, and which sizes were measured."""
    sizes = []
    found = largest_that_fits(SIZES, lambda size: sizes.append(size) or bytes_of(size), room, fixed)
    return found, sizes


def test_the_largest_that_fits_is_the_last_that_is_measured():
    found, sizes = tried(room=50, fixed=10, bytes_of=lambda size: 10 + 5 * size)
    assert found == {1: 15, 2: 20, 4: 30, 8: 50} and sizes == [1, 2, 4, 8]


def test_where_there_is_room_all_are_measured():
    assert tried(room=1000, fixed=10, bytes_of=lambda size: 10 + 5 * size)[1] == list(SIZES)


def test_what_takes_more_than_expected_is_not_taken():
    found, sizes = tried(room=50, fixed=10, bytes_of=lambda size: 10 + 5 * size + 20 * (size == 8))
    assert [*found] == [1, 2, 4] and sizes == [1, 2, 4, 8]


def test_memory_that_runs_out_ends_the_search():
    found, sizes = tried(room=1000, fixed=0, bytes_of=lambda size: None if size > 2 else size)
    assert [*found] == [1, 2] and sizes == [1, 2, 4]


def test_a_model_that_does_not_fit_is_not_tried():
    assert tried(room=50, fixed=60, bytes_of=lambda size: 1) == ({}, [])


def logged(*flags: str) -> list[tuple]:
    """Losses of a run."""
    folder = train.run([*FEW, *flags])
    return [(row["step"], row["loss"], row["lr"]) for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def test_it_is_the_run_with_these_numbers(monkeypatch):
    monkeypatch.setattr(batch_size, "_peak", measured := Peaks(0.5))
    monkeypatch.setattr(batch_size, "_free_on_host", lambda: 3 * GIB)
    found = logged("--batch-size", "auto", "--output", "auto")
    assert measured.sizes == [1, 2, 4]  # 8 would take more than nine tenths of 3
    assert found == logged("--batch-size", "4", "--accumulate", "4") and len(found) == 2
    saved = torch.load("auto/checkpoint.pt", weights_only=True)["config"]
    assert (saved["batch_size"], saved["accumulate"]) == (4, 4)


class Peaks:
    """Does the work, which takes so many GiB for an image and no memory but that; keeps the sizes."""

    def __init__(self, gib: float):
        self.gib, self.sizes = gib, []

    def __call__(self, device, work) -> int:
        images = []

        def noting(step, *batches):
            images.append(len(batches[0].ids))
            return call(step, *batches)

        call = TrainStep.__call__
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(TrainStep, "__call__", noting)
            work()
        assert len(images) == 2 and images[0] == images[1], "the optimiser's state is there in the second step"
        self.sizes.append(images[0])
        return int(self.gib * GIB * images[0])


def test_memory_that_runs_out_in_a_step_is_found_and_said(monkeypatch, capsys):
    def limited(self, *batches):
        if len(batches[0].ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return call(self, *batches)

    call = TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", limited)
    flags = [flag for flag in FEW if flag != "--quiet"]
    assert train.main([*flags, "--batch-size", "auto", "--max-steps-per-epoch", "1", "--output", "run"]) == 0
    assert "--batch-size auto: --batch-size 2 --accumulate 8, 0." in (out := capsys.readouterr().out)
    assert "on a canvas of 128x128 with room for 8 objects" in out


def test_a_run_that_goes_on_does_not_measure_again(monkeypatch):
    monkeypatch.setattr(batch_size, "_peak", lambda device, work: GIB)
    with stopped_after(1):
        train.main([*FEW, "--batch-size", "auto", "--output", "run"])
    monkeypatch.setattr(batch_size, "_try_out", lambda *_: 1 / 0)
    assert train.main(["--resume", "run", "--quiet"]) == 0


def test_where_nothing_fits_nothing_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(batch_size, "_free_on_host", lambda: 10_000_000)
    assert train.main([*FEW, "--batch-size", "auto"]) == 1
    error = capsys.readouterr().err
    assert "--batch-size auto: a step of one image on a canvas of 128x128 with room for 8 objects does not fit" in error
    assert error.count("\n") == 1 and not any(tmp_path.iterdir())


def test_a_gpu_is_asked_for_its_own_memory(monkeypatch):
    """Ten images of a GiB each are free, and more than five run out."""
    peak, emptied = [0], []

    def try_out(config, size, *_):
        peak[0] = size * GIB
        if size > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(batch_size, "pick_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(batch_size, "_try_out", try_out)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(None))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: peak[0])
    config = replace(PRESETS["tiny"](), batch_size="auto", val_images=2, train_images=64)
    chosen, line = with_fitting_batch(config, Processes({}))
    assert (chosen.batch_size, chosen.accumulate) == (4, 4) and "4.0 of 10.0 GiB" in line
    assert len(emptied) == 2 * len((1, 2, 4, 8))
    assert chosen == replace(config, batch_size=4, accumulate=4)


def test_all_processes_take_what_the_poorest_can(monkeypatch):
    monkeypatch.setattr(batch_size, "_peak", lambda device, work: GIB)
    monkeypatch.setattr(Processes, "gather", lambda self, mine: [mine, (2, 1.0, 3.0)])
    config = replace(PRESETS["tiny"](), batch_size="auto", val_images=2, train_images=64)
    chosen, line = with_fitting_batch(config, Processes({}))
    assert (chosen.batch_size, chosen.accumulate) == (2, 8) and "1.0 of 3.0 GiB" in line


def test_few_images_are_no_step_of_the_recipe(monkeypatch, capsys):
    monkeypatch.setattr(batch_size, "_try_out", lambda *_: None)
    assert train.main([*FEW, "--train-images", "15", "--batch-size", "auto"]) == 1
    error = capsys.readouterr().err
    assert "--batch-size auto: the preset's step of 16 images needs more than" in error and "(15 for each" in error
    config = replace(PRESETS["tiny"](), batch_size="auto", val_images=2, train_images=16)
    chosen = with_fitting_batch(config, Processes({}))[0]
    assert (chosen.batch_size, chosen.accumulate) == (16, 1)
    config = replace(PRESETS["tiny"](), batch_size="auto", val_images=2, train_images=16, overfit=3)
    chosen = with_fitting_batch(config, Processes({}))[0]
    assert (chosen.batch_size, chosen.accumulate) == (3, 1)  # as --overfit 3 alone has it


@pytest.mark.parametrize("batches", [1, 2])
def test_a_trial_is_a_step_and_a_prediction_that_leave_no_trace(monkeypatch, batches):
    seen = []

    def noting(name, call):
        return lambda self, *given: seen.append((name, len(given) if name == "step" else None)) or call(self, *given)

    monkeypatch.setattr(TrainStep, "__call__", noting("step", TrainStep.__call__))
    monkeypatch.setattr(DNDETR, "infer", noting("infer", DNDETR.infer))
    config = replace(PRESETS["tiny"](), batch_size=1, accumulate=2 * batches, train_images=4, val_images=2)
    shape = TrainingData(config).largest_shape()
    drawn = torch.random.get_rng_state()
    batch_size._try_out(config, 2, shape, 6, torch.device("cpu"), Processes({}))
    assert torch.equal(drawn, torch.random.get_rng_state()) and shape == (128, 128, 8)
    assert seen == [("step", batches)] * 2 + [("infer", None)]


def test_the_process_s_own_peak_is_seen_and_forgotten():
    held = torch.ones(16 << 20)  # 64 MiB that stay
    taken = [batch_size._peak(torch.device("cpu"), lambda mib=mib: torch.ones(mib << 18).sum()) for mib in (400, 80)]
    assert [round(size / 2**20, -1) for size in taken] == [400, 80] and held.sum() > 0


@pytest.mark.parametrize(("limit", "free"), [("max", 8 * GIB), (str(3 * GIB), 2 * GIB), (str(90 * GIB), 8 * GIB)])
def test_a_container_has_what_it_was_given(monkeypatch, limit, free):
    texts = {"/proc/meminfo": f"MemAvailable:  {8 << 20} kB\n", "/sys/fs/cgroup/memory.max": f"{limit}\n"}
    monkeypatch.setattr(batch_size, "_resident", lambda: GIB)
    monkeypatch.setattr(Path, "exists", lambda self: str(self) in texts)
    monkeypatch.setattr(Path, "read_text", lambda self: texts[str(self)])
    assert batch_size._free_on_host() == free


def test_memory_that_cannot_be_measured_is_said(monkeypatch, capsys):
    def refused(self, text):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "write_text", refused)
    assert train.main([*FEW, "--batch-size", "auto"]) == 1
    assert "--batch-size auto: memory cannot be measured here (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "canvas"),
    [("fixed", (240, 320)), ("original", (140, 180)), ("official", None)],
)
def test_the_canvas_holds_every_image(tmp_path, recipe, canvas):
    config = replace(PRESETS["small"](), data=str(write_pictures(tmp_path / "data")), batch_size=2)
    images = replace(config.images, recipe=recipe, sizes=(48, 96), max_size=120, multiple=20)
    data = TrainingData(replace(config, images=images))
    shape = data.largest_shape()
    assert canvas is None or shape[:2] == canvas
    batches = list(itertools.chain(*(data.training(epoch) for epoch in range(8))))
    for side in (0, 1):
        assert max(batch.canvas[side] for batch in batches) <= shape[side]


@pytest.mark.parametrize(
    ("settings", "objects", "slots"),
    [
        ({"groups": 5, "max_queries": 1000}, 3, 8),
        ({"groups": 5, "max_queries": 1000}, 400, 256),  # three groups of 256, one of 512
        ({"groups": 100, "contrastive": True, "fill": 200}, 60, 32),  # six of 16, three of 32, one of 64
        ({"groups": 5, "slots": "batch"}, 7, 7),
        ({"groups": 0}, 70, 128),
        ({"groups": 1, "max_queries": 5000}, 9000, 512),
    ],
)
def test_the_slots_that_cost_most(settings, objects, slots):
    assert dearest_slots(objects, DenoisingConfig(**settings)) == slots


def test_it_excludes_a_number_of_batches():
    with pytest.raises(ValueError, match="--batch-size auto chooses --accumulate too: leave that out"):
        Config(batch_size="auto", accumulate=4)


@pytest.mark.parametrize("flags", [["--count"], []])
def test_a_profile_wants_a_number(flags, capsys):
    assert profile.main([*flags, "--batch-size", "auto"]) == 1
    assert "--batch-size auto: only training measures what fits; give a number" in capsys.readouterr().err
