"""Any backbone of transformers as one of ours: maps of its stages, nothing random, frozen norms, no idle weights.

Its parameters are ``model.`` and transformers' own names. What it computes is AutoBackbone's, to the bit.
"""

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..ops._backend import plain_torch_only
from ..published_backbones import FEATURE, as_backbone_config
from ..transformers_installed import require_transformers
from .backbone import FrozenBatchNorm2d, PartlyFrozen
from .layers import Recomputable
from .pyramid import Pyramid

_WHERE = "model.backbone.settings"
# Divides by every usual patch (14, 16) and stride (up to 32); not square, as no canvas need be.
_TRIED_ON = (224, 448)


class TransformersBackbone(PartlyFrozen):
    """Feature maps of a backbone of transformers, finest first; interface of :class:`ResNet`.

    settings: its configuration as JSON; outputs: stages (1 to 4) whose maps are returned, with the norms that
    AutoBackbone puts behind them. Stages after the last of them are not there. Of a plain vision transformer, one
    stride for all blocks, the last block's map is one output, and several are made of it by a pyramid. frozen counts
    the parts without gradient, which also stay in evaluation mode: 1 what comes before the first stage or block, 2 also
    that, and so on; norm "frozen" fixes batch norms' statistics and weights.

    ``multiple``: height and width of images must be multiples of it; ``idle``: names of parameters, in ``model``, that
    no map depends on. ImportError without transformers, ValueError for settings that describe no backbone, or one that
    only takes images of one size.
    """

    def __init__(self, settings: str, outputs: tuple[int, ...] = (4,), frozen: int = 2, norm: str = "frozen"):
        super().__init__()
        require_transformers(FEATURE)
        config = _without_chance(_config(settings))
        names = [name for name in config.stage_names if name != "stem"]
        plain = not hasattr(config, "depths")
        last = len(names) if plain else max(outputs)
        if last > len(names):
            raise ValueError(f"--model.backbone.outputs {outputs}: {config.model_type} has {len(names)} stages")
        config.out_features = [names[-1]] if plain else [names[number - 1] for number in outputs]
        self.model = _built(config)
        self._attention = self.model.config._attn_implementation
        stages, before = _stages(self.model, last, len(names))
        if norm == "frozen":
            _freeze_batch_norms(self.model)
        _make_recomputable(self.model, stages)
        maps = self._try_out(config.model_type)
        self.widths = [x.shape[1] for x in maps]
        self.strides = [_stride(x, config.model_type) for x in maps]
        self.multiple = max(self.strides)
        self.pyramid = None
        if plain and len(outputs) > 1:
            self.pyramid = Pyramid(self.widths[0], outputs)
            self.widths, self.strides = self.pyramid.widths, self.pyramid.strides(self.strides[0])
            self.multiple = max(self.multiple, *self.strides)  # whole patches, also where only finer maps are used
        self._freeze([*before, *list(stages)[: max(frozen - 1, 0)]] if frozen else [])

    @torch.enable_grad()
    def _try_out(self, kind: str) -> tuple[Tensor, ...]:
        """The maps of one image, nowhere; parameters that none of them depends on are frozen, as nothing trains them.

        Several processes would wait for their gradients, and weight decay would eat them.
        """
        there = {name: x.detach().to("meta") for name, x in _tensors(self.model) if x is not None}
        parameters = {name: there[name].requires_grad_() for name, _ in self.model.named_parameters()}
        image = torch.empty(1, 3, *_TRIED_ON, device="meta")
        training = self.model.training
        try:
            maps = functional_call(self.model.eval(), there, (image,)).feature_maps
        except (RuntimeError, ValueError, TypeError) as error:
            size = "x".join(map(str, _TRIED_ON))
            reason = (str(error).splitlines() or [""])[0][:150]
            raise ValueError(
                f"the backbone {kind} cannot be used: it takes no images of {size}, as detectors must ({reason}); "
                "give another --model.backbone.name"
            ) from error
        finally:
            self.model.train(training)
        found = torch.autograd.grad(sum(x.sum() for x in maps), list(parameters.values()), allow_unused=True)
        self.idle = {name for name, grad in zip(parameters, found, strict=True) if grad is None}
        for name in self.idle:
            self.model.get_parameter(name).requires_grad_(False)
        return tuple(x.detach() for x in maps)

    def _apply(self, fn, recurse: bool = True):
        """As of every module, but only filters get their channels last.

        Other weights with four dimensions, as norms have, would get strides that their gradients do not have, of which
        DistributedDataParallel warns.
        """
        super()._apply(fn, recurse)
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 4 and not isinstance(module, nn.Conv2d):
                    parameter.data = parameter.data.flatten().view(parameter.shape)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W] -> maps [B, C, h, w], one for each of ``outputs``."""
        # Exported programs hold plain operations: one for all of attention is taken apart wrongly on the way to ONNX.
        self.model.config._attn_implementation = "eager" if plain_torch_only() else self._attention
        maps = list(self.model(images).feature_maps)
        return maps if self.pyramid is None else self.pyramid(maps[0])


def _stride(x: Tensor, kind: str) -> int:
    """Pixels from one place to the next in a map of the image that was tried; ValueError if that is no one number."""
    if any(side % places for side, places in zip(_TRIED_ON, x.shape[2:], strict=True)):
        size = "x".join(map(str, _TRIED_ON))
        raise ValueError(
            f"the backbone {kind} cannot be used: its strides do not divide images of {size}; give another "
            "--model.backbone.name"
        )
    height, width = (side // places for side, places in zip(_TRIED_ON, x.shape[2:], strict=True))
    if height != width:
        raise ValueError(
            f"the backbone {kind} cannot be used: its maps have a stride of {height} down and {width} across, as those "
            "for lines of text have; give another --model.backbone.name"
        )
    return height


def _tensors(model: nn.Module):
    yield from model.named_parameters()
    yield from model.named_buffers()


def _config(settings: str):
    """transformers' configuration of these settings."""
    if not settings:
        raise ValueError(f"{_WHERE} is empty: a backbone's own configuration is read from --model.backbone.name")
    try:
        values: Any = json.loads(settings)
    except ValueError as error:
        raise ValueError(f"{_WHERE} is no JSON ({error})") from None
    return as_backbone_config(values, _WHERE)


def _without_chance(config):
    """The configuration without dropout, drop path and shaken positions: of a step, only its noise is drawn."""
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float | int) and not isinstance(value, bool):
            setattr(config, name, 0.0)
        elif name in ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"):
            setattr(config, name, None)
    return config


def _built(config) -> nn.Module:
    """transformers' model in float32, with random weights."""
    from transformers import AutoBackbone

    try:
        return AutoBackbone.from_config(config, dtype=torch.float32)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # of settings that contradict each other
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise ValueError(f"{_WHERE}: transformers cannot build this {config.model_type}: {reason}") from error


def _stages(model: nn.Module, last: int, count: int) -> tuple[nn.ModuleList, list[nn.Module]]:
    """The list of a model's ``count`` stages, or blocks, cut after ``last`` of them, and the modules before it."""
    lists = (name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    if (path := next(lists, None)) is None:
        raise ValueError(f"the backbone {model.config.model_type} cannot be used: it has no list of its {count} stages")
    before, after, module = [], [], model
    for name in path.split("."):
        children = list(module.named_children())
        place = [other for other, _ in children].index(name)
        before += [child for _, child in children[:place]]
        after += [(module, other, child) for other, child in children[place + 1 :]]
        module = getattr(module, name)
    if last < count:
        del module[last:]
        for parent, name, child in after:
            if isinstance(child, nn.LayerNorm | nn.GroupNorm):
                setattr(parent, name, nn.Identity())  # of the last stage of all, and of its width
    return module, before


def _freeze_batch_norms(model: nn.Module) -> None:
    """Batch norms become frozen ones, with their buffers' names."""
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if type(norm) is nn.BatchNorm2d:
                module.add_module(name, FrozenBatchNorm2d(norm.num_features, norm.eps))


def _make_recomputable(model: nn.Module, stages: nn.ModuleList) -> None:
    """Blocks, the innermost that transformers would recompute, or whole stages, can be recomputed during backward."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    blocks = [
        m for m in layers if not any(isinstance(x, GradientCheckpointingLayer) for x in m.modules() if x is not m)
    ]
    for block in blocks or stages:
        kind = type(block)
        block.__class__ = type(f"Recomputable{kind.__name__}", (Recomputable, kind), {})
