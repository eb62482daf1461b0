"""Kernels that write something else than they should: whether an op's self-test sees it. For Triton's interpreter."""

import importlib
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch

from dndetr.ops import _backend


def check_self_test(op: str, dtype: torch.dtype = torch.bfloat16, **written: tuple[int, ...]):
    """The self-test of ``op`` finds nothing, and every result in ``dtype`` that is a few roundings of bfloat16 off.

    written: of each launcher of the op's kernels, the places of the arguments that it writes.
    """
    _backend.forget()
    (finding,) = _backend.examine(op, "cpu")
    assert finding.problem is None, finding.problem
    for name, places in written.items():
        for place in places:
            spoilt = []

            def launch(own, *given, place=place, spoilt=spoilt):
                own(*given)
                if given[place] is not None and given[place].dtype == dtype:
                    spoilt.append(given[place].mul_(1.03))

            check_refused(op, name, launch)
            assert spoilt, (name, place)


def check_refused(op: str, name: str, launch: Callable):
    """The self-test of ``op`` sees what ``launch``, given the launcher ``name`` and its arguments, does instead."""
    kernels = importlib.import_module(f"dndetr.kernels.{op}")
    launcher = partial(launch, getattr(kernels, name))
    _backend.forget()
    with mock.patch.object(kernels, name, launcher), pytest.warns(UserWarning, match=f"{op} cannot use its"):
        (finding,) = _backend.examine(op, "cpu")
    assert "self-test error" in finding.problem, name
    _backend.forget()
