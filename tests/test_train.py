"""The train command, end to end on a few images."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import goldens
import pytest
import torch
from short_runs import SMALL, stopped_after, without_pictures

from dndetr import train
from dndetr.runs.folder import hold
from dndetr.shapes import write_shapes
from dndetr.training.criterion import Criterion
from dndetr.training.loss_window import Diverged
from dndetr.training.step import TrainStep

FEW = [*SMALL, *shlex.split("--epochs 2 --batch-size 4 --train-images 12 --val-images 6 --log-every 2 --quiet")]
FILES = {
    "config.json",
    "metrics.jsonl",
    "checkpoint.pt",
    "best.pt",
    "best.safetensors",
    "detections_val.json",
    "curves.png",
    "denoising.json",
    "denoising.png",
    "first_batch.png",
    "predictions.png",
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    if not request.node.get_closest_marker("pictures"):
        request.getfixturevalue("no_pictures")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed, for the tests that only look at it."""
    torch.set_num_threads(1)
    with without_pictures():
        return train.run([*FEW, "--output", str(tmp_path_factory.mktemp("whole") / "run")])


def rows(folder, event):
    with open(folder / "metrics.jsonl") as file:
        return [row for row in map(json.loads, file) if row["event"] == event]


@pytest.mark.pictures
def test_a_run_leaves_what_the_documentation_promises():
    folder = train.run(FEW)
    assert folder.name == "tiny-1" and {path.name for path in folder.iterdir()} == FILES
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert {"model", "ema", "optimizer", "scheduler", "rng", "step", "epoch", "config", "classes"} <= set(saved)
    assert (saved["step"], saved["epoch"]) == (6, 2)
    assert saved["config"] == json.loads(json.dumps(saved["config"]))
    assert json.loads((folder / "config.json").read_text())["epochs"] == 2
    trained, evaluated, ended = (rows(folder, event) for event in ("train", "eval", "end"))
    assert [row["step"] for row in trained] == [2, 3, 4, 6]
    assert [row["epoch"] for row in evaluated] == [1, 2] and {"AP", "AP50", "AP75"} <= set(evaluated[0])
    assert len(ended) == 1
    for row in trained:
        terms = [row[name] for name in ("label", "l1", "giou", "dn_label", "dn_l1", "dn_giou")]
        assert row["loss"] == pytest.approx(row["matching"] + row["denoising"], rel=1e-4)
        assert row["loss"] == pytest.approx(sum(terms), rel=1e-4)
    results = json.loads((folder / "detections_val.json").read_text())
    assert {"image_id", "category_id", "bbox", "score"} == set(results[0])
    with without_pictures():
        assert train.run([*FEW, "--max-steps-per-epoch", "1"]).name == "tiny-2"


def test_denoising_off_is_a_plain_switch():
    folder = train.run([*FEW, "--denoising.groups", "0"])
    assert all(row["denoising"] == 0 for row in rows(folder, "train"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.variant", "dn-detr", "--model.levels", "1", "--model.backbone.outputs", "3"],
        ["--model.variant", "dn-deformable-encoder", "--model.patterns", "2"],
        ["--model.backbone.norm", "group", "--model.levels", "3", "--optimizer.schedule", "multistep"],
        ["--precision", "float32", "--optimizer.ema", "0", "--denoising.padding", "official"],
        ["--precision", "bfloat16", "--model.anchors", "uniform", "--optimizer.schedule", "step"],
    ],
    ids=["dn-detr", "encoder-patterns", "group-norm", "float32", "bfloat16"],
)
def test_every_kind_of_model_trains(flags):
    folder = train.run([*FEW, "--max-steps-per-epoch", "1", *flags])
    assert [row["step"] for row in rows(folder, "train")] == [1, 2]


def test_the_first_lines_name_both_limits_of_the_groups(capsys):
    fill = ["--model.proposals", "selected", "--denoising.contrastive", "--denoising.fill", "200"]
    train.run([flag for flag in [*FEW, "--max-steps-per-epoch", "1", *fill] if flag != "--quiet"])
    assert ", up to 3 contrastive denoising groups of 200 queries together, " in capsys.readouterr().out


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_resuming_gives_the_weights_of_the_run_that_was_not_stopped(stop_after, whole):
    """Stopped by a signal in the middle of an epoch, of a log window, or at an epoch's end."""
    with stopped_after(stop_after):
        train.main([*FEW, "--output", "stopped"])
    assert torch.load("stopped/checkpoint.pt", weights_only=True)["step"] == stop_after
    resumed = train.run(["--resume", "stopped", "--quiet"])
    ends = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, resumed)]
    for part in ("model", "ema"):
        for name, value in ends[0][part].items():
            assert torch.equal(value, ends[1][part][name]), name
    compared = ("step", "loss", "grad_norm", "lr")
    logs = [[[row[key] for key in compared] for row in rows(folder, "train")] for folder in (whole, resumed)]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(goldens.ROOT)}
    program = [sys.executable, "-m", "dndetr.train"]
    # In a program of its own like the others: sums are cut up by the number of threads that torch was started with.
    subprocess.run([*program, *FEW, "--output", "whole"], env=environment, check=True)
    command = [*FEW, "--output", "killed", "--checkpoint-every", "2"]
    # Killed as soon as a file appears or changes: at the start, within an epoch, in the middle of writing.
    for watched in ("checkpoint.pt", "metrics.jsonl", "best.pt", "best.safetensors"):
        path = tmp_path / "killed" / watched
        before = path.stat().st_mtime_ns if path.exists() else None
        process = subprocess.Popen([*program, *command], env=environment, stderr=subprocess.PIPE)
        while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.005)
        process.kill()
        process.wait()
        command = ["--resume", "killed", "--quiet"]
    done = subprocess.run([*program, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "killed").iterdir()} == FILES
    ends = [torch.load(Path(folder) / "checkpoint.pt", weights_only=True)["ema"] for folder in ("whole", "killed")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    logs = [[(row["step"], row["loss"]) for row in rows(Path(folder), "train")] for folder in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert [row["epoch"] for row in rows(Path("killed"), "eval")] == [1, 2]


@pytest.mark.pictures
@pytest.mark.parametrize("part", ["draw_validation", "draw_curves"])
def test_a_run_that_dies_over_its_last_pictures_can_be_resumed(monkeypatch, part, whole):
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(f"dndetr.pictures.run.{part}", lambda *_, **__: 1 / 0)
        train.run([*FEW, "--output", "died"])
    died = train.run(["--resume", "died", "--quiet"])
    assert {path.name for path in died.iterdir()} == FILES
    (ended,) = rows(died, "end")
    assert ended["AP"] == rows(whole, "end")[0]["AP"]
    assert [row["step"] for row in rows(died, "eval")] == [row["step"] for row in rows(whole, "eval")]


def test_resuming_a_finished_run_says_so(capsys, whole):
    shutil.copytree(whole, "done")
    assert train.main(["--resume", "done"]) == 0
    assert "done is finished: 6 of 6 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "huge"], "--preset huge: choose one of tiny, small"),
        (["--preset", "small"], "--preset small needs data: --data DIR"),
        (["--resume", "nowhere"], "no checkpoint at nowhere"),
        (["--data", "nowhere"], "nowhere"),
        (["--init", "nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["--device", "cuda"], "--device cuda: torch"),
        (["--batch-size", "100"], "too few for a batch of 100"),
        (["--epochs", "0"], "error: --epochs 0: give 1 or more"),
        (["--model.heads", "3"], "must be a multiple of 4 and of twice its heads, 3 ("),
        (["--val-share", "20%"], "--val-share 20%: give a number (python -m dndetr.train --help"),
        (["--batch-size", "all"], "--batch-size all: give a whole number or auto (python -m dndetr.train --help"),
        (["--lr", "abc"], "--lr: could not convert string to float: 'abc' (python -m dndetr.train --help"),
        (["--lr", "nan"], "--lr nan: give a positive number"),
        (["--seed", "-1"], "--seed -1: give 0 or more"),
        (["--seed", str(2**70)], "give 0 or more, below 2**62"),
        (["--preset", ""], "--preset : choose one of"),
        (["--preset", "tiny", "--preset", "small"], "--preset small needs data"),
        (["--overfit", "x", "--overfit", "0"], "--overfit 0: give 1 or more"),
        (["--model.temperature", "inf", "20"], "--model.temperature (inf, 20.0): give finite numbers"),
        (["--optimizer.clip-norm", "inf"], "--optimizer.clip-norm inf: give finite numbers"),
        (["--device", "foo"], "--device foo: give auto, cpu, cuda or cuda:N"),
        (["--images.multiple", "0"], "--images.multiple 0: give 1 or more"),
        (["--images.canvas", "0", "0"], "--images.canvas (0, 0): give"),
        (["--optimizer.clip-norm", "-1"], "--optimizer.clip-norm -1.0: give a positive number"),
        (["--optimizer.ema", "2"], "--optimizer.ema 2.0: give 0 (off) to below 1"),
        (["--optimizer.drops", "0.8", "0.4"], "--optimizer.drops (0.8, 0.4): give ascending"),
        (["--model.decoder-layers", "0"], "--model.decoder-layers 0: give 1 or more"),
        (["--model.queries", "0"], "--model.queries 0: give 1 or more"),
        (["--model.levels", "1"], "--model.levels 1: the backbone gives 2 maps"),
        (
            ["--model.backbone.outputs", "5"],
            "--model.backbone.outputs (5,): give ascending numbers of stages from 1 to 3",
        ),
        (["--lrr", "1"], "Unrecognized options: --lrr"),
    ],
    ids=lambda value: "_".join(value).strip("-") if isinstance(value, list) else "",
)
def test_mistakes_are_one_plain_line_and_leave_nothing(flags, message, tmp_path, capsys):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert train.main([*FEW, *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_run_that_goes_on_is_not_resumed_beside_it(capsys):
    with stopped_after(3):
        train.main([*FEW, "--output", "run"])
    log = Path("run/metrics.jsonl").read_bytes()
    capsys.readouterr()
    with hold("run"):
        assert train.main(["--resume", "run", "--quiet"]) == 1
    assert capsys.readouterr().err == "error: run is being trained by another process: wait for its end, or stop it\n"
    assert Path("run/metrics.jsonl").read_bytes() == log
    assert train.main(["--resume", "run", "--quiet"]) == 0


@pytest.mark.parametrize(("module", "buffered"), [("train", True), ("check_data", False)])
def test_output_that_nobody_reads_is_no_error(module, buffered):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", f"dndetr.{module}", "--help"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    done = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_training_goes_on_when_nobody_reads_along():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "dndetr.train", *FEW[:-1], "--max-steps-per-epoch", "1", "--output", "run"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in Path("run").iterdir()} == FILES


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("DNDETR_BACKEND", "quick", " has no backend 'quick', choose one of auto, reference"),
        ("DNDETR_BACKEND_MATCH", "triton", "DNDETR_BACKEND_MATCH: match has no backend 'triton'"),
        ("DNDETR_BACKEND_ASIGN", "cpp", "DNDETR_BACKEND_ASIGN: there is no such op, only "),
    ],
)
def test_wrong_variables_are_told_before_anything_is_written(monkeypatch, tmp_path, capsys, variable, value, told):
    monkeypatch.setenv(variable, value)
    assert train.main(FEW) == 1
    assert told in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_run_of_captured_steps_goes_on_where_nothing_can_be_captured(capsys):
    with stopped_after(3):
        train.main([*FEW, "--output", "run"])
    saved = torch.load("run/checkpoint.pt", weights_only=True)
    saved["config"]["mode"] = "graph"
    torch.save(saved, "run/checkpoint.pt")
    capsys.readouterr()
    assert train.main(["--resume", "run", "--device", "cpu"]) == 1
    assert "use --mode eager" in capsys.readouterr().err
    assert train.main(["--resume", "run", "--device", "cpu", "--mode", "eager", "--quiet"]) == 0
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 6


def test_shapes_are_chosen_for_captured_steps_alone_and_told_in_one_line(monkeypatch, tmp_path, capsys):
    write_shapes(tmp_path / "data", train=6, val=2)
    flags = ["--data", str(tmp_path / "data"), "--epochs", "1", "--batch-size", "2", "--images.recipe", "official"]
    flags += ["--images.sizes", "48", "96", "--images.max-size", "120", "--images.eval-size", "64", "--images.augment"]
    assert train.main([*flags, "--output", "eager"]) == 0
    assert "of batches (heights" not in capsys.readouterr().out
    monkeypatch.setattr("dndetr.training.trainer.pick_mode", lambda name, device, world: "graph")
    monkeypatch.setattr("dndetr.training.build.GraphedStep", TrainStep)  # there is no GPU
    trained = []
    call = TrainStep.__call__
    monkeypatch.setattr(
        TrainStep, "__call__", lambda self, *batches: trained.append((self, batches)) or call(self, *batches)
    )
    assert train.main([*flags, "--output", "graph"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "of batches (heights" in line]
    assert len(told) == 1 and told[0].startswith("CUDA graphs: ")
    assert len(trained) == 3
    for step, (batch,) in trained:
        assert (*batch.canvas, batch.targets.labels.shape[1]) in step.expected


def test_resume_refuses_to_change_the_run(capsys):
    train.run([*FEW, "--output", "run"])
    assert train.main(["--resume", "run", "--lr", "1"]) == 1
    assert "leave out --lr" in capsys.readouterr().err
    assert train.main(["--resume", "run/best.pt"]) == 1
    assert "not the state of the training" in capsys.readouterr().err


def test_resuming_on_other_data_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_shapes(tmp_path / "own", train=4, val=2)
    write_shapes(tmp_path / "other", train=12, val=2)
    flags = ["--data", "own", "--epochs", "2", "--batch-size", "4", "--quiet"]
    train.run([*flags, "--output", "run"])
    assert train.main(["--resume", "run", "--data", "other"]) == 1
    error = capsys.readouterr().err
    assert "other: its 12 training images make 3 steps" in error and "2 steps in 2 whole epochs" in error


def test_an_existing_output_is_never_overwritten(capsys):
    train.run([*FEW, "--output", "run"])
    before = {path.name: path.stat().st_mtime_ns for path in Path("run").iterdir()}
    assert train.main([*FEW, "--output", "run"]) == 1
    assert "--resume run" in capsys.readouterr().err
    assert before == {path.name: path.stat().st_mtime_ns for path in Path("run").iterdir()}


def test_a_loss_that_is_not_finite_names_step_term_and_layer(monkeypatch):
    def poisoned(self, *inputs):
        losses = original(self, *inputs)
        steps.append(None)
        if len(steps) == 5:
            losses.parts[1, 2] = float("nan")
            losses = losses._replace(total=losses.total * float("nan"))
        return losses

    original, steps = Criterion.forward, []
    monkeypatch.setattr(Criterion, "forward", poisoned)
    with pytest.raises(Diverged, match=r"not finite at step 5: giou of layer 2 \(image ids \d+, \d+, \d+, \d+\)"):
        train.run([*FEW, "--checkpoint-every", "5"])
    assert torch.load("runs/tiny-1/checkpoint.pt", weights_only=True)["step"] == 3


def test_the_module_runs_as_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dndetr.train", *FEW[:-1], "--max-steps-per-epoch", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(goldens.ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "run folder: runs/tiny-1" in done.stdout and "circle" in done.stdout


@pytest.mark.slow
def test_real_data_with_pretrained_weights():
    data = goldens.SHARED / "data" / "coco_tiny"
    weights = goldens.SHARED / "weights" / "resnet18_imagenet_to_layer3.pt"
    if not (data.is_dir() and weights.is_file()):
        pytest.skip(f"no data at {data} (set DNDETR_SHARED)")
    flags = ["--preset", "small", "--data", str(data), "--init", str(weights), "--max-steps-per-epoch", "2"]
    folder = train.run([*flags, "--epochs", "1", "--quiet"])
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len(saved["classes"]) == 80 and saved["classes"][-1] == [90, "toothbrush"]
    start = torch.load(weights, weights_only=True)
    torch.testing.assert_close(saved["model"]["backbone.conv1.weight"], start["conv1.weight"])


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    flags = "preset data output resume init epochs max-steps-per-epoch batch-size lr seed workers device"
    for flag in [*flags.split(), "denoising.groups", "model.backbone.norm"]:
        assert f"--{flag} " in text
