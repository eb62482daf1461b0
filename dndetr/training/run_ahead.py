"""How far the host may run ahead of the device."""

from collections import deque

import torch

_STEPS = 2  # enough to keep the device busy while the host waits


class RunAhead:
    """Keeps the host at most two steps ahead of a GPU, so that the batches that it has sent there do not pile up."""

    def __init__(self, device: torch.device):
        self.device = device
        self._running: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """A step was launched: wait until the one before the last two has ended."""
        if self.device.type != "cuda":
            return
        ended = torch.cuda.Event(blocking=True)
        ended.record(torch.cuda.current_stream(self.device))
        self._running.append(ended)
        if len(self._running) > _STEPS:
            self._running.popleft().synchronize()
