"""Models that train several groups of queries at once (Group DETR, arXiv 2207.13085): LW-DETR and RF-DETR.

Their self-attention in training takes no mask: it splits the queries into ``config.group_detr`` groups, which do not
see each other. At test time only the first group is there. So it is the one that noised queries see, besides their own
denoising group, and no query group sees them.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..ops import group_attention

# Of the model without heads: one entry per group in the lists, and in the tables the groups' rows, one after the other.
LISTS = ("enc_output", "enc_output_norm", "enc_out_bbox_embed", "enc_out_class_embed")
TABLES = ("reference_point_embed", "query_feat")


class BesideQueryGroups:
    """Two hooks around a self-attention that splits its queries into groups: noised rows are led past it.

    The module gets the matching rows alone and does with them what it always does. Noised rows go through its
    projections and our group attention; there is no dropout of their attention weights. The weights that the module
    returns are those of matching rows.

    step_of: from the module's input to the forward pass that it is part of, None where no noised rows are in it.
    """

    def __init__(self, step_of: Callable):
        self.step_of = step_of
        self.whole = None  # input and step, between the hooks

    def before(self, attention: nn.Module, args: tuple, kwargs: dict):
        queries = args[0] if args else kwargs["hidden_states"]
        step, self.whole = self.step_of(queries), None  # an interrupted pass (Ctrl-C) has left its own
        if step is None:
            return None
        positions, first = kwargs["position_embeddings"], step.layout.denoising
        self.whole = queries, positions, step
        own = {"hidden_states": queries[:, first:], "position_embeddings": positions[:, first:]}
        return (), {**kwargs, **own}

    def after(self, attention: nn.Module, args: tuple, kwargs: dict, output: tuple | None):
        if self.whole is None:
            return None
        whole, self.whole = self.whole, None
        if output is None:  # the module has raised
            return None
        noised = self._attend(attention, *whole)
        return torch.cat((noised.to(output[0].dtype), output[0]), dim=1), *output[1:]

    @staticmethod
    def _attend(attention: nn.Module, queries: Tensor, positions: Tensor, step) -> Tensor:
        first = step.layout.denoising
        layout = step.layout._replace(matching=step.layout.matching // attention.config.group_detr)
        content = queries[:, : layout.queries]
        placed = content + positions[:, : layout.queries]
        projected = attention.q_proj(placed), attention.k_proj(placed), attention.v_proj(content)
        q, k, v = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in projected)
        found = group_attention(q, k, v, layout, step.noised.active, attention.scaling)
        return attention.o_proj(found[:, :, :first].transpose(1, 2).flatten(2))


class FewerGroups:
    """A model's config that says another number of query groups, and else whatever the config itself says."""

    def __init__(self, config, groups: int):
        self.config, self.group_detr = config, groups

    def __getattr__(self, name: str):
        if name.startswith("__"):  # what copies and pickles ask a class for is not the config's to answer
            raise AttributeError(name)
        return getattr(self.config, name)


class KeptGroups:
    """Trains the first ``kept`` query groups of one model; weights, ``state_dict`` and the config it saves stay whole.

    Idle groups get no gradient. Their layers ask for none either, so that DistributedDataParallel does not wait for
    them. Their rows of the two tables share a parameter with those in use: the gradient there is 0, and an optimizer
    with weight decay makes them smaller.
    """

    def __init__(self, model: nn.Module, kept: int):
        own = getattr(model.config, "group_detr", None)
        if own is None:
            raise ValueError(f"dndetr.denoise: {type(model).__name__} has no query groups: leave keep_groups out")
        if not 1 <= kept <= own:
            raise ValueError(
                f"dndetr.denoise: keep_groups must be between 1 and {own}, the query groups of this "
                f"{type(model).__name__}, got {kept}"
            )
        self.kept = kept
        self.config = FewerGroups(model.config, kept)
        idle = [part for name in LISTS for layer in getattr(model.model, name)[kept:] for part in layer.parameters()]
        self.frozen = [parameter for parameter in idle if parameter.requires_grad]

    def attach(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Make ``model`` train fewer groups; the hooks, one after the other as they are registered."""
        self._set(model, self.config, self.kept, trained=False)
        yield model.register_forward_pre_hook(self.before_model)
        yield model.register_forward_hook(self.after_model, always_call=True)
        yield model.model.register_forward_pre_hook(self.before_base)
        yield model.model.register_forward_hook(self.after_base, always_call=True)

    def detach(self, model: nn.Module) -> None:
        """Undo what ``attach`` does besides registering hooks, and what an interrupted pass (Ctrl-C) has left."""
        self.after_model(model, (), None)
        self.after_base(model.model, (), None)
        self._set(model, model.config, model.config.group_detr, trained=True)

    def _set(self, model: nn.Module, config, groups: int, trained: bool) -> None:
        model.model.group_detr = groups
        for layer in model.model.decoder.layers:
            layer.self_attn.config = config  # layers computed again for backward read it, too
        for parameter in self.frozen:
            parameter.requires_grad_(trained)

    def before_model(self, model, args):
        if model.training:
            model.config = self.config

    def after_model(self, model, args, output):
        if model.config is self.config:
            model.config = self.config.config

    def before_base(self, base, args):
        if not base.training:
            return
        for name in TABLES:  # found before the submodule of that name, which stays what it is
            rows = base.get_submodule(name).weight[: self.kept * base.num_queries]
            vars(base)[name] = SimpleNamespace(weight=rows)

    def after_base(self, base, args, output):
        for name in TABLES:
            vars(base).pop(name, None)
