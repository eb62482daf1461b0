"""What callers may have set in torch, or be in the middle of, when they call us."""

import contextlib

import pytest
import torch


@contextlib.contextmanager
def _default(dtype: torch.dtype = torch.float32, device: str | None = None):
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


CALLERS = {
    "inference": torch.inference_mode,
    "no-grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: _default(torch.float64),
    "bfloat16": lambda: _default(torch.bfloat16),
    "device": lambda: _default(device="meta"),
    "device-block": lambda: torch.device("meta"),
}
every_caller = pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
