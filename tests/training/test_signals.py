"""Signals that ask a run to end."""

import os
import signal

import pytest
import torch
from short_runs import SMALL

from dndetr import train
from dndetr.data.training import TrainingData
from dndetr.data.workers import WorkerLost
from dndetr.runs.console import Console
from dndetr.training.signals import StopSignal

FEW = [*SMALL, "--epochs", "2", "--batch-size", "4", "--train-images", "12", "--val-images", "6", "--quiet"]


@pytest.fixture(autouse=True)
def hangup():
    """Sets how SIGHUP is handled, at first as in a terminal, also for tests under nohup; leaves it as it was."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield lambda how: signal.signal(signal.SIGHUP, how)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_a_second_does_not_wait(number):
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), number)
        assert stop.number == number
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_terminal_that_closes_may_say_so_twice():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
    assert stop.number == signal.SIGHUP


def test_a_hangup_that_is_ignored_stays_so(hangup):
    hangup(signal.SIG_IGN)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
    assert stop.number is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_what_was_there_before_is_restored(hangup):
    hangup(signal.SIG_DFL)
    with StopSignal():
        assert signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_a_signal_that_ends_the_workers_too_loses_no_step(tmp_path, monkeypatch, capsys, no_pictures):
    monkeypatch.chdir(tmp_path)
    training = TrainingData.training

    def one(self, *place):
        yield next(training(self, *place))
        os.kill(os.getpid(), signal.SIGTERM)
        raise WorkerLost("a data worker was ended by SIGTERM")

    monkeypatch.setattr(TrainingData, "training", one)
    with pytest.raises(SystemExit) as end:
        train.main([*FEW, "--output", "run"])
    assert end.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped by SIGTERM after step 1; continue with --resume run\n"
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 1


def test_a_closed_terminal_loses_no_step(tmp_path, monkeypatch, capsys, no_pictures):
    """The run was in the middle of an epoch."""
    monkeypatch.chdir(tmp_path)
    step_ended = Console.step_ended

    def hang_up(self, done, *arguments):
        step_ended(self, done, *arguments)
        if done == 2:
            os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(Console, "step_ended", hang_up)
    with pytest.raises(SystemExit) as end:
        train.main([*FEW, "--output", "run"])
    assert end.value.code == 128 + signal.SIGHUP
    assert capsys.readouterr().err == "stopped by SIGHUP after step 2; continue with --resume run\n"
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 2
