"""Other implementations of deformable attention, as functions of (value, spatial_shapes, locations, weights).

Each is given locations and weights that are already computed, which is less work than our fused op does.
"""

import torch
from device_code import call, library


def importable(device: str) -> tuple[dict, dict[str, str]]:
    """Peers that can be had here, and why the others cannot: ({name: function}, {name: reason})."""
    makers = {"Hugging Face": hugging_face}
    if device == "cuda":
        makers |= {"classical mapping": classical, "deformops": deformops, "mmcv": mmcv, "original extension": original}
    peers, missing = {}, {}
    for name, make in makers.items():
        try:
            peers[name] = make()
        except (ImportError, RuntimeError, AttributeError) as failure:
            missing[name] = f"{type(failure).__name__}: {failure}".splitlines()[0]
    return peers, missing


def _sizes(value, shapes):
    """Level sizes and first pixels as tensors on value's device."""
    sizes = torch.tensor(shapes, device=value.device)
    areas = sizes.prod(1)
    return sizes, areas.cumsum(0) - areas


def hugging_face():
    """transformers' module: grid_sample per level, or the kernel it was told to take."""
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    module, cached = MultiScaleDeformableAttention(), {}

    def run(value, shapes, locations, weights):
        if shapes not in cached:
            cached[shapes] = _sizes(value, shapes)
        return module(value, cached[shapes][0], list(shapes), cached[shapes][1], locations, weights, 64)

    return run


def deformops():
    """deformops' choice among its kernels."""
    from deformops.registry import msda

    return _extension(lambda *inputs: msda(*inputs[:4], inputs[4].flatten(-2)))


def mmcv():
    """mmcv's extension."""
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    return _extension(MultiScaleDeformableAttnFunction.apply)


def original():
    """Deformable-DETR's extension, through whoever imported it as a module."""
    import MultiScaleDeformableAttention as extension

    return _extension(_function(extension))


def _function(extension):
    """The differentiable function of an extension with the original one's two entries."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs[:-1])
            return extension.ms_deform_attn_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_out):
            value, sizes, first, locations, weights = ctx.saved_tensors
            inputs = (value, sizes, first, locations, weights, grad_out.contiguous(), 64)
            grad_value, grad_locations, grad_weights = extension.ms_deform_attn_backward(*inputs)
            return grad_value, None, None, grad_locations, grad_weights, None

    return Function.apply


def _extension(function):
    cached = {}

    def run(value, shapes, locations, weights):
        if shapes not in cached:
            cached[shapes] = _sizes(value, shapes)
        return function(value, *cached[shapes], locations, weights, 64)

    return run


def classical():
    """Our own writing of the classical one-thread-per-channel mapping; float32 only."""
    return _extension(_function(ClassicalExtension()))


class ClassicalExtension:
    """What the original extension exports, with our own writing of its mapping behind it; float32 only."""

    def __init__(self):
        self.code = library("classical_deform_attn")
        self.shapes: dict[int, list[int]] = {}

    def ms_deform_attn_forward(self, value, sizes, first, locations, weights, _):
        if value.dtype != torch.float32:
            raise RuntimeError("the classical mapping is float32 only")
        out = value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])
        call(self.code.classical_forward, *self._problem(value, sizes, locations), value, locations, weights, out)
        return out

    def ms_deform_attn_backward(self, value, sizes, first, locations, weights, grad_out, _):
        grads = torch.zeros_like(value), torch.empty_like(locations), torch.empty_like(weights)
        inputs = (grad_out.contiguous(), value, locations, weights)
        call(self.code.classical_backward, *self._problem(value, sizes, locations), *inputs, *grads)
        return grads

    def _problem(self, value, sizes, locations) -> tuple[list[int], list[int]]:
        """Sizes as the kernels take them; those of the levels, which lie on the device, are read once."""
        pixels = value.shape[1]
        if pixels not in self.shapes:
            self.shapes[pixels] = sizes.flatten().tolist()
        batch, queries, heads, levels, points, _ = locations.shape
        return [batch, queries, heads, value.shape[3], levels, points], self.shapes[pixels]
