"""The deformable attention of Hugging Face models on our op: three forms of one layer, same arguments, same result.

``MultiScaleDeformableAttention`` is a submodule without weights (Deformable DETR, RT-DETR, LW-DETR, RF-DETR, Grounding
DINO and others). RT-DETRv2 calls a function, D-FINE and DEIMv2 hold that function as an attribute; it takes a number of
points per level. A replaced module changes its class to a subclass, so that its weights, hooks and place in the model
stay what they are.
"""

import inspect
from functools import cache, partial

import torch
from torch import Tensor, nn

from ..ops import ms_deform_attn
from .rebind import rebind

_SUBMODULE = "MultiScaleDeformableAttention"
_SUBMODULE_ARGUMENTS = (
    "value",
    "value_spatial_shapes",
    "value_spatial_shapes_list",
    "level_start_index",
    "sampling_locations",
    "attention_weights",
    "im2col_step",
)
_FUNCTION = "multi_scale_deformable_attention_v2"
_FUNCTION_ARGUMENTS = (
    "value",
    "value_spatial_shapes",
    "sampling_locations",
    "attention_weights",
    "num_points_list",
    "method",
)


def _shapes(spatial_shapes) -> tuple[tuple[int, int], ...]:
    return tuple((int(height), int(width)) for height, width in spatial_shapes)


def _forward(
    self,
    value,
    value_spatial_shapes,
    value_spatial_shapes_list,
    level_start_index,
    sampling_locations,
    attention_weights,
    im2col_step,
):
    return ms_deform_attn(value, _shapes(value_spatial_shapes_list), sampling_locations, attention_weights)


def sample_points(
    value: Tensor,
    value_spatial_shapes: list,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: list[int],
    method: str = "default",
) -> Tensor:
    """Deformable attention with ``num_points_list[l]`` points in level l.

    value [B, S, H, D], sampling_locations [B, Q, H, points of all levels, 2], attention_weights [B, Q, H, points of all
    levels] -> [B, Q, H * D]. One call of the op for equal numbers, one per level otherwise.
    """
    shapes = _shapes(value_spatial_shapes)
    if len(set(num_points_list)) == 1:
        split = (len(shapes), num_points_list[0])
        return ms_deform_attn(
            value, shapes, sampling_locations.unflatten(3, split), attention_weights.unflatten(3, split)
        )
    levels = zip(
        value.split([height * width for height, width in shapes], dim=1),
        shapes,
        sampling_locations.split(num_points_list, dim=3),
        attention_weights.split(num_points_list, dim=3),
        strict=True,
    )
    return torch.stack(
        [
            ms_deform_attn(pixels, (shape,), locations.unsqueeze(3), weights.unsqueeze(3))
            for pixels, shape, locations, weights in levels
        ]
    ).sum(0)


@cache
def _on_our_op(plain: type) -> type:
    forward = _forward if plain.__name__ == _SUBMODULE else rebind(plain.forward, **{_FUNCTION: sample_points})
    return type(plain.__name__, (plain,), {"forward": forward, "__reduce_ex__": _reduce, "__module__": __name__})


def _reduce(self, protocol):
    # The class has no name to be found by; copies and pickles make it again from the plain one.
    return _empty, (type(self).__base__,), self.__getstate__()


def _empty(plain: type) -> nn.Module:
    kind = _on_our_op(plain)
    return kind.__new__(kind)


def replace_attention(module: nn.Module):
    """Put a module on our op -> a function that undoes it, or None where it is no deformable attention we know."""
    kind = type(module)
    if kind.__module__.split(".")[0] != "transformers":
        return None
    if kind.__name__ == _SUBMODULE:
        _expect(kind.forward, ("self", *_SUBMODULE_ARGUMENTS))
    elif getattr(module, "ms_deformable_attn_core", None).__class__ is type(_shapes):
        core = module.ms_deformable_attn_core
        if core.__name__ != _FUNCTION or module.decoder_method != "default":
            return None
        _expect(core, _FUNCTION_ARGUMENTS)
        module.ms_deformable_attn_core = sample_points
        return partial(setattr, module, "ms_deformable_attn_core", core)
    elif kind.__name__ != "RTDetrV2MultiscaleDeformableAttention" or module.method != "default":
        return None
    else:
        _expect(kind.forward.__globals__[_FUNCTION], _FUNCTION_ARGUMENTS)
    module.__class__ = _on_our_op(kind)
    return partial(setattr, module, "__class__", kind)


def _expect(function, names: tuple[str, ...]) -> None:
    found = tuple(inspect.signature(function).parameters)
    if found != names:
        raise RuntimeError(
            f"dndetr.accelerate does not fit this version of transformers: {function.__module__}."
            f"{function.__qualname__} takes ({', '.join(found)}), expected ({', '.join(names)})"
        )
