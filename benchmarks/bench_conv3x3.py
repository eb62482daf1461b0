"""3x3 convolutions of a ResNet-50 on the CPU against torch's, in float32, two images of 480x640.

``pytest benchmarks/bench_conv3x3.py -s --results FILE``; in turn, medians.
"""

from functools import partial

import in_turn
import pytest
import torch

from dndetr.ops.conv3x3 import conv3x3, conv3x3_reference

# channels, height, width of the input, stride
SHAPES = {
    "64 channels at stride 4": (64, 120, 160, 1),
    "128 channels at stride 8": (128, 60, 80, 1),
    "256 channels at stride 16": (256, 30, 40, 1),
    "512 channels at stride 32": (512, 15, 20, 1),
    "128 channels from stride 4 to 8": (128, 120, 160, 2),
    "256 channels from stride 8 to 16": (256, 60, 80, 2),
    "512 channels from stride 16 to 32": (512, 30, 40, 2),
}


@pytest.mark.parametrize("shape", SHAPES)
def bench_conv3x3(benchmark, record, shape, seconds=2.0):
    channels, height, width, stride = SHAPES[shape]
    torch.manual_seed(0)
    x, weight = torch.randn(2, channels, height, width).relu(), torch.randn(channels, channels, 3, 3) / channels
    values = [tensor.contiguous(memory_format=torch.channels_last).requires_grad_() for tensor in (x, weight)]
    weighting = torch.randn_like(conv3x3_reference(*values, stride=stride).detach())

    functions = {name: partial(f, stride=stride) for name, f in (("ours", conv3x3), ("torch", conv3x3_reference))}
    in_turn.report(record, f"3x3 convolution, {{passes}}, {shape}", functions, values, weighting, seconds)
    benchmark(in_turn.timed, functions["ours"], values, weighting)
