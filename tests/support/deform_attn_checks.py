"""What tests of deformable attention compare: output and gradients by name, with the reference."""

import importlib

import torch

# The package exports the function under the module's name.
op = importlib.import_module("dndetr.ops.ms_deform_attn")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("out", "value", "reference_points", "offsets", "logits")
TAKEN = [name for name, case in op.CASES.items() if case[3] % 4 == 0]


def error(given, exact):
    if not exact.numel():
        return 0.0
    return ((given.double() - exact.double()).abs().max() / exact.double().abs().max().clamp_min(1e-30)).item()


def reference(arguments, dtype=None, grad_dtype=torch.float32):
    """Output and gradients by name; the gradient of the output is the same for all dtypes."""
    value, shapes, *points, valid = arguments
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (value, *points)]
    out = op.ms_deform_attn_fused_reference(inputs[0], shapes, *inputs[1:], valid)
    grads = torch.autograd.grad(out, inputs, grad_of(out).to(grad_dtype).to(out.dtype))
    return dict(zip(NAMES, (out.detach(), *grads), strict=True))


def grad_of(out):
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out)


def flat(shapes):
    return [side for shape in shapes for side in shape]


def as_close_as_the_reference(given, arguments, dtype):
    exact, plain = reference(arguments, torch.float64, dtype), reference(arguments, grad_dtype=dtype)
    for part in NAMES:
        # Another order of the reference's float32 sums is enough to pass twice its error where that is a rounding unit.
        precise = given[part].dtype == torch.float32 and (dtype == torch.float32 or given[part].is_cuda)
        rounding = 4e-6 if precise else 0
        assert given[part].dtype == plain[part].dtype and given[part].shape == plain[part].shape
        assert error(given[part], exact[part]) <= max(2 * error(plain[part], exact[part]), rounding), part
