"""Running out of memory: one line that describes the batch and says what to lower, and an intact checkpoint."""

import os
import subprocess
import sys
from dataclasses import replace

import detectors
import goldens
import pytest
import torch
from short_runs import short_run

from dndetr.presets import PRESETS
from dndetr.training.memory import OutOfMemory, explain_memory, is_out_of_memory
from dndetr.training.step import TrainStep

BATCH = detectors.make_batch([3, 1], 16, canvas=(64, 96))
# One step and its checkpoint, then an address space without room for another: what the allocator kept is taken too.
LIMITED = """
import resource, sys
import torch
from dndetr import train
from dndetr.runs.console import Console
taken = []
def limit(self, path, step):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20),) * 2)
    try:
        while True:
            taken.append(torch.empty(4 << 20, dtype=torch.uint8))
    except RuntimeError:
        pass
Console.checkpoint_saved = limit
sys.exit(train.main(sys.argv[1:]))
"""


def explained(error: BaseException, config) -> str:
    with pytest.raises(OutOfMemory) as raised, explain_memory([BATCH], config, lambda slots: 64 // slots):
        raise error
    return str(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("could not create a primitive"),
    ],
    ids=["gpu", "python", "cpu", "cublas", "onednn"],
)
def test_the_batch_is_described_and_every_remedy_named(error):
    message = explained(error, replace(PRESETS["dn-detr-r50"](), data="coco"))
    assert (
        "2 images on a canvas of 64x96, room for 16 objects in each, 64 denoising queries (4 groups) beside 300"
        in message
    )
    for remedy in (
        "--batch-size 8 --accumulate 2",
        "--model.checkpointing",
        "--images.sizes and --images.max-size",
        "--denoising.max-queries below 64",
        "the last checkpoint is intact",
    ):
        assert remedy in message


def test_a_second_set_of_queries_is_named():
    config = PRESETS["dn-detr-r50"]()
    message = explained(MemoryError(), replace(config, model=replace(config.model, one_to_many=1500)))
    assert "beside 300 and 1500 one-to-many; try" in message and "--model.one-to-many below 1500" in message


def test_what_is_already_low_is_not_named():
    config = PRESETS["tiny"]()
    config = replace(config, batch_size=1, model=replace(config.model, checkpointing=True))
    message = explained(MemoryError(), config)
    assert "--batch-size" not in message and "--model.checkpointing" not in message and "--images" not in message


def test_the_flags_that_are_named_exist(capsys):
    from dndetr import train

    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    flags = "batch-size accumulate init model.checkpointing images.canvas images.sizes images.max-size"
    for flag in (*flags.split(), "denoising.max-queries"):
        assert f"--{flag} " in text or f"--{flag}," in text


def test_other_errors_pass_through():
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    with (
        pytest.raises(RuntimeError, match="shapes do not fit"),
        explain_memory([BATCH], PRESETS["tiny"](), lambda _: 0),
    ):
        raise RuntimeError("shapes do not fit")


def test_the_checkpoint_survives(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    step, calls = TrainStep.__call__, []

    def starved(self, *batches):
        calls.append(batches)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *batches)

    monkeypatch.setattr(TrainStep, "__call__", starved)
    with pytest.raises(OutOfMemory, match="--batch-size 2 --accumulate 2"):
        short_run(tmp_path / "run", "--checkpoint-every", "1")
    monkeypatch.undo()
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 1


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux to limit a process's memory")
def test_a_process_that_runs_out_ends_with_one_line(tmp_path):
    few = [
        "--epochs",
        "1",
        "--train-images",
        "128",
        "--val-images",
        "4",
        "--checkpoint-every",
        "1",
        "--batch-size",
        "64",
    ]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *few, "--quiet", "--output", "run"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(goldens.ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: out of memory: 64 images on a canvas of 128x128"), done.stderr
    assert done.stderr.count("\n") == 1
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 1


def test_an_evaluation_that_runs_out_is_explained_too(tmp_path, monkeypatch):
    def starved(self, *_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr("dndetr.models.dn_detr.DNDETR.infer", starved)
    with pytest.raises(OutOfMemory, match=r"images on a canvas of .*--batch-size"):
        short_run(tmp_path / "run")
