"""The window of losses between two rows of the log: its clock."""

import torch

from dndetr import window
from dndetr.criterion import Losses
from dndetr.window import LossWindow, Record


def test_time_before_a_resumption_counts_and_evaluations_do_not(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(window.time, "perf_counter", lambda: clock[0])
    stopped, resumed = (LossWindow(Record(4, 2, "cpu")) for _ in range(2))
    clock[0] += 3
    stopped.record.write(Losses(torch.tensor(1.0), torch.ones(2, 6), None), torch.tensor(0.5))
    stopped.add([1, 2], waited=0.0)
    resumed.restore(stopped.state())
    clock[0] += 50  # an evaluation, or whatever else comes before the next step
    resumed.restart_clock()
    clock[0] += 1
    values, (ids, about) = resumed.close(1, 1, [1e-3])
    assert values.tolist() == [[1.0, 0.5] + [1.0] * 12]
    assert ids == [[1, 2]] and about["seconds"] == 4 and about["images_per_second"] == 0.5
    clock[0] += 50
    assert resumed.state()["seconds"] == 0, "what follows an empty window is not training"
