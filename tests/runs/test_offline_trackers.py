"""TensorBoard, W&B and MLflow show one run that was stopped and resumed, each read back by its own reader, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from goldens import ROOT
from PIL import Image
from short_runs import short_run, stopped_after
from wandb_files import items, offline_records

from dndetr import train
from dndetr.runs.listener import Listener, Run
from dndetr.runs.run_log import read_rows
from dndetr.runs.tracker import class_table, numbers
from dndetr.scoring.coco import STATISTICS

for package in ("tensorboard", "wandb", "mlflow", "accelerate"):
    pytest.importorskip(package)

PICTURES = {"first_batch": 0, "predictions": 4, "curves": 4, "denoising": 4}  # by name, the step that they are of


class SmallPictures(Listener):
    """As large a file of each name as a test needs."""

    def run_started(self, run: Run) -> None:
        self._folder = run.folder

    def first_batch(self, batch, noised) -> None:
        self._draw("first_batch")

    def run_ended(self, how: str, reason: str, row: dict) -> None:
        if how == "finished":
            for name in ("predictions", "curves", "denoising"):
                self._draw(name)

    def _draw(self, name: str) -> None:
        Image.new("RGBA", (6, 4), (10 * len(name), 0, 0, 255)).save(self._folder / f"{name}.png")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which all trackers keep what is theirs; none may ask the network."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
            patch.setenv(name, str(home / name))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("MLFLOW_TRACKING_URI", f"file:{home / 'mlflow'}")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("LOCAL_RANK", "0")  # as torchrun leaves it to a single process
        yield home


@pytest.fixture(scope="module")
def run(home):
    """The folder of a run of four steps, stopped after the third."""
    from accelerate import PartialState

    flags = ["--tracker", "tensorboard", "wandb", "mlflow", "--project", "cells", "--log-every", "1", "--epochs", "2"]
    with mock.patch("dndetr.training.listeners.Pictures", SmallPictures):
        with stopped_after(3):
            short_run(home / "stopped-1", *flags, pictures=True)
        first = json.loads((home / "stopped-1" / "trackers.json").read_text())
        run = train.run(["--resume", str(home / "stopped-1")])
    assert {name: entry["step"] for name, entry in first.items()} == {"wandb": 3, "mlflow": 3}
    second = json.loads((run / "trackers.json").read_text())
    assert {name: entry["run"] for name, entry in first.items()} == {
        name: entry["run"] for name, entry in second.items()
    }
    assert PartialState._shared_state == {} and not torch.distributed.is_initialized()
    return run


@pytest.fixture(scope="module")
def rows(run):
    rows = read_rows(run / "metrics.jsonl")
    assert [row["event"] for row in rows] == ["train", "train", "eval", "train", "train", "eval", "end"]
    return rows[:-1]


@pytest.fixture(scope="module")
def logged(rows) -> dict[str, list[tuple[int, float]]]:
    """What the log says, as trackers name it: by name, (step, value)."""
    found: dict[str, list] = {}
    for row in rows:
        for name, value in numbers(row).items():
            found.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    assert {"train/loss", "train/lr", "eval/AP", "eval/AP of circle"} < found.keys()
    return found


def final(rows) -> dict[str, float]:
    known = {name: rows[-1][name] for name in STATISTICS if rows[-1][name] is not None}
    assert "AP" in known and "AR100" in known
    return known


def test_tensorboard(run, rows, logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    tags = events.Reload().Tags()
    shown = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    assert {tag: shown[tag] for tag in logged} == logged
    assert {tag for tag in shown if tag not in logged} == {f"final/{name}" for name in final(rows)}
    pictures = {tag: [(event.step, event.width) for event in events.Images(tag)] for tag in tags["images"]}
    assert pictures == {name: [(step, 6)] for name, step in PICTURES.items()}
    (table,) = events.Tensors("classes/text_summary")
    best, ap = class_table(rows[-1])[0]
    assert f"| {best} | {ap:.3f} |" in table.tensor_proto.string_val[0].decode()
    (settings,) = (run / "tensorboard").glob("*/hparams.yml")
    assert "denoising.groups: 3\n" in settings.read_text()


def test_wandb(run, rows, logged):
    records = offline_records(run)
    starts = [record.run for record in records if record.HasField("run")]
    assert [(start.project, start.display_name) for start in starts] == [("cells", "stopped-1")] * 2
    assert len({start.run_id for start in starts}) == 1
    steps = [items(record.history.item) for record in records if record.HasField("history")]
    shown = {name: [(step["_step"], step[name]) for step in steps if name in step] for name in logged}
    assert shown == logged
    for name, place in PICTURES.items():
        (picture,) = [step for step in steps if any(key.startswith(f"{name}/") for key in step)]
        assert picture["_step"] == place and picture[f"{name}/width"] == 6
        (file,) = picture[f"{name}/filenames"]
        assert len(list((run / "wandb").glob(f"offline-run-*/files/{file}"))) == 1
    (table,) = (run / "wandb").glob("offline-run-*/files/media/table/classes*.json")
    assert json.loads(table.read_text())["data"] == class_table(rows[-1])
    settings, summary = {}, {}
    for record in records:
        settings |= items(record.config.update)
        summary |= items(record.summary.update)
    assert settings["denoising.groups"] == 3 and settings["tracker"] == '["tensorboard", "wandb", "mlflow"]'
    assert {name: summary[name] for name in final(rows)} == final(rows)
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1, 0]


def test_a_run_of_w_and_b_that_the_caller_has_begun_stays_apart(home, tmp_path):
    import wandb

    with wandb.init(project="mine", dir=tmp_path, settings={"silent": True}) as mine:
        run = short_run(tmp_path / "ours", "--tracker", "wandb", "--max-steps-per-epoch", "1")
        assert wandb.run is mine
        mine.log({"after": 1.0})
    starts = [record.run for record in offline_records(run) if record.HasField("run")]
    assert [start.project for start in starts] == ["dndetr"] and starts[0].run_id != mine.id
    settings: dict = {}
    for record in offline_records(run):
        settings |= items(record.config.update)
    assert settings["denoising.groups"] == 3
    logged = [items(record.history.item) for record in offline_records(tmp_path) if record.HasField("history")]
    assert [{name for name in row if not name.startswith("_")} for row in logged] == [{"after"}]


def test_mlflow(run, rows, logged):
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("cells")
    (shown,) = client.search_runs([experiment.experiment_id])
    assert shown.info.run_name == "stopped-1" and shown.info.status == "FINISHED"
    assert shown.data.params["denoising.groups"] == "3"
    assert set(shown.data.metrics) == {*logged, *(f"final/{name}" for name in final(rows))}
    for name, values in logged.items():
        history = client.get_metric_history(shown.info.run_id, name)
        assert sorted((point.step, point.value) for point in history) == values
    files = {file.path for file in client.list_artifacts(shown.info.run_id)}
    assert files == {"classes.md", *(f"{name}.png" for name in PICTURES)}
    table = Path(client.download_artifacts(shown.info.run_id, "classes.md"))
    best, ap = class_table(rows[-1])[0]
    assert f"| {best} | {ap:.3f} |" in table.read_text()


@pytest.mark.slow
def test_of_two_processes_the_first_speaks_to_them(home, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dndetr.train",
    ]
    few = [
        "--epochs",
        "1",
        "--batch-size",
        "2",
        "--train-images",
        "8",
        "--val-images",
        "4",
        "--log-every",
        "1",
        "--quiet",
    ]
    variables = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    for flags in (["--output", "plain"], ["--output", "shown", "--tracker", "tensorboard", "wandb", "mlflow"]):
        done = subprocess.run(
            [*command, *few, *flags],
            env=variables | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "shown" / "wandb").glob("offline-run-*"))) == 1
    assert [row["event"] for row in read_rows(tmp_path / "shown" / "metrics.jsonl")] == [
        "train",
        "train",
        "eval",
        "end",
    ]
    plain, shown = (torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("plain", "shown"))
    assert all(torch.equal(shown[name], plain[name]) for name in plain)
