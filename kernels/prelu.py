"""PReLU with one slope: a program takes a stretch of numbers, each of its threads whole vectors of them."""

import triton
import triton.language as tl

BLOCK = 4096  # four vectors of 16 bytes in bfloat16 for each thread


@triton.jit
def prelu_kernel(
    x,  # [numbers]
    slope,  # [1]
    out,  # [numbers]
    numbers,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)
    inside = place < numbers - start
    value = tl.load(x + start + place, mask=inside).to(tl.float32)
    factor = tl.load(slope).to(tl.float32)
    # As torch has it, a NaN is not above zero, and stays one.
    value = tl.where(value > 0.0, value, value * factor)
    tl.store(out + start + place, value.to(out.dtype.element_ty), mask=inside)


def prelu(x, slope, out) -> None:
    """Write out, of contiguous x of any shape, not empty."""
    numbers = x.numel()
    prelu_kernel[(triton.cdiv(numbers, BLOCK),)](x, slope, out, numbers, BLOCK=BLOCK, num_warps=4)
