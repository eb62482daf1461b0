"""What tests and benchmarks share."""

import os

import pytest

_MOST = 8  # processes; each takes two gigabytes


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A run of all tests takes a process per core, where pytest-xdist is installed and nothing else was asked for."""
    option = config.option
    asked = getattr(option, "numprocesses", 0) is not None  # 0: there is no pytest-xdist
    whole = config.args_source is config.ArgsSource.TESTPATHS
    one_of_many = "PYTEST_XDIST_WORKER" in os.environ  # also of what such a process starts
    alone = asked or one_of_many or option.collectonly or option.usepdb or option.capture == "no"
    if whole and not alone:
        option.numprocesses = min(len(os.sched_getaffinity(0)), _MOST)
        option.dist = "worksteal"  # tests take from a millisecond to half a minute
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    """Items marked ``gpu`` are skipped where torch sees none, with that reason."""
    import torch  # not before the benchmarks' conftest, which sets how torch waits

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))
