"""Backward node by node gives what autograd's engine gives."""

import contextlib
from collections import Counter

import detectors
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dndetr.counting.backward import backward, plain_backward


def around(node):
    return contextlib.nullcontext()


class TwoResults(torch.autograd.Function):
    """A function whose second result may go unused; it wants zeros for it."""

    @staticmethod
    def forward(ctx, x, factor, y):
        return x * factor, y + 1

    @staticmethod
    def backward(ctx, grad_x, grad_y):
        return grad_x * 3, None, grad_x.sum() + grad_y


def shared(x, y):
    z = x.exp()
    return (z * z + z[0] * y).sum() + (z.unsqueeze(0).expand(3, *z.shape) * y).mean()


def of_python(x, y):
    return TwoResults.apply(x, 3, y)[0].sum() + x.sum()


def in_half(x, y):
    with torch.autocast("cpu", torch.bfloat16):
        return (x @ y.t()).float().square().sum()


def parts(x, y):
    a, b = x.split(2, dim=1)
    return torch.where(a > 0, a, b).sum() * y.max() + y.unbind(0)[1].norm()


@pytest.mark.parametrize("function", [shared, of_python, in_half, parts])
def test_gradients_are_autograds(function):
    given = [torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    ends = []
    for differentiate in (torch.Tensor.backward, lambda total: backward(total, around)):
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        differentiate(function(*leaves))
        differentiate(function(*leaves))  # gradients add up
        ends.append([leaf.grad for leaf in leaves])
    for mine, theirs in zip(*reversed(ends), strict=True):
        torch.testing.assert_close(mine, theirs)


class Names(TorchDispatchMode):
    """Counts operations by name, but for those that only describe memory."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.found[name] += name != "detach" and "empty" not in name
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dn-detr", "dn-deformable-detr", "dino"])
def test_a_whole_step_is_the_same_by_the_same_operations(name, precision):
    ends, names = [], []
    for way in (contextlib.nullcontext(), plain_backward(around)):
        step = detectors.make_step(detectors.build(name), precision=precision)
        with way:
            step(detectors.make_batch([3, 5], 8))
            with Names() as mode:
                losses, norm = step(detectors.make_batch([3, 5], 8))
        ends.append((losses.total, norm))
        names.append(+mode.found)
    torch.testing.assert_close(*ends, rtol=1e-4, atol=0)
    assert names[0] == names[1] and names[0].total() > 500
