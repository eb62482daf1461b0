"""Kernels that write something else than they should: whether an op's self-test sees it. For Triton's interpreter."""

import importlib
from unittest import mock

import pytest
import torch

from dndetr.ops import _backend


def check_self_test(op: str, dtype: torch.dtype = torch.bfloat16, **written: tuple[int, ...]):
    """The self-test of ``op`` finds nothing, and every result in ``dtype`` that is a few roundings of bfloat16 off.

    written: of each launcher of the op's kernels, the places of the arguments that it writes.
    """
    kernels = importlib.import_module(f"dndetr.kernels.{op}")
    _backend.forget()
    (finding,) = _backend.examine(op, "cpu")
    assert finding.problem is None, finding.problem
    for name, places in written.items():
        own = getattr(kernels, name)
        for place in places:
            spoilt = []

            def launch(*given, own=own, place=place, spoilt=spoilt):
                own(*given)
                if given[place] is not None and given[place].dtype == dtype:
                    spoilt.append(given[place].mul_(1.03))

            _backend.forget()
            with mock.patch.object(kernels, name, launch), pytest.warns(UserWarning, match=f"{op} cannot use its"):
                (finding,) = _backend.examine(op, "cpu")
            assert spoilt and "self-test error" in finding.problem, (name, place)
    _backend.forget()
