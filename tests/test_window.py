"""The window of losses between two rows of the log: its clock."""

import torch

from dndetr import window
from dndetr.criterion import Losses
from dndetr.window import LossWindow


def test_time_before_a_resumption_counts_and_evaluations_do_not(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(window.time, "perf_counter", lambda: clock[0])
    stopped, resumed = LossWindow(), LossWindow()
    clock[0] += 3
    stopped.add(Losses(torch.tensor(1.0), torch.ones(2, 6), None), torch.tensor(0.5), [1, 2], waited=0.0)
    resumed.restore(stopped.state(), torch.device("cpu"))
    clock[0] += 50  # an evaluation, or whatever else comes before the next step
    resumed.restart_clock()
    clock[0] += 1
    _, (ids, about) = resumed.close(1, 1, [1e-3])
    assert ids == [[1, 2]] and about["seconds"] == 4 and about["images_per_second"] == 0.5
    clock[0] += 50
    assert resumed.state()["seconds"] == 0, "what follows an empty window is not training"
