"""Fast paths against references: outputs and every gradient by name."""

import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def outputs(function, inputs, names, *rest):
    """Result and named gradients of a weighted sum of it, in float64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, *rest)
    if out.numel():
        (
            out.double() * torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
        ).sum().backward()
    found = {"out": out.detach().double()}
    for name, leaf in zip(names, leaves, strict=True):
        found[name] = torch.zeros_like(leaf).double() if leaf.grad is None else leaf.grad.double()
    return found


def compare(fast, reference, inputs, names, dtype, *rest, least=0.0):
    """At most twice the reference's own error in ``dtype``, both against float64; ``least`` is always allowed."""
    exact = outputs(reference, [x.double() for x in inputs], names, *rest)
    plain = outputs(reference, inputs, names, *rest)
    ours = outputs(fast, inputs, names, *rest)
    floor = 8 * torch.finfo(dtype).eps
    for name, truth in exact.items():
        assert ours[name].isfinite().all(), name
        if truth.numel():
            allowed = 2 * (plain[name] - truth).abs().max() + floor * truth.abs().max() + least
            assert (ours[name] - truth).abs().max() <= allowed, name
