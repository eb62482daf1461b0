"""Numbers on their way from the device to the log, without anyone waiting for them."""

from collections import deque
from typing import Any

import torch
from torch import Tensor


class DelayedCopy:
    """A queue of small tensors that are copied to the host in the background."""

    def __init__(self):
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, Any]] = deque()

    def send(self, values: Tensor, about: Any) -> None:
        """Start copying ``values``; ``about`` is handed back with them."""
        if not values.is_cuda:
            self._pending.append((values.detach().clone(), None, about))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values.detach(), non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending.append((host, arrived, about))

    def receive(self, wait: bool = False) -> list[tuple[Tensor, Any]]:
        """What has arrived since the last call, in order; everything that was sent if ``wait``."""
        received = []
        while self._pending:
            values, arrived, about = self._pending[0]
            if arrived is not None:
                if wait:
                    arrived.synchronize()
                elif not arrived.query():
                    break
            self._pending.popleft()
            received.append((values, about))
        return received
