"""A loop to a run-time number, which the interpreter of some Triton cannot run with a newer NumPy: prints its sum."""

import torch
import triton
import triton.language as tl


@triton.jit
def count_to(out, end):
    total = 0
    for _ in range(0, tl.minimum(end, 9)):
        total += 1
    tl.store(out, total)


out = torch.zeros(1, dtype=torch.int32)
count_to[(1,)](out, 3)
print(out.item())
