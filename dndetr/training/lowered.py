"""A model whose matrix products find their weights in half precision: all brought there at once, gradients back, too.

Autocast does this weight by weight, each with a kernel of its own that takes longer to launch than to run.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..models.layers import PackedProjections, Recomputable

_MULTIPLYING = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, PackedProjections)  # of which autocast lowers parameters


class Lowered(nn.Module):
    """``model``, called with the weights of its matrix products in ``dtype``; to be used under autocast to that dtype.

    Parameters stay what they are, float32, and so do their gradients, which all arrive at the end of backward. Blocks
    that are recomputed keep their own: what is computed again during backward would find no others.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype
        modules = list(model.modules())
        multiplying = {p for m in modules if isinstance(m, _MULTIPLYING) for p in m.parameters(recurse=False)}
        kept = {p for m in modules if isinstance(m, Recomputable) and m.recomputed for p in m.parameters()}
        self._full = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter in multiplying - kept and parameter.dtype == torch.float32
        }

    def forward(self, *inputs):
        """What ``model`` returns for the inputs."""
        lowered = lower(list(self._full.values()), self.dtype)
        return functional_call(self.model, dict(zip(self._full, lowered, strict=True)), inputs)


def lower(parameters: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """float32 parameters -> copies in ``dtype`` with the same strides, whose gradients come back in float32."""
    return _Lower.apply(dtype, *parameters)


class _Lower(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, *parameters):
        ctx.set_materialize_grads(False)
        lowered = _copies(parameters, dtype)
        frozen = (low for low, parameter in zip(lowered, parameters, strict=True) if not parameter.requires_grad)
        ctx.mark_non_differentiable(*frozen)
        return tuple(lowered)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        found = iter(_copies([grad for grad in grads if grad is not None], torch.float32))
        return None, *(None if grad is None else next(found) for grad in grads)


def _copies(tensors, dtype: torch.dtype) -> list[Tensor]:
    """The tensors in another dtype, by one call, which on a GPU takes few kernels as long as all of them are dense."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    # A clone has the strides of its copy also where the tensor's own have gaps or overlap.
    dense = [t if t.stride() == copy.stride() else t.clone() for t, copy in zip(tensors, copies, strict=True)]
    if copies:
        torch._foreach_copy_(copies, dense)
    return copies
