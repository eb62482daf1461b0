"""Torch as nobody has set it: what is computed here does not depend on what the caller has set for code of its own."""

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()
_within = 0  # blocks under way, in all threads, for which the default dtype is float32
_callers = torch.float32


@contextlib.contextmanager
def own_context() -> Iterator[None]:
    """Within, new tensors are float32 and on the CPU, gradients are on; no inference mode and no autocast."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_no_autocast())
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(float32_by_default())
        yield


@contextlib.contextmanager
def float32_by_default() -> Iterator[None]:
    """Within, new tensors are float32. The default is one for all threads: the last to leave restores the caller's."""
    global _within, _callers
    with _lock:
        if not _within:
            _callers = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _within += 1
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if not _within:
                torch.set_default_dtype(_callers)


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """Not ``autocast(enabled=False)``: within one that is nested, torch keeps casts of weights that have changed."""
    depth = torch.autocast_increment_nesting() - 1
    for _ in range(depth + 1):
        torch.autocast_decrement_nesting()
    enabled = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    for device in enabled:
        torch.set_autocast_enabled(device, False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        for device in enabled:
            torch.set_autocast_enabled(device, True)
        for _ in range(depth):
            torch.autocast_increment_nesting()
