"""Gradients that are ops of their own: a second derivative is an error, not left out of a sum."""

import importlib

import pytest
import torch


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("op", ["set_loss", "group_attention", "conditional_attention", "ms_deform_attn"])
def test_a_second_derivative_is_refused(op):
    module = importlib.import_module(f"dndetr.ops.{op}")
    first, *others = module.make_case("tiny")
    first = first.requires_grad_()
    result = getattr(module, "ms_deform_attn_fused" if op == "ms_deform_attn" else op)(first, *others)
    loss = result[0] if isinstance(result, tuple) else result.square().sum()
    (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op} can be differentiated once; with backend='reference'"):
        gradient.square().sum().backward()
