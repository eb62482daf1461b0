"""Which run a start goes on with, what it may change, and how other numbers of processes share its steps."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from short_runs import SMALL, TORCHRUN, environment, stopped_after, without_pictures

from dndetr import fit, train
from dndetr.config import Config
from dndetr.presets import preset_named
from dndetr.runs.checkpoint import demand_continuable
from dndetr.runs.folder import hold
from dndetr.runs.run_log import read_rows
from dndetr.training.resuming import Origin, asked_for, demand_same, shared_anew

FEW = [*SMALL, "--data", "shapes", "--epochs", "2", "--batch-size", "2", "--train-images", "12", "--val-images", "4"]
AUTO = [*FEW, "--log-every", "1", "--checkpoint-every", "2", "--quiet", "--output", "run", "--resume", "auto"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    with without_pictures():
        yield


def weights(folder: str) -> dict:
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)["ema"]


def origin(size: int, accumulate: int, processes: int) -> Origin:
    config = replace(preset_named("tiny"), batch_size=size, accumulate=accumulate)
    return Origin(config, asked_for(config), processes)


def test_the_same_command_starts_goes_on_and_finds_the_run_finished(capsys):
    with stopped_after(5):
        train.run(AUTO)
    train.run(AUTO)
    restarts = [row for row in read_rows("run/metrics.jsonl") if row["event"] == "restart"]
    assert [row["step"] for row in restarts] == [5] and restarts[0]["message"] == "goes on from step 5"
    train.run([*AUTO[:-4], "--output", "whole"])
    assert all(torch.equal(value, weights("run")[name]) for name, value in weights("whole").items())
    capsys.readouterr()
    train.run(AUTO)
    assert capsys.readouterr().out == "run is finished: 12 of 12 steps are done\n"
    assert [row for row in read_rows("run/metrics.jsonl") if row["event"] == "restart"] == restarts


def test_what_the_log_had_beyond_the_checkpoint_is_told():
    with stopped_after(5):
        train.run(AUTO)
    with open("run/metrics.jsonl", "a") as log:
        log.write('{"event": "train", "step": 7}\n')
    train.run(AUTO)
    (restart,) = [row for row in read_rows("run/metrics.jsonl") if row["event"] == "restart"]
    assert restart["message"] == "goes on from step 5; the log had come to step 7"


def test_a_folder_that_was_killed_before_its_first_checkpoint_is_started_in():
    Path("run").mkdir()
    Path("run", ".checkpoint.pt.12.ab.tmp").touch()
    assert train.run(AUTO) == Path("run")


def test_another_configuration_is_refused_with_the_difference(capsys):
    with stopped_after(3):
        train.run(AUTO)
    saved = Path("run/checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert train.main([*AUTO, "--lr", "0.003", "--denoising.groups", "7"]) == 1
    error = capsys.readouterr().err
    assert "run was started with other settings: --lr is 0.004 there and 0.003 here; --denoising.groups is 3" in error
    assert error.count("\n") == 1 and Path("run/checkpoint.pt").read_bytes() == saved
    assert train.main([*AUTO, "--preset", "small"]) == 1
    assert "--preset is tiny there and small here" in (error := capsys.readouterr().err) and " more: give" in error
    # Where and how loudly it runs may change.
    train.run([*AUTO, "--workers", "1", "--device", "cpu", "--mode", "eager"])


def test_every_setting_is_compared_but_those_that_may_change():
    asked = asked_for(Config(data="shapes"))
    other = asked_for(Config(data="elsewhere", workers=3, quiet=True, output="there", resume="auto"))
    demand_same(other, asked, Path("run"))
    with pytest.raises(ValueError, match=r"--images.canvas is 240 320 there and 64 64 here: give the same"):
        demand_same(asked_for(Config(images=replace(Config().images, canvas=(64, 64)))), asked, Path("run"))
    # A setting of a version that has more of them.
    with pytest.raises(ValueError, match=r"--loss.new is None there and 1 here"):
        demand_same(asked | {"loss": asked["loss"] | {"new": 1}}, asked, Path("run"))


def test_auto_needs_a_folder(capsys):
    assert train.main([*FEW, "--resume", "auto"]) == 1
    assert "--resume auto needs --output RUN" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_foreign_folder_is_not_started_in(capsys):
    Path("run").mkdir()
    Path("run", "thesis.tex").touch()
    assert train.main(AUTO) == 1
    assert "run exists and is not empty" in capsys.readouterr().err


def test_a_start_that_another_was_faster_than_says_so(capsys, monkeypatch):
    """Both find nothing; when one comes to make the folder, the other has."""
    train.run(AUTO[:-2])
    monkeypatch.setattr("dndetr.training.resuming.find", lambda *_: None)
    capsys.readouterr()
    assert train.main(AUTO) == 1
    said = "error: --output run: another start of this run was faster: give the command again, which waits for it\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("ap", "status"), [(0.93, 0), (0.41, 1)])
def test_a_finished_run_keeps_its_verdict(ap, status):
    """Restarted by itself, one that has not learnt its images by heart has not learnt them now."""
    command = [*SMALL, "--data", "shapes", "--overfit", "2", "--epochs", "1", "--max-steps-per-epoch", "2", "--quiet"]
    command += ["--output", "run", "--resume", "auto"]
    assert train.main(command) == 1
    log = Path("run/metrics.jsonl")
    rows = [row | ({"AP": ap} if row["event"] == "eval" else {}) for row in read_rows(log)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train.main(command) == status


def test_from_python():
    settings = {"epochs": 1, "batch_size": 2, "train_images": 4, "val_images": 2, "output": "run", "resume": "auto"}
    small = {"images": {"canvas": (64, 64)}, "model": {"width": 32, "hidden": 64, "decoder_layers": 1, "queries": 8}}
    first = fit("shapes", quiet=True, **settings, **small)
    again = fit("shapes", quiet=True, **settings, **small)
    assert first.folder == again.folder == Path("run") and again.status == "finished"


def test_a_folder_that_is_still_held_is_waited_for(capsys):
    Path("run").mkdir()
    holding = "import time; from dndetr.runs.folder import hold\nwith hold('run'): print(flush=True); time.sleep(1)"
    with subprocess.Popen([sys.executable, "-c", holding], env=environment(), stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="is being trained by another process"), hold("run"):
            pass
        with hold("run", seconds=30):
            assert other.poll() is not None or other.wait(5) == 0
    told = "run is being trained by another process: waiting for its end, for up to 30 s\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("started", "world", "expected"),
    [
        ((2, 1, 8), 8, (2, 1)),
        ((2, 1, 8), 4, (2, 2)),
        ((2, 1, 8), 1, (2, 8)),
        ((2, 1, 8), 16, (1, 1)),
        ((4, 1, 4), 8, (2, 1)),
        ((4, 3, 2), 3, (4, 2)),
        ((3, 2, 4), 6, (2, 2)),  # 4 a process, not more than 3 at once
        ((5, 1, 3), 5, (3, 1)),
    ],
)
def test_another_number_of_processes_keeps_the_images_of_a_step(started, world, expected):
    config = shared_anew(origin(*started), world)
    assert (config.batch_size, config.accumulate) == expected
    assert config.batch_size * config.accumulate * world == started[0] * started[1] * started[2]


def test_what_cannot_be_shared_says_what_could():
    with pytest.raises(
        ValueError, match=r"16 images a step \(2 at once in each of its processes\), which 3 .* 1, 2, 4, 8, 16"
    ):
        shared_anew(origin(2, 1, 8), 3)


def losses(folder: str) -> list[tuple]:
    return [(row["step"], row["loss"]) for row in read_rows(f"{folder}/metrics.jsonl") if row["event"] == "train"]


def torchrun(*flags: str) -> subprocess.CompletedProcess:
    command = [*TORCHRUN, "-m", "dndetr.train", *flags]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def test_two_processes_go_on_with_a_run_of_one_and_back(capsys):
    """The images and the noise of a step are the same, so its loss is, up to the order of sums."""
    flags = [*FEW, "--model.backbone.norm", "group", "--log-every", "1", "--quiet"]
    train.run([*flags, "--accumulate", "2", "--output", "whole"])  # 3 steps an epoch
    with stopped_after(3):
        train.run([*flags, "--accumulate", "2", "--output", "shared"])
    done = torchrun("--resume", "shared", "--quiet", "--max-steps-per-epoch", "9")
    assert done.returncode != 0 and "leave out --max-steps-per-epoch" in done.stderr
    done = torchrun("--resume", "shared", "--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    for (step, loss), (other, expected) in zip(losses("shared"), losses("whole"), strict=True):
        assert step == other and loss == pytest.approx(expected, rel=2e-4)
    saved = torch.load("shared/checkpoint.pt", weights_only=True)
    assert saved["processes"] == 1 and saved["config"]["batch_size"] == 2 and saved["config"]["accumulate"] == 2


@pytest.mark.parametrize(
    ("step", "size", "told"),
    [(6, 3, None), (4, 2, None), (4, 1, "saved in the middle of epoch 1, and 4 processes would take batches of 1 ")],
)
def test_batches_change_at_an_epoch_s_end_alone(step, size, told):
    run = {"step": step, "epoch": step // 6, "rng": {}, "config": {"batch_size": 2}, "processes": 2}
    with pytest.raises(ValueError, match=told) if told else contextlib.nullcontext():
        demand_continuable(run, 4, size, 6, "data", 24)


def test_a_run_that_lies_elsewhere_is_not_started_anew(tmp_path):
    """As after a restart whose first process is on another machine, without a shared disk."""
    train.run([*AUTO[:-2]])
    script = "import os, sys; os.chdir(sys.argv[1 + int(os.environ['RANK'])]); from dndetr import train\n"
    script += "sys.exit(train.main(sys.argv[3:]))"
    Path("script.py").write_text(script)
    Path("empty").mkdir()
    command = [*TORCHRUN, "script.py", "empty", ".", *AUTO]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0 and "has a run there" in done.stderr and not any(Path("empty").iterdir())
    assert os.path.exists("run/checkpoint.pt")
