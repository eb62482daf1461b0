"""What tests and benchmarks share."""

import argparse
import os
import zlib

import pytest

_MOST = 8  # processes; each takes two gigabytes


def pytest_addoption(parser):
    parser.addoption("--share", type=_share, help="k/n: only the k-th of n equal shares of the tests, k from 0")


def _share(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text}: the first of two shares is 0/2, the second 1/2")
    return int(number), int(count)


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


def pytest_collection_modifyitems(config, items):
    """Items of another share are left out; those marked ``gpu`` are skipped where torch sees none, with that reason."""
    if config.option.share:
        number, count = config.option.share
        # By name: a test's share is the same whatever else there is.
        items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % count == number]
    import torch  # not before the benchmarks' conftest, which sets how torch waits

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))
