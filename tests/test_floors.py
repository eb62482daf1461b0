"""What benchmarks count: the operations of a step's products and convolutions, whichever library computes them."""

import floors
import pytest
import torch
import torch.nn.functional as F

from dndetr.models import linear as linear_module
from dndetr.models.linear import Linear, linear

ROWS, INPUTS, OUTPUTS = 48, 32, 80
ONE = 2 * ROWS * INPUTS * OUTPUTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_linear_layer_is_three_products(dtype):
    layer = Linear(INPUTS, OUTPUTS).to(dtype)
    x = torch.randn(2, ROWS // 2, INPUTS, dtype=dtype, requires_grad=True)
    assert sum(floors.operations(lambda: layer(x)).values()) == ONE
    assert sum(floors.operations(lambda: layer(x).sum().backward()).values()) == 3 * ONE


def test_onednn_products_are_counted_as_those_of_torch(monkeypatch):
    x, weight = torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS)
    counted = [floors.operations(lambda function=function: function(x, weight)) for function in (linear, F.linear)]
    monkeypatch.setattr(linear_module, "_HAS_ONEDNN", False)
    counted.append(floors.operations(lambda: linear(x, weight)))
    assert counted == [{"products": ONE, "convolutions": 0}] * 3


def test_convolutions_are_apart():
    x, kernel = torch.randn(1, 4, 10, 12), torch.randn(8, 4, 3, 3)
    assert floors.operations(lambda: torch.conv2d(x, kernel, padding=1)) == {
        "products": 0,
        "convolutions": 2 * 8 * 4 * 9 * 10 * 12,
    }


def test_floor_divides_by_the_rate_of_each_kind():
    counted, rates = (
        {"products": 30, "convolutions": 8},
        {"products": 10.0, "convolutions": 2.0, "float32 products": 1.0},
    )
    assert floors.floor(counted, rates) == 7.0
