"""Query denoising for a Hugging Face DETR, by PyTorch's own hooks: no class and no method of transformers is changed.

In a training forward with labels, noised queries are put in front of the decoder's own, the decoder's self-attention
gets the mask of the groups (query_groups.py: takes no mask), and the loss function splits its inputs: the model's own
loss of the matching queries plus the denoising loss. The outputs returned hold matching queries only. In any other
forward no hook does anything.
"""

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from ..batch import Targets
from ..boxes import inverse_sigmoid
from ..denoising import NoisedQueries, draw_noise, noised_queries
from ..ops import GroupLayout
from ..ops._backend import plain_torch_only
from ..transformers_installed import require_transformers
from .families import FAMILIES, Family, QueryEmbedding, Rows
from .labels import check_labels, to_targets
from .query_groups import BesideQueryGroups, KeptGroups
from .rebind import set_loss_function
from .wrapped import of_compile_or_parallel, of_peft

NAME = "denoising"  # of the submodule that a denoised model has


@dataclass
class Step:
    """Noised queries of one forward pass; layout and mask are known once the decoder is reached."""

    targets: Targets
    noised: NoisedQueries
    layout: GroupLayout | None = None
    mask: Tensor | None = None  # [B, 1, Q, Q], -inf where attention is blocked; None where attention takes no mask
    as_tuple: bool = False  # what the caller wants back


class Denoising(nn.Module):
    """What ``denoise`` adds to a model, as its submodule ``denoising``.

    groups, label_noise, box_noise, weight (of the denoising loss) and contrastive may be changed between steps. The
    module's parameters, a label table and where needed a position MLP, are trained with the model's and moved with it,
    but the model's ``state_dict`` leaves them out; keep them with ``torch.save(model.denoising.state_dict(), path)``.
    """

    def __init__(
        self,
        family: Family,
        config,
        groups: int,
        label_noise: float,
        box_noise: float,
        weight: float,
        contrastive: bool,
        kept_groups: KeptGroups | None,
    ):
        super().__init__()
        self.family, self.classes = family, config.num_labels
        self.groups, self.label_noise, self.box_noise, self.weight = groups, label_noise, box_noise, weight
        self.contrastive, self.kept_groups = contrastive, kept_groups
        width = config.d_model if hasattr(config, "d_model") else config.hidden_size
        self.embedding = QueryEmbedding(config.num_labels, width, family.with_position)
        self.step: Step | None = None
        self.active = False  # whether a denoised forward pass is under way
        # The forward pass of each layer's input, by the memory of that input: gradient checkpointing computes layers
        # again long after the forward pass, which may not be the last one.
        self.steps: dict[StorageWeakRef, Step] = {}
        self.own_loss = None
        self.handles = []

    def attach(self, model: nn.Module) -> None:
        """Register every hook and take the loss function's place."""
        parameters = list(inspect.signature(type(model).forward).parameters)
        self.labels_index = parameters.index("labels") - 1  # among positional arguments, without self
        self.own_loss = model.loss_function
        model.loss_function = self.loss
        for handle in self._hooks(model):
            self.handles.append(handle)

    def _hooks(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Register the hooks, one after the other."""
        decoder = model.model.decoder
        yield model.register_forward_pre_hook(self.before_model, with_kwargs=True)
        yield model.register_forward_hook(self.after_model, always_call=True)
        yield decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True)
        yield model.model.register_forward_hook(self.after_base)
        yield model.register_state_dict_post_hook(_leave_out)
        yield model.register_load_state_dict_pre_hook(_keep)
        for name, rows in self.family.replaced.items():
            yield getattr(decoder, name).register_forward_hook(partial(self.after_replaced, rows))
        for layer in decoder.layers:
            if self.family.query_groups:
                beside = BesideQueryGroups(self.step_of)
                yield layer.self_attn.register_forward_pre_hook(beside.before, with_kwargs=True)
                yield layer.self_attn.register_forward_hook(beside.after, with_kwargs=True, always_call=True)
            else:
                yield layer.self_attn.register_forward_pre_hook(self.before_attention, with_kwargs=True)
        if self.kept_groups is not None:
            yield from self.kept_groups.attach(model)

    def detach(self, model: nn.Module) -> None:
        """Undo ``attach``, or as much of it as was done."""
        for handle in self.handles:
            handle.remove()
        if self.kept_groups is not None:
            self.kept_groups.detach(model)
        if self.own_loss is not None:
            set_loss_function(model, self.own_loss)

    def before_model(self, model, args, kwargs):
        labels = args[self.labels_index] if len(args) > self.labels_index else kwargs.get("labels")
        self.active = model.training and labels is not None
        if not self.active:
            return None
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "denoising does not run under nn.DataParallel, whose threads share one module: start a process for "
                "each GPU (torchrun, DistributedDataParallel), or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        implementation = model.config._attn_implementation
        if not self.family.query_groups and implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"denoising needs an attention that takes masks, not {implementation!r}: "
                "load the model with attn_implementation='sdpa'"
            )
        if not self.embedding.label.weight.requires_grad:
            warnings.warn(
                "the weights of denoising are frozen, as PEFT leaves what it finds: wrap the model first, then denoise",
                stacklevel=2,
            )
        targets = to_targets(labels, self.embedding.label.weight.device)
        if targets.labels.is_cpu and not torch.compiler.is_compiling():  # elsewhere it would wait
            check_labels(targets, self.classes)
        noised = self._noised(targets)
        self.steps = {memory: step for memory, step in self.steps.items() if not memory.expired()}
        wanted = kwargs.get("return_dict")
        self.step = Step(targets, noised, as_tuple=not (model.config.return_dict if wanted is None else wanted))
        return args, {**kwargs, "return_dict": True}

    def _noised(self, targets: Targets) -> NoisedQueries:
        noise = draw_noise(targets, self.groups, self.classes, contrastive=self.contrastive)
        noised = noised_queries(targets, noise, self.label_noise, self.box_noise, contrastive=self.contrastive)
        if not self.contrastive:
            return noised
        # Where corners have passed each other, sizes are negative. DINO's decoder never sees them: its anchors are
        # logits, whose clamp makes such a box 0.001 wide. The same boxes go everywhere here: from a negative width,
        # deformable attention would sample mirrored points, and a position vector would encode what no anchor can be.
        return replace(noised, boxes=inverse_sigmoid(noised.boxes).sigmoid())

    def before_decoder(self, decoder, args, kwargs):
        if not self.active:
            return None
        if kwargs.get("attention_mask") is not None:
            raise ValueError(
                "denoising: the decoder's self-attention has a mask already: leave decoder_attention_mask out"
            )
        step, matching = self.step, kwargs["inputs_embeds"]
        if (images := len(step.targets.counts)) != len(matching):
            raise ValueError(f"denoising: labels of {images} images, but {len(matching)} in the batch")
        step.layout = step.noised.layout(matching.shape[1])
        if not self.family.query_groups:
            blocked = step.layout.blocked(step.noised.active)
            step.mask = torch.zeros_like(blocked, dtype=matching.dtype).masked_fill(blocked, -torch.inf)[:, None]
        for name, rows in self.family.enters.items():
            first = rows(step.noised, self.embedding, kwargs[name].shape[-1]).to(kwargs[name].dtype)
            kwargs[name] = torch.cat((first, kwargs[name]), dim=1)
        return args, kwargs

    def after_base(self, base, args, output):
        if not self.active:
            return
        for name, rows in self.family.joins.items():
            first = rows(self.step.noised, self.embedding, output[name].shape[-1])
            output[name] = torch.cat((first.to(output[name].dtype), output[name]), dim=1)

    def before_attention(self, attention, args, kwargs):
        queries = kwargs["hidden_states"]
        if (step := self.step_of(queries)) is not None:
            kwargs["attention_mask"] = step.mask.to(queries.dtype)
        return args, kwargs

    def step_of(self, queries: Tensor) -> Step | None:
        """The forward pass that a layer's input is part of, None where no noised queries are in it."""
        if torch.compiler.is_compiling() or plain_torch_only():  # traced once, with the mask as a value of the graph
            return self.step if self.active else None
        memory = StorageWeakRef(queries.untyped_storage())
        if self.active:
            if self.step.layout.denoising:
                self.steps[memory] = self.step
        elif memory not in self.steps and any(s.layout.queries == queries.shape[1] for s in self.steps.values()):
            raise RuntimeError(
                "denoising: a layer is computed again for backward, but not from the tensor of its forward pass, so "
                "its mask is not known: checkpoint layers without moving their inputs (activation offloading)"
            )
        return self.steps.get(memory)

    def after_replaced(self, rows: Rows, module, args, output):
        if not self.active:
            return None
        first = rows(self.step.noised, self.embedding, output.shape[-1])
        return torch.cat((first.to(output.dtype), output[:, first.shape[1] :]), dim=1)

    def loss(
        self, logits, labels, device, pred_boxes, config, outputs_class=None, outputs_coord=None, *of_encoder, **kwargs
    ):
        """The model's own loss of the matching queries plus that of the noised ones; arguments as in transformers."""
        if not self.active:
            every_layer = outputs_class, outputs_coord, *of_encoder
            return self.own_loss(logits, labels, device, pred_boxes, config, *every_layer, **kwargs)
        first = self.step.layout.denoising
        own_class, own_coord = (x if x is None else x[:, :, first:] for x in (outputs_class, outputs_coord))
        own = logits[:, first:], labels, device, pred_boxes[:, first:], config, own_class, own_coord
        loss, loss_dict, auxiliary_outputs = self.own_loss(*own, *of_encoder, **kwargs)
        if not config.auxiliary_loss:  # then the last layer is all that has a loss
            outputs_class, outputs_coord = logits[None], pred_boxes[None]
        total, parts = self.family.loss(
            config,
            outputs_class[:, :, :first],
            outputs_coord[:, :, :first],
            self.step.targets,
            self.step.layout.groups,
            _mean_over_processes(self.step.targets.counts.sum()),
        )
        last = len(parts) - 1
        for layer, row in enumerate(parts.detach()):
            for name, part in zip(("dn_loss_ce", "dn_loss_bbox", "dn_loss_giou"), row, strict=True):
                loss_dict[name if layer == last else f"{name}_{layer}"] = part
        return loss + self.weight * total, loss_dict, auxiliary_outputs

    def after_model(self, model, args, output):
        if not self.active:
            return None
        self.active = False
        if output is None:  # the forward pass has raised
            return None
        first, queries = self.step.layout.denoising, self.step.layout.queries
        for name, dimensions in self.family.leaves.items():
            value = output.get(name)
            if value is None:
                continue
            parts = value if isinstance(value, tuple) else (value,)
            for dimension in dimensions:
                if any(part.shape[dimension] != queries for part in parts):
                    raise RuntimeError(f"denoising: {name} of {type(model).__name__} is not laid out as expected")
                parts = tuple(part.narrow(dimension, first, queries - first) for part in parts)
            output[name] = parts if isinstance(value, tuple) else parts[0]
        return output.to_tuple() if self.step.as_tuple else output

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As of every module, but all or nothing: RuntimeError for tensors of other shapes before any is taken."""
        for name, own in self.state_dict().items():
            if name in state_dict and state_dict[name].shape != own.shape:
                raise RuntimeError(
                    f"denoising: {name} is {list(state_dict[name].shape)} there and {list(own.shape)} here: these are "
                    "the weights of a model with other classes or of another width"
                )
        return super().load_state_dict(state_dict, *args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "step": None, "active": False, "steps": {}}


def _mean_over_processes(count: Tensor) -> Tensor:
    """As transformers does it: the number of objects per process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count
    count = count.float()
    torch.distributed.all_reduce(count)
    return count / torch.distributed.get_world_size()


def _leave_out(model: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    inside = f"{prefix}{NAME}."
    for key in [key for key in state_dict if key.startswith(inside)]:
        del state_dict[key]


def _keep(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    # A plain model's weights: ours are not among them, and stay as they are.
    for key, value in getattr(model, NAME).state_dict().items():
        state_dict.setdefault(f"{prefix}{NAME}.{key}", value)


def denoise(
    model: nn.Module,
    groups: int = 5,
    label_noise: float = 0.2,
    box_noise: float = 0.4,
    weight: float = 1.0,
    contrastive: bool = False,
    keep_groups: int | None = None,
) -> nn.Module:
    """Train a Hugging Face DETR with query denoising (arXiv 2203.01305) -> the same model.

    For DabDetr-, ConditionalDetr-, DeformableDetr-, Detr-, LwDetr- and RfDetrForObjectDetection of transformers. From
    then on a forward pass in training mode with labels also restores ``groups`` noised copies of them; ``outputs.loss``
    holds both losses, ``outputs.loss_dict`` also the parts ``dn_loss_ce``, ``dn_loss_bbox`` and ``dn_loss_giou`` (with
    ``_0``, ... for earlier layers where ``config.auxiliary_loss`` is on, which is how the paper trains). All else stays
    the plain model: outputs, evaluation, ``state_dict``, ``save_pretrained``. Make the optimizer afterwards: the model
    has new parameters, in the submodule ``denoising`` (:class:`Denoising`).
    ``groups=0`` takes denoising out again; label_noise and box_noise as in :func:`dndetr.denoising.noised_queries`;
    weight: of the denoising loss beside the model's own; contrastive: every copy is a positive, to be restored, and a
    negative with more noise, to be rejected, which is in the class loss alone (DINO, arXiv 2203.03605); keep_groups:
    how many of the query groups of LW-DETR or RF-DETR (``config.group_detr``) training keeps, all by default. Noised
    queries see the first group, the one that is there at test time; idle groups stay in the model and in its files.
    A PeftModel is denoised inside; what torch.compile or data parallelism has wrapped is refused (TypeError).
    """
    require_transformers("dndetr.denoise")
    if groups < 0 or not 0 <= label_noise <= 1 or not 0 <= box_noise <= 1:
        raise ValueError(
            f"dndetr.denoise: groups must be 0 or more, label_noise and box_noise between 0 and 1, "
            f"got {groups}, {label_noise}, {box_noise}"
        )
    if groups == 0 and keep_groups is not None:
        raise ValueError("dndetr.denoise: groups=0 takes all of denoising out: leave keep_groups out")
    outer, model = model, of_peft(model) or model
    if of_compile_or_parallel(model) is not None:
        raise TypeError(
            f"dndetr.denoise: {type(model).__name__} is already around the model and would not notice the change: "
            "denoise the model first, then wrap it"
        )
    present = getattr(model, NAME, None)
    if groups == 0:
        if isinstance(present, Denoising):
            present.detach(model)
            delattr(model, NAME)
        return outer
    if present is not None:
        raise ValueError(
            f"{type(model).__name__} is denoised already: set model.{NAME}.groups and the like, "
            "or take denoising out first with dndetr.denoise(model, groups=0)"
        )
    family = next((FAMILIES[base.__name__] for base in type(model).__mro__ if base.__name__ in FAMILIES), None)
    if family is None:
        raise TypeError(f"dndetr.denoise works on {', '.join(FAMILIES)}, not on {type(model).__name__}")
    family.check(model)
    kept = None if keep_groups is None else KeptGroups(model, keep_groups)
    added = Denoising(family, model.config, groups, label_noise, box_noise, weight, contrastive, kept)
    like = next(model.model.decoder.parameters())
    model.add_module(NAME, added.to(like.device, like.dtype))
    try:
        added.attach(model)
    except BaseException:  # all of it, or nothing
        added.detach(model)
        delattr(model, NAME)
        raise
    return outer
