"""Runs whole training steps of the named detectors on fake tensors of a device that exists only as a name.

A program of its own (see ``test_step.py``): prints each detector that made it, fails at the first host synchronisation.
Arguments are names with numbers of denoising groups, as ``dino:5``, or ``dino:5:federated`` for such annotations.
"""

import sys
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_impls import register_op_impl
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import detectors  # noqa: E402
from fake_gpu import NoHostSync  # noqa: E402

from dndetr.training.optim import WeightAverage  # noqa: E402


class Module(_DummyBackendModule):
    """What ``torch.fakegpu`` is."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


@register_op_impl(torch.ops.aten._fused_adamw_.tensor_lr)
def fused_adamw(mode, op, *args, **kwargs):
    """In place, so there is nothing to describe; torch describes only the form with a learning rate on the host."""


def group_norm(self, x):
    """torch's own has no form for such a device."""
    grouped = x.unflatten(1, (self.num_groups, -1)).flatten(2)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normed = centred * (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
    return normed.view(x.shape) * self.weight[:, None, None] + self.bias[:, None, None]


torch.nn.GroupNorm.forward = group_norm
_setup_privateuseone_for_python_backend("fakegpu", Module())
mode = FakeTensorMode()
for argument in sys.argv[1:]:
    name, groups, *federated = argument.split(":")
    # Fake tensors have no memory that could be copied: what copies is made before.
    model = detectors.build(name)
    average = WeightAverage(model, 0.9)
    with mode, NoHostSync():
        detectors.emptied(average.model, "fakegpu")
        step = detectors.make_step(detectors.emptied(model, "fakegpu"), int(groups), average=average)
        batch = detectors.empty_batch("cpu")
        for _ in range(2):
            losses, norm = step(detectors.federated(batch) if federated else batch)
        assert losses.total.device.type == norm.device.type == "fakegpu"
        assert step.optimizer.state, "nothing was optimised"
        print(argument)
