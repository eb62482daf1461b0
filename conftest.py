"""What tests and benchmarks share."""

import pytest


def pytest_collection_modifyitems(items):
    """Items marked ``gpu`` are skipped where torch sees none, with that reason."""
    import torch  # not before the benchmarks' conftest, which sets how torch waits

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))
