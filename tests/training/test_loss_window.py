"""The window of losses between two rows of the log: its clock."""

import pytest
import torch

from dndetr.training import loss_window
from dndetr.training.criterion import Losses
from dndetr.training.loss_window import LossWindow, Record


def test_time_before_a_resumption_counts_and_evaluations_do_not(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(loss_window.time, "perf_counter", lambda: clock[0])
    stopped, resumed = (LossWindow(Record(4, 2, "cpu")) for _ in range(2))
    clock[0] += 3
    stopped.record.write(
        Losses(torch.tensor(1.0), torch.ones(2, 6), None), torch.tensor(0.5), torch.ones(2, 2, dtype=bool)
    )
    stopped.add([1, 2], waited=0.0)
    resumed.restore(stopped.state())
    clock[0] += 50  # an evaluation, or whatever else comes before the next step
    resumed.restart_clock()
    clock[0] += 1
    values, (ids, about) = resumed.close(1, 1, [1e-3])
    assert values.tolist() == [[1.0, 0.5] + [1.0] * 12 + [-1.0] * 2]
    assert ids == [[1, 2]] and about["seconds"] == 4 and about["images_per_second"] == 0.5
    clock[0] += 50
    assert resumed.state()["seconds"] == 0, "what follows an empty window is not training"


def record_with(total: float, finite: list[list[bool]]):
    record = Record(4, 2, "cpu")
    for value, mask in ((1.0, [[True] * 3] * 2), (total, finite)):
        record.write(Losses(torch.tensor(value), torch.ones(2, 6), None), torch.tensor(0.5), torch.tensor(mask))
    return record.first(2)


def test_costs_that_are_not_finite_name_layer_and_image():
    ids = [[1, 2, 3], [4, 5, 6]]
    fine = record_with(1.0, [[True] * 3] * 2)
    assert loss_window.demand_finite(fine, ids, 20) is None
    values = record_with(1.0, [[True, True, True], [True, False, False]])
    assert loss_window.demand_finite(values, ids, 20) == "predictions are not finite at step 20: layer 2 in image id 5"
    two_stages = loss_window.demand_finite(values, ids, 20, proposals=1)
    assert two_stages == "predictions are not finite at step 20: layer 1 in image id 5"
    values = record_with(1.0, [[True, False, False], [True, True, True]])
    assert "20: the proposals in image id 5" in loss_window.demand_finite(values, ids, 20, proposals=1)
    assert Record(4, 2, "cpu", proposals=1).first(1).shape == (1, 2 + 3 * 7)
    values = record_with(float("nan"), [[False, True, True], [True, True, False]])
    where = r"step 20: the gradient \(image ids 4, 5, 6; predictions of layer 1 in image id 4, layer 2 in image id 6\)"
    with pytest.raises(loss_window.Diverged, match=where):
        loss_window.demand_finite(values, ids, 20)
