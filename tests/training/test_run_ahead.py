"""The host waits for the step before the last two, and on a CPU for none."""

import torch

from dndetr.training.run_ahead import RunAhead


def test_at_most_two_steps_ahead(monkeypatch):
    told = []

    class Event:
        made = 0

        def __init__(self, blocking):
            Event.made += 1
            self.number = Event.made

        def record(self, stream):
            told.append(f"launched {self.number}")

        def synchronize(self):
            told.append(f"waited for {self.number}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    lead = RunAhead(torch.device("cuda"))
    for _ in range(4):
        lead.step()
    assert told == ["launched 1", "launched 2", "launched 3", "waited for 1", "launched 4", "waited for 2"]


def test_nothing_on_a_cpu():
    RunAhead(torch.device("cpu")).step()
