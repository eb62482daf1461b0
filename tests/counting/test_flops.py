"""The operations of a step's products and convolutions, whichever library computes them."""

import pytest
import torch
import torch.nn.functional as F

from dndetr.counting.flops import operations
from dndetr.models import linear as linear_module
from dndetr.models.linear import Linear, linear
from dndetr.ops.conv3x3 import conv3x3

ROWS, INPUTS, OUTPUTS = 48, 32, 80
ONE = 2 * ROWS * INPUTS * OUTPUTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_linear_layer_is_three_products(dtype):
    layer = Linear(INPUTS, OUTPUTS).to(dtype)
    x = torch.randn(2, ROWS // 2, INPUTS, dtype=dtype, requires_grad=True)
    assert sum(operations(lambda: layer(x)).values()) == ONE
    assert sum(operations(lambda: layer(x).sum().backward()).values()) == 3 * ONE


def test_onednn_products_are_counted_as_those_of_torch(monkeypatch):
    x, weight = torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS)
    counted = [operations(lambda: F.linear(x, weight))]
    for faster in (True, False):
        monkeypatch.setattr(linear_module, "onednn_is_faster", lambda faster=faster: faster)
        counted.append(operations(lambda: linear(x, weight)))
    assert counted == [{"products": ONE, "convolutions": 0, "3x3 convolutions": 0}] * 3


def test_products_with_activations_are_products(fake_cuda):
    x, weight, bias = (torch.empty(size, device="cuda") for size in ((ROWS, INPUTS), (OUTPUTS, INPUTS), OUTPUTS))
    kept = x.new_empty(ROWS, OUTPUTS)
    forward = operations(lambda: torch.ops.dndetr.activated_product(x, weight, bias, None, True))
    backward = operations(lambda: torch.ops.dndetr.activated_product_backward(x, weight.t(), kept, None))
    assert forward == backward == {"products": ONE, "convolutions": 0, "3x3 convolutions": 0}


def test_a_product_added_in_place_is_a_product():
    sums, grad, weight = torch.zeros(ROWS, INPUTS), torch.randn(ROWS, OUTPUTS), torch.randn(OUTPUTS, INPUTS)
    assert operations(lambda: sums.addmm_(grad, weight))["products"] == ONE


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_convolutions_are_apart(extension, backend):
    x, kernel = torch.randn(2, 32, 10, 12, requires_grad=True), torch.randn(64, 32, 3, 3, requires_grad=True)
    kind, other = ["3x3 convolutions", "convolutions"][:: 1 if backend == "cpp" else -1]
    one = 2 * 2 * 64 * 32 * 9 * 10 * 12
    expected = {"products": 0, kind: one, other: 0}
    assert operations(lambda: conv3x3(x, kernel, backend=backend)) == expected
    both = operations(lambda: conv3x3(x, kernel, backend=backend).sum().backward())
    assert both == expected | {kind: 3 * one}
