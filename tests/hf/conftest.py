"""What all tests of Hugging Face's models share."""

import pytest

from dndetr.models import linear


@pytest.fixture(autouse=True)
def linear_layers_gain(monkeypatch):
    """Linear layers are replaced whoever made the processor."""
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
