"""The set loss of a case, by any backend, and how far it may be from float64."""

import torch

from dndetr.ops import LossWeights, set_loss
from dndetr.ops import _set_loss_cases as cases

WEIGHTS = LossWeights(1.5, 4.0, 3.0, 0.3)
NAMES = ("total", "parts", "grad logits", "grad boxes")


def run(case, backend, dtype=None, weights=WEIGHTS, **options):
    """Total, parts and gradients by name; the gradient of the total and of every part differs from one."""
    logits, boxes, *rest = case
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (logits, boxes)]
    total, parts = set_loss(*inputs, *rest, weights, backend, **options)
    slant = torch.linspace(0.5, 2, parts.numel(), dtype=parts.dtype, device=parts.device).view_as(parts)
    grads = torch.autograd.grad(0.7 * total + (slant * parts).sum(), inputs)
    return dict(zip(NAMES, (total.detach(), parts.detach(), *grads), strict=True))


def weights_of(name):
    """``WEIGHTS``, with what the case has of its own."""
    return WEIGHTS._replace(**cases.WEIGHTS.get(name, {}))


def error(given, exact):
    return ((given.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-6)).item() if exact.numel() else 0.0


def check_precision(name, backend, rounding, device="cpu"):
    """A case is at most twice as far from float64 as plain torch, forward and each gradient."""
    case, options = cases.make_case(name, device), cases.make_options(name, device)
    options["weights"] = weights_of(name)
    ways = ("reference", torch.float64), ("reference",), (backend,)
    exact, plain, given = (run(case, *way, **options) for way in ways)
    for part in NAMES:
        assert given[part].dtype == plain[part].dtype and given[part].shape == plain[part].shape
        assert error(given[part], exact[part]) <= max(2 * error(plain[part], exact[part]), rounding), (name, part)
