"""Angles of sine encodings and their sines and cosines, side by side: what kernels of encodings share."""

import triton
import triton.language as tl

TAU = tl.constexpr(6.283185307179586)


@triton.jit
def rates(octaves, channels, PAIRS: tl.constexpr):
    """temperature^(-2k / channels) of each pair k of channels, octaves being log2(temperature)."""
    return tl.exp2(tl.arange(0, PAIRS).to(tl.float32) * (-2.0 * octaves / channels))


@triton.jit
def waves(angle, octaves, channels, PAIRS: tl.constexpr):
    """angle [rows] -> [rows, 2 PAIRS]: sine in even, cosine in odd channels."""
    phase = angle[:, None] * rates(octaves, channels, PAIRS)[None, :]
    return tl.interleave(tl.sin(phase), tl.cos(phase))
