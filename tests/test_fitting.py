"""Training from Python: the same run as the command's, what it gives, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import goldens
import pytest
import torch
from short_runs import SMALL

import dndetr
from dndetr import train
from dndetr.config import Config, to_dict
from dndetr.runs.checkpoint import load_checkpoint
from dndetr.runs.folder import hold
from dndetr.shapes import write_shapes
from dndetr.training.loss_window import Diverged
from dndetr.training.trainer import Trainer

FEW = {"epochs": 2, "batch_size": 4, "train_images": 12, "val_images": 6, "log_every": 2, "quiet": True}
FEW |= {"images.canvas": (64, 64), "model.width": 32, "model.hidden": 64, "model.decoder_layers": 2, "model.queries": 8}
FLAGS = [
    *SMALL,
    "--epochs",
    "2",
    "--batch-size",
    "4",
    "--train-images",
    "12",
    "--val-images",
    "6",
    "--log-every",
    "2",
    "--quiet",
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


class At(dndetr.Listener):
    """Does something after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def run_started(self, run):
        self.run = run

    def step_ended(self, step, images, waited):
        if step == self.step:
            self.act(self.run)


def killing(number):
    return lambda run: os.kill(os.getpid(), number)


def losses(run):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in run.rows if row["event"] == "train"]


def test_it_is_the_commands_run_and_every_time_the_same():
    command = dndetr.TrainedRun(train.run([*FLAGS, "--denoising.groups", "2"]))
    runs = [dndetr.fit(**FEW, denoising={"groups": 2}), dndetr.fit(**FEW, **{"denoising.groups": 2})]
    assert [run.folder for run in runs] == [Path("runs/tiny-2"), Path("runs/tiny-3")]
    for run in runs:
        assert losses(run) == losses(command) and run.config == command.config
        assert run.metrics["AP"] == command.metrics["AP"]


def test_what_a_run_gives(tmp_path):
    write_shapes(tmp_path / "data", train=8, val=4)
    run = dndetr.fit(tmp_path / "data", epochs=2, batch_size=4, quiet=True, output=tmp_path / "mine")
    assert run.folder == tmp_path / "mine" and run.status == "finished"
    assert [row["event"] for row in run.rows if row["event"] != "train"] == ["eval", "eval", "end"]
    assert run.metrics == run.evaluations[-1] and set(run.metrics["classes"]) == {name for _, name in run.classes}
    assert run.best == max(row["AP"] for row in run.evaluations)
    assert run.config.data == str(tmp_path / "data") and run.config.preset == "tiny"
    assert repr(run) == f"TrainedRun({str(run.folder)!r}): tiny, finished, best AP {run.best:.3f}"
    weights = {"best.pt": run.detector("cpu"), "checkpoint.pt": run.detector("cpu", best=False)}
    for name, detector in weights.items():
        saved = load_checkpoint(run.folder / name)["ema"]
        assert all(torch.equal(saved[key], value) for key, value in detector.model.state_dict().items())
        assert detector.classes == run.classes
    for name in ("best.pt", "best.safetensors"):
        (run.folder / name).unlink()
        assert run.detector("cpu").classes == dndetr.load(run, "cpu").classes == run.classes
    assert dndetr.fit(resume=run, quiet=True).folder == run.folder


def test_a_run_is_read_when_it_is_asked(tmp_path):
    run = dndetr.TrainedRun(tmp_path / "run")
    for read in (lambda: run.rows, lambda: run.config, lambda: run.classes, run.detector, lambda: repr(run)):
        with pytest.raises(FileNotFoundError, match="run is no run's folder"):
            read()
    run.folder.mkdir()
    (run.folder / "config.json").write_text(json.dumps(to_dict(Config(preset="small"))))
    assert (run.rows, run.metrics, run.best, run.status) == ([], {}, None, "stopped")
    assert repr(run).endswith(": small, stopped, no AP")
    rows = [{"event": "eval", "step": n, "epoch": n, "AP": ap} for n, ap in enumerate([0.25, 0.5, None, 0.125])]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (run.best, run.metrics, run.status) == (0.5, rows[-1], "stopped")


def test_ctrl_c_saves_the_run_and_goes_on_as_ctrl_c(capsys):
    whole = dndetr.fit(**FEW)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        dndetr.fit(**FEW, output="run", listeners=[At(4, killing(signal.SIGINT))])
    assert signal.getsignal(signal.SIGINT) is before
    assert str(interrupt.value) == "run is saved: go on with dndetr.fit(resume='run')"
    assert interrupt.value._render_traceback_() == ["interrupted; run is saved: go on with dndetr.fit(resume='run')"]
    run = interrupt.value.run
    assert run.status == "stopped" and load_checkpoint(run)["step"] == 4
    with hold(run.folder):
        pass  # the folder was let go
    assert losses(dndetr.fit(resume=run, quiet=True)) == losses(whole) and run.status == "finished"
    assert capsys.readouterr().out == ""


def test_ctrl_c_in_the_last_moments_is_not_lost():
    with pytest.raises(KeyboardInterrupt, match=r"^run is finished$") as interrupt:
        dndetr.fit(**FEW, output="run", listeners=[At(6, killing(signal.SIGINT))])
    assert interrupt.value.run.status == "finished"


def test_a_run_that_a_listener_stops_is_returned(capsys):
    run = dndetr.fit(**FEW | {"quiet": False}, listeners=[At(2, lambda run: run.stop())])
    assert run.status == "stopped"
    assert capsys.readouterr().out.endswith("runs/tiny-1 is saved: go on with dndetr.fit(resume='runs/tiny-1')\n")
    assert dndetr.fit(resume=run.folder, quiet=True).status == "finished"


def test_a_signal_to_end_is_put_off_until_the_run_is_saved():
    told = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(load_checkpoint("run")["step"]))
    try:
        assert dndetr.fit(**FEW, output="run", listeners=[At(2, killing(signal.SIGTERM))]).status == "stopped"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == [2]


def test_a_thread_can_train_and_handles_no_signals():
    found, handlers = [], []
    before = signal.getsignal(signal.SIGINT)
    looking = At(1, lambda run: handlers.append(signal.getsignal(signal.SIGINT)))
    thread = threading.Thread(target=lambda: found.append(dndetr.fit(**FEW, listeners=[looking])))
    thread.start()
    thread.join()
    assert found[0].status == "finished" and handlers == [before]


def test_two_runs_at_once_would_share_what_they_draw():
    errors = []

    def second(_):
        with pytest.raises(RuntimeError, match=r"^a run is being trained in this process: wait"):
            dndetr.fit(**FEW)
        errors.append(None)

    def third(run):
        thread = threading.Thread(target=second, args=(run,))
        thread.start()
        thread.join()

    dndetr.fit(**FEW, output="run", listeners=[At(1, second), At(2, third)])
    assert len(errors) == 2 and [path.name for path in Path().iterdir()] == ["run"]
    assert dndetr.fit(**FEW).status == "finished"


def test_listeners_may_come_one_by_one():
    told = []
    dndetr.fit(**FEW, listeners=(At(step, lambda run: told.append(run.step)) for step in (1, 2)))
    assert told == [0, 0]


def test_errors_come_as_they_are_and_the_next_run_works(monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(Trainer, "_evaluate", lambda *_: (_ for _ in ()).throw(Diverged("not finite")))
        with pytest.raises(Diverged, match="not finite"):
            dndetr.fit(**FEW, output="run")
    assert dndetr.fit(resume="run", quiet=True).status == "finished"


def test_overfitting_that_fails_is_an_error_as_it_is_the_commands():
    with pytest.raises(RuntimeError, match=r"^overfit 4 did not pass: .* wanted; .* larger images\.canvas"):
        dndetr.fit(**FEW, overfit=4, max_steps_per_epoch=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs 0: give 1 or more"),
        ({"epochs": "many"}, "epochs 'many': give a whole number"),
        ({"lr": float("nan")}, "lr nan: give a positive number"),
        ({"data": "nowhere"}, "nowhere: no such folder"),
        ({"preset": "small"}, "preset small needs data: data DIR"),
        ({"preset": "huge"}, "preset huge: choose one of tiny, small"),
        ({"model": {"heads": 3}}, "model.width 32 must be a multiple of 4"),
        ({"batch_size": 100}, "too few for a batch of 100; use batch_size"),
        ({"resume": "nowhere"}, "no checkpoint at nowhere"),
        ({"listeners": [At]}, "is no listener"),
        ({"listeners": At(1, print)}, "give a list of them"),
        ({"listeners": None}, "listeners None: give a list of them"),
        ({"epoch": 1}, "there is no setting epoch: did you mean epochs?"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_plain_line_and_leave_nothing(settings, message, tmp_path):
    with pytest.raises((ValueError, OSError)) as error:
        dndetr.fit(**FEW | settings)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_resuming_refuses_to_change_the_run():
    run = dndetr.fit(**FEW)
    with pytest.raises(ValueError, match=r"^resume continues .*; leave out denoising\.groups, lr \(to start"):
        dndetr.fit(resume=run, lr=1.0, denoising={"groups": 2}, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import torch, dndetr", "import dndetr, sys\nassert 'torch' not in sys.modules"])
def test_torch_may_be_there_before_or_not(order):
    code = f"{order}\nprint(dndetr.fit(epochs=1, batch_size=2, train_images=2, val_images=2, quiet=True).status)"
    environment = {**os.environ, "PYTHONPATH": str(goldens.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("finished\n", 0), done.stderr
