"""Group attention in plain torch, its gradient written out: no mask, few operations, scores that stay in the cache.

The matching queries are one attention. Each group is another, over its own keys and the matching ones: the scores
with its own are a product per group, those with the matching keys one product for all groups. Images and heads are
taken in portions whose scores stay in the cache; their probabilities are kept for the backward pass.
"""

import torch
from torch import Tensor

from ._attention import empty_heads

CACHE = 4 << 20  # bytes of scores in one portion


def split_attention(q: Tensor, k: Tensor, v: Tensor, layout, active: Tensor | None, scale: float) -> Tensor:
    """Arguments and result as of ``group_attention``."""
    return _SplitAttention.apply(q, k, v, tuple(layout), active, scale)


def _portions(q: Tensor, layout) -> list[tuple[slice, slice]]:
    """Slices of images and heads: several whole images, or some heads of one."""
    batch, heads = q.shape[:2]
    groups, slots, matching = layout
    scores = groups * slots * (slots + matching) + matching * matching
    together = max(1, CACHE // max(1, scores * q.element_size()))
    images, heads_each = max(1, together // heads), min(heads, together)
    return [
        (slice(b, b + images), slice(h, h + heads_each))
        for b in range(0, batch, images)
        for h in range(0, heads, heads_each)
    ]


def _parts(x: Tensor, layout) -> tuple[Tensor, Tensor]:
    """[b, h, Q, D] -> every group [b * h * G, slots, D] and every matching part [b * h, N, D], contiguous."""
    groups, slots, matching = layout
    noised, count, width = groups * slots, x.shape[0] * x.shape[1], x.shape[3]
    own = x[:, :, :noised].reshape(count * groups, slots, width)
    return own, x[:, :, noised:].reshape(count, matching, width)


def _own(x: Tensor, slots: int) -> Tensor:
    """The columns [b * h, G * slots, slots + N] -> [b * h * G, slots, slots] of each group's own keys, a view."""
    return x.view(-1, slots, x.shape[-1])[..., :slots]


class _SplitAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout, active, scale):
        groups, slots, _ = layout
        noised = groups * slots
        dead = None if active is None or not noised else torch.arange(slots, device=q.device) >= active[:, None]
        out, kept = empty_heads(v), []
        for at in _portions(q, layout):
            (q_own, q_shared), (k_own, k_shared), (v_own, v_shared) = (
                _parts(x, layout) for x in (q[at] * scale, k[at], v[at])
            )
            if noised:
                rows = (len(q_shared), noised, -1)
                own = torch.bmm(q_own, k_own.transpose(1, 2))
                if dead is not None:
                    # A finite number: where no slot is live and nothing matches, the softmax stays free of NaN.
                    lowest = torch.finfo(q.dtype).min
                    own.view(len(dead[at[0]]), -1, slots).masked_fill_(dead[at[0], None], lowest)
                shared = torch.bmm(q_own.view(rows), k_shared.transpose(1, 2))
                p = torch.softmax(torch.cat((own.view(rows), shared), dim=-1), dim=-1)
                mixed = torch.bmm(p[..., slots:], v_shared)
                mixed.view(v_own.shape).baddbmm_(_own(p, slots), v_own)
                out[at][:, :, :noised] = mixed.view(out[at][:, :, :noised].shape)
                kept.append(p)
            p = torch.softmax(torch.bmm(q_shared, k_shared.transpose(1, 2)), dim=-1)
            out[at][:, :, noised:] = torch.bmm(p, v_shared).view(out[at][:, :, noised:].shape)
            kept.append(p)
        if dead is not None:
            out[:, :, :noised].unflatten(2, (groups, slots)).masked_fill_(dead[:, None, None, :, None], 0)
        ctx.layout, ctx.scale = layout, scale
        ctx.save_for_backward(q, k, v, dead, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        q, k, v, dead, *kept = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        groups, slots, _ = layout
        noised, kept = groups * slots, iter(kept)
        grads = empty_heads(q), empty_heads(k), empty_heads(v)
        for at in _portions(q, layout):
            (q_own, q_shared), (k_own, k_shared), (v_own, v_shared) = (
                _parts(x, layout) for x in (q[at] * scale, k[at], v[at])
            )
            grad_own, grad_shared = _parts(grad_out[at], layout)
            if noised:
                rows = (len(q_shared), noised, -1)
                if dead is not None:
                    images = len(dead[at[0]])
                    by_slot = grad_own.view(images, -1, slots, grad_own.shape[-1])
                    grad_own = by_slot.masked_fill(dead[at[0], None, :, None], 0).view(grad_own.shape)
                grad_rows, q_rows = grad_own.view(rows), q_own.view(rows)
                p = next(kept)
                dp = torch.cat(
                    (
                        torch.bmm(grad_own, v_own.transpose(1, 2)).view(rows),
                        torch.bmm(grad_rows, v_shared.transpose(1, 2)),
                    ),
                    dim=-1,
                )
                ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
                p_own, ds_own, p, ds = _own(p, slots), _own(ds, slots), p[..., slots:], ds[..., slots:]
                dq = torch.bmm(ds, k_shared)
                dq.view(q_own.shape).baddbmm_(ds_own, k_own)
                dk, dv = torch.bmm(ds_own.transpose(1, 2), q_own), torch.bmm(p_own.transpose(1, 2), grad_own)
                dk_shared, dv_shared = torch.bmm(ds.transpose(1, 2), q_rows), torch.bmm(p.transpose(1, 2), grad_rows)
            p = next(kept)
            ds = torch._softmax_backward_data(torch.bmm(grad_shared, v_shared.transpose(1, 2)), p, -1, p.dtype)
            shared = [
                torch.bmm(ds, k_shared),
                torch.bmm(ds.transpose(1, 2), q_shared),
                torch.bmm(p.transpose(1, 2), grad_shared),
            ]
            if noised:
                shared[1] += dk_shared
                shared[2] += dv_shared
                for grad, own in zip(grads, (dq, dk, dv), strict=True):
                    grad[at][:, :, :noised] = own.view(grad[at][:, :, :noised].shape)
            for grad, rows in zip(grads, shared, strict=True):
                grad[at][:, :, noised:] = rows.view(grad[at][:, :, noised:].shape)
        grads[0].mul_(scale)
        return *grads, None, None, None
