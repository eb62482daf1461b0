"""Float32 linear layers on a CPU, ours (oneDNN's products) against torch's own, forward and both passes.

``pytest benchmarks/bench_linear.py -s --results FILE``: rows are tokens or queries of two images; both are timed
alternately.
"""

import in_turn
import pytest
import torch
import torch.nn.functional as F

from dndetr.models.linear import linear

# rows, inputs, outputs
SHAPES = {
    "projection of 12760 tokens": (12760, 256, 256),
    "feed-forward of 12760 tokens": (12760, 256, 2048),
    "projection of 920 queries": (920, 256, 256),
    "feed-forward of 920 queries": (920, 256, 2048),
    "boxes of 920 queries": (920, 256, 4),
}


@pytest.mark.parametrize("shape", SHAPES)
def bench_linear(benchmark, record, shape, seconds=2.0):
    rows, inputs, outputs = SHAPES[shape]
    torch.manual_seed(0)
    values = [torch.randn(*size, requires_grad=True) for size in ((rows, inputs), (outputs, inputs), (outputs,))]
    weighting = torch.randn(rows, outputs)

    functions = {"ours": linear, "torch": F.linear}
    in_turn.report(record, f"linear, {{passes}}, {shape}", functions, values, weighting, seconds)
    benchmark(in_turn.timed, linear, values, weighting)
