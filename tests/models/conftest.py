"""Half-precision layers as a GPU has them, on a CPU."""

import pytest
import torch

from dndetr.models import linear


@pytest.fixture
def half_on_a_cpu(monkeypatch):
    """Half-precision layers with a bias take a GPU's way here."""

    def half(x, weight):
        return x.dtype if x.dtype == torch.bfloat16 and x.numel() else None

    monkeypatch.setattr(linear, "half_precision", half)
