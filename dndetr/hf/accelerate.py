"""Our deformable attention, losses and CPU products in place of those of a Hugging Face model, until ``undo``."""

from functools import partial

import torch
from torch import nn

from ..models import linear
from ..transformers_installed import require_transformers
from .attention import replace_attention
from .denoise import NAME, Denoising
from .matching import MatchedLoss, fuses, known_matcher
from .rebind import set_loss_function
from .wrapped import unwrapped


class Acceleration:
    """What was replaced in a model, by name: attention modules, linear layers, matcher, and the loss function where all
    of its losses were; ``print`` it, ``undo`` it.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.attention: list[str] = []
        self.linear: list[str] = []
        self.matcher: str | None = None
        self.losses: str | None = None
        self._undo = []
        try:
            self._replace()
        except BaseException:  # all of it, or nothing
            self.undo()
            raise

    def _replace(self) -> None:
        for name, module in self.model.named_modules():
            if undo := replace_attention(module):
                self.attention.append(name)
                self._undo.append(undo)
        loss = _loss(self.model)
        if loss is not None and (matcher := known_matcher(loss)):
            _set_loss(self.model, MatchedLoss(loss))
            self.matcher = matcher
            self.losses = loss.__name__ if fuses(loss, self.model.config) else None
        if (self.attention or self.matcher) and linear.onednn_is_faster():
            self._replace_products()

    def _replace_products(self) -> None:
        for name, module in self.model.named_modules():
            if type(module) is nn.Linear and module.weight.is_cpu and module.weight.dtype == torch.float32:
                self.linear.append(name)
                module.__class__ = linear.Linear
                self._undo.append(partial(setattr, module, "__class__", nn.Linear))

    def __str__(self) -> str:
        layers = f"deformable attention in {len(self.attention)} layers"
        if self.linear:
            layers += f", float32 products of {len(self.linear)} linear layers"
        matcher = f"the matcher of {self.matcher}" if self.matcher else "no matcher"
        loss = f"the losses of {self.losses}" if self.losses else matcher
        return f"{type(self.model).__name__}: replaced {layers}, and {loss}"

    def undo(self) -> None:
        """Make the model what it was; denoising, where there is any, stays."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        loss = _loss(self.model)
        if isinstance(loss, MatchedLoss):
            _set_loss(self.model, loss.own_loss)


def _loss(model: nn.Module):
    """The loss function of matching queries; None where a model has none."""
    if isinstance(added := getattr(model, NAME, None), Denoising):
        return added.own_loss
    if getattr(model, "loss_type", None) is None and not hasattr(model, "_loss_function"):
        return None  # a model without heads; transformers would warn and take a loss of language models
    return model.loss_function


def _set_loss(model: nn.Module, loss) -> None:
    if isinstance(added := getattr(model, NAME, None), Denoising):
        added.own_loss = loss
    else:
        set_loss_function(model, loss)


def accelerate(model: nn.Module) -> Acceleration:
    """Put a Hugging Face detector on our attention, losses and (on CPUs) products, in place -> what was replaced.

    Same outputs, losses and gradients up to rounding, same weights, ``state_dict`` and ``save_pretrained``. Attention:
    Deformable DETR, RT-DETR (v2), D-FINE, DEIMv2, LW-DETR, RF-DETR, Grounding DINO and every other model of
    transformers that shares their layer. Losses, with their matcher: Deformable DETR, Conditional DETR, DAB-DETR,
    LW-DETR and RF-DETR; the matcher alone: RT-DETR (v2), D-FINE, DEIMv2. ``print`` the result to see what was found;
    its ``undo()`` takes all of it back. What torch.compile, PEFT or data parallelism has wrapped is replaced inside the
    wrapper. An error (TypeError where there is nothing to replace, RuntimeError for layers that are not as expected)
    leaves the model as it was.
    """
    require_transformers("dndetr.accelerate")
    done = Acceleration(unwrapped(model))
    if not done.attention and done.matcher is None:
        raise TypeError(
            f"dndetr.accelerate found nothing to replace in {type(done.model).__name__}: "
            "it has no deformable attention and no matcher that is known, or is accelerated already"
        )
    return done
