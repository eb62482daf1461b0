"""Other implementations of deformable attention, as functions of (value, spatial_shapes, locations, weights).

Each is given locations and weights that are already computed, which is less work than our fused op does.
"""

import torch
from device_code import call, library


def importable(device: str) -> tuple[dict, dict[str, str]]:
    """Peers that can be had here, and why the others cannot: ({name: function}, {name: reason})."""
    makers = {"Hugging Face": hugging_face}
    if device == "cuda":
        makers |= {"classical mapping": classical, "mmcv": mmcv, "original extension": original}
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


def mmcv():
    """mmcv's extension."""
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    return _extension(MultiScaleDeformableAttnFunction.apply)


def original():
    """Deformable-DETR's extension, through whoever imported it as a module."""
    import MultiScaleDeformableAttention as extension

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

    return _extension(Function.apply)


def _extension(function):
    cached = {}

    def run(value, shapes, locations, weights):
        if shapes not in cached:
            cached[shapes] = _sizes(value, shapes)
        return function(value, *cached[shapes], locations, weights, 64)

    return run


def classical():
    """Our own writing of the classical one-thread-per-channel mapping; float32 only."""
    code = library("classical_deform_attn")

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, shapes, locations, weights):
            if value.dtype != torch.float32:
                raise RuntimeError("the classical mapping is float32 only")
            batch, queries, heads, levels, points, _ = locations.shape
            ctx.sizes = [batch, queries, heads, value.shape[3], levels, points]
            ctx.shapes = [side for shape in shapes for side in shape]
            ctx.save_for_backward(value, locations, weights)
            out = value.new_empty(batch, queries, heads * value.shape[3])
            call(code.classical_forward, ctx.sizes, ctx.shapes, value, locations, weights, out)
            return out

        @staticmethod
        def backward(ctx, grad_out):
            value, locations, weights = ctx.saved_tensors
            grads = torch.zeros_like(value), torch.empty_like(locations), torch.empty_like(weights)
            inputs = (grad_out.contiguous(), value, locations, weights)
            call(code.classical_backward, ctx.sizes, ctx.shapes, *inputs, *grads)
            return grads[0], None, *grads[1:]

    return Function.apply
