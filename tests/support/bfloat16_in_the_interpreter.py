"""Products of bfloat16 in Triton's interpreter, which keeps such numbers as their 16 bits, and would multiply those.

To be imported in a process with TRITON_INTERPRET=1.
"""

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder

_dot = InterpreterBuilder.create_dot


def _widened(x):
    return (x.data.astype(np.uint32) << 16).view(np.float32)


def _dot_of_bfloat16(self, a, b, d, input_precision, max_num_imprecise_acc):
    if not a.dtype.scalar.is_bf16():
        return _dot(self, a, b, d, input_precision, max_num_imprecise_acc)
    return type(d)(np.matmul(_widened(a), _widened(b)) + d.data, d.dtype.scalar)


InterpreterBuilder.create_dot = _dot_of_bfloat16
