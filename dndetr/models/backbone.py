"""ResNet (arXiv 1512.03385, stride in the 3x3 convolution) with torchvision's parameter names.

Published weights load by name. For small models from scratch the same class takes other depths, widths, norms and a
small-image stem.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import _backend
from ..ops._backend import plain_torch_only
from ..ops.conv3x3 import conv3x3
from ..ops.frozen_norm import frozen_norm
from ..ops.stem import stem
from .layers import Recomputable
from .linear import half_precision, is_watched

_LANES = 16  # float32 numbers in a register of AVX-512
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics and affine parameters, all of them buffers."""

    _kept = None  # what scale and shift were made from, and they themselves

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same, normalised; for networks whose convolutions know nothing of their norm."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """The same map as ``x * scale + shift``, two tensors [C], kept until a buffer changes.

        They are then made anew in place, for CUDA graphs that read them. What a graph does to buffers, or who writes to
        a buffer's ``data``, goes unnoticed.
        """
        buffers = (self.weight, self.bias, self.running_mean, self.running_var)
        if not _can_be_kept(buffers):
            return self._folded()
        state = [(x.data_ptr(), x._version, x.dtype, x.device) for x in buffers]
        if self._kept is None or self._kept[0] != state:
            if self.weight.is_cuda and torch.cuda.is_current_stream_capturing():
                return self._folded()  # values that are there only after a replay
            with torch.inference_mode(False), torch.no_grad():
                made = self._folded()
                if self._kept is not None and all(map(_alike, self._kept[1], made)):
                    made = [kept.copy_(new) for kept, new in zip(self._kept[1], made, strict=True)]
                # The buffers' memory is kept as well, lest others get its address.
                self._kept = state, tuple(made), [x.detach() for x in buffers]
        return self._kept[1]

    def _folded(self) -> tuple[Tensor, Tensor]:
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale

    def __getstate__(self):
        return {**self.__dict__, "_kept": None}  # addresses mean nothing to a copy

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Files saved from a trainable batch norm carry a step counter that means nothing here.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _can_be_kept(buffers: tuple[Tensor, ...]) -> bool:
    """Whether what is made of them now are plain tensors, of no trace, transform or graph of gradients."""
    return not (
        torch.compiler.is_compiling()
        or plain_torch_only()
        or torch._C._len_torch_dispatch_stack()
        or any(type(x) is not Tensor or x.is_inference() or x.requires_grad for x in buffers)
    )


def group_count(channels: int) -> int:
    """The largest usual number of groups that divides the channels: 32 where it does."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0)


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "frozen":
        return FrozenBatchNorm2d(channels)
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(group_count(channels), channels)
    raise ValueError(f"unknown norm {kind!r}: choose frozen, batch or group")


def _in_one_pass(x: Tensor, *norms: nn.Module) -> bool:
    """Whether these norms are applied by one kernel, after convolutions of ``x``."""
    frozen = all(isinstance(norm, FrozenBatchNorm2d) for norm in norms)
    return frozen and _backend.choose("frozen_norm", device_type=x.device.type)[0] != "reference"


def _conv_norm(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.Module,
    relu: bool = False,
    shortcut: Tensor | None = None,
    shortcut_norm: FrozenBatchNorm2d | None = None,
    twice: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(conv(x)) plus the shortcut, its positive part with ``relu``.

    ``shortcut_norm`` is still to be applied to the shortcut, in the same pass, and with ``twice`` the result comes
    twice, for two that take it: only where ``_in_one_pass`` says so.
    """
    if _in_one_pass(x, norm):
        x = _convolve(x, conv, conv.weight, None)
        own = (None, None) if shortcut_norm is None else shortcut_norm.scale_shift()
        return frozen_norm(x, *norm.scale_shift(), shortcut, relu, *own, twice=twice)
    if not isinstance(norm, FrozenBatchNorm2d):
        x = norm(_convolve(x, conv, conv.weight, None))
    else:
        # Folding into the kernel costs a pass over the weights instead of one over the activations.
        scale, shift = norm.scale_shift()
        x = _convolve(x, conv, conv.weight * scale[:, None, None, None], shift)
    # No gradient asks for what goes into these sums and ReLUs, so they may overwrite it.
    if shortcut is not None:
        x.add_(shortcut)
    return x.relu_() if relu else x


def _convolve(x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What ``conv`` does, with these weights."""
    if conv.kernel_size == (3, 3) and conv.padding == conv.dilation == (1, 1):
        return conv3x3(x, weight, bias, conv.stride[0])
    stride = conv.stride[0]
    if conv.kernel_size == (1, 1) and stride > 1 and x.is_cpu and x.shape[1] < _LANES:
        # In the gradient of such weights oneDNN writes beyond its own memory (torch 2.13 and 2.14, AVX-512).
        x, stride = x[:, :, ::stride, ::stride], 1
    return F.conv2d(x, weight, bias, stride, conv.padding, conv.dilation)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (size // 2)
    return nn.Conv2d(inputs, outputs, size, stride, padding, dilation, bias=False)


class _Block(Recomputable):
    """A residual block; ``expansion`` 1 is the basic block (two 3x3), 4 the bottleneck (1x1, 3x3, 1x1)."""

    def __init__(self, inputs: int, planes: int, stride: int, dilation: int, expansion: int, norm: str):
        super().__init__()
        outputs = planes * expansion
        if expansion == 1:
            self.conv1, self.conv2 = _conv(inputs, planes, 3, stride, dilation), _conv(planes, planes, 3, 1, dilation)
            self.conv3 = None
        else:
            self.conv1, self.conv2 = _conv(inputs, planes, 1), _conv(planes, planes, 3, stride, dilation)
            self.conv3, self.bn3 = _conv(planes, outputs, 1), _norm(norm, outputs)
        self.bn1, self.bn2 = _norm(norm, planes), _norm(norm, planes)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), _norm(norm, outputs))

    def forward(self, x: Tensor, twin: Tensor | None = None, twice: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, C, H, W] and, for the shortcut, itself again -> the block's map; ``twice``: for a block behind it."""
        last = (self.conv2, self.bn2) if self.conv3 is None else (self.conv3, self.bn3)
        shortcut, shortcut_norm = x if twin is None else twin, None
        if self.downsample is not None:
            conv, norm = self.downsample
            if _in_one_pass(x, norm, last[1]):
                shortcut, shortcut_norm = _convolve(shortcut, conv, conv.weight, None), norm
            else:
                shortcut = _conv_norm(shortcut, conv, norm)
        x = _conv_norm(x, self.conv1, self.bn1, relu=True)
        if self.conv3 is not None:
            x = _conv_norm(x, self.conv2, self.bn2, relu=True)
        twice = twice and _in_one_pass(x, last[1])
        return _conv_norm(x, *last, True, shortcut, shortcut_norm, twice)


def _through(stage: nn.Sequential, x: Tensor, twin: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x, and itself again for the first shortcut, through blocks -> the same of the last, the twin where there is one.

    A block's map goes to the next one's convolution and to its shortcut. Where both take the same tensor, autograd adds
    their gradients in a pass of its own. Blocks that are watched, or others' own, take and return single maps.
    """
    if type(stage) is not nn.Sequential or is_watched(stage):
        return stage(x), None
    for block in stage:
        out = block(x, twin, True) if type(block) is _Block and not is_watched(block) else block(x)
        x, twin = out if isinstance(out, tuple) else (out, None)
    return x, twin


class PartlyFrozen(nn.Module):
    """A backbone of which some parts have no gradient, and keep the batch statistics that they came with."""

    _frozen_parts: Sequence[nn.Module] = ()

    def _freeze(self, parts: Sequence[nn.Module]) -> None:
        self._frozen_parts = parts
        for part in parts:
            part.requires_grad_(False)

    def train(self, mode: bool = True):
        """Training mode, but for the frozen parts."""
        super().train(mode)
        for part in self._frozen_parts:
            part.eval()
        return self


class ResNet(PartlyFrozen):
    """Feature maps of a residual network, finest first.

    blocks and planes per stage (up to four stages, torchvision's ``layer1`` to ``layer4``, strides 4, 8, 16, 32);
    expansion 4 for bottlenecks; stem "imagenet" (7x7 stride 2 and max-pool, 64 wide) or "small" (two 3x3 stride 2, as
    wide as the first stage); norm "frozen", "batch" or "group"; dilate_last keeps the last stage at the stride of the
    one before (DC5); frozen counts the parts without gradient: 1 the stem, 2 also layer1, ...; outputs names the stages
    (1 to 4) whose maps are returned. Images may be of any size: ``multiple`` is 1.
    """

    multiple = 1

    def __init__(
        self,
        blocks: tuple[int, ...],
        planes: tuple[int, ...] = (64, 128, 256, 512),
        expansion: int = 1,
        stem: str = "imagenet",
        norm: str = "frozen",
        dilate_last: bool = False,
        frozen: int = 2,
        outputs: tuple[int, ...] = (4,),
    ):
        super().__init__()
        self.outputs = outputs
        if stem == "imagenet":
            width = 64
            self.conv1, self.bn1 = _conv(3, width, 7, 2), _norm(norm, width)
            self.conv2 = None
        elif stem == "small":
            width = planes[0]
            self.conv1, self.bn1 = _conv(3, width, 3, 2), _norm(norm, width)
            self.conv2, self.bn2 = _conv(width, width, 3, 2), _norm(norm, width)
        else:
            raise ValueError(f"unknown stem {stem!r}: choose imagenet or small")
        stages, stride, self.widths, self.strides = max(outputs), 4, [], []
        for number in range(1, stages + 1):
            dilated = dilate_last and number == stages
            step = 1 if number == 1 or dilated else 2
            stride *= step
            layer = []
            for index in range(blocks[number - 1]):
                # torchvision's dilated stage starts with the undilated block that used to carry the stride.
                dilation = 2 if dilated and index else 1
                layer.append(_Block(width, planes[number - 1], step if index == 0 else 1, dilation, expansion, norm))
                width = planes[number - 1] * expansion
            self.add_module(f"layer{number}", nn.Sequential(*layer))
            if number in outputs:
                self.widths.append(width)
                self.strides.append(stride)
        self._initialise()
        parts = [["conv1", "bn1", "conv2", "bn2"]] + [[f"layer{number}"] for number in range(1, stages + 1)]
        self._freeze([getattr(self, n) for part in parts[:frozen] for n in part if getattr(self, n, None)])

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, _Block) and not isinstance(module.bn2, FrozenBatchNorm2d):
                # A block that starts as the identity trains faster from scratch.
                nn.init.zeros_((module.bn2 if module.conv3 is None else module.bn3).weight)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W] -> maps [B, C, h, w] of the stages in ``outputs``."""
        maps, x, twin = [], self._stem(images), None
        for number in range(1, max(self.outputs) + 1):
            x, twin = _through(getattr(self, f"layer{number}"), x, twin)
            if number in self.outputs:
                maps.append(x)
        return maps

    def _stem(self, images: Tensor) -> Tensor:
        half = self._stem_precision(images)
        if half is not None:
            return stem(images, self.conv1.weight.to(half), *self.bn1.scale_shift())
        x = _conv_norm(images.contiguous(memory_format=torch.channels_last), self.conv1, self.bn1, relu=True)
        return F.max_pool2d(x, 3, 2, 1) if self.conv2 is None else _conv_norm(x, self.conv2, self.bn2, relu=True)

    def _stem_precision(self, images: Tensor) -> torch.dtype | None:
        """The half precision in which the stem has kernels of its own for these images; None where it has not."""
        weight = self.conv1.weight
        if self.conv2 is not None or not isinstance(self.bn1, FrozenBatchNorm2d):
            return None
        if torch.is_grad_enabled() and (weight.requires_grad or images.requires_grad):
            return None
        half = half_precision(images, weight)
        if half is None or _backend.choose("stem", device_type=images.device.type)[0] == "reference":
            return None
        return half
