"""Every Triton attention kernel in Triton's interpreter: ``run`` takes names of checks, each printed when done.

To be imported in a process with TRITON_INTERPRET=1 (see ``test_attention.py``).
"""

import importlib
import os
from unittest import mock

import bfloat16_in_the_interpreter  # noqa: F401
import detectors
import goldens
import torch
from gradients import compare, outputs

from dndetr.batch import Targets
from dndetr.denoising import Noise, draw_noise, noised_queries
from dndetr.kernels import attention_tiles, tiles
from dndetr.kernels import conditional_attention as conditional_kernels
from dndetr.kernels.attention_tiles import Tile
from dndetr.ops import (
    GroupLayout,
    _backend,
    conditional_attention,
    group_attention,
    images_of,
    packed_attention,
)

group = importlib.import_module("dndetr.ops.group_attention")
conditional = importlib.import_module("dndetr.ops.conditional_attention")
PARTS = ("q_content", "q_position", "k_content", "k_position", "v")


def use(tile: Tile | None) -> None:
    """Force one tile for every kernel; None: the shipped table."""
    tiles._tuned.clear()
    if tile:
        tiles._tuned.update(dict.fromkeys(attention_tiles.TABLES[90], tile))


def groups(q, k, v, layout, active=None, scale=None):
    return group_attention(q, k, v, layout, active, scale, backend="triton")


def crossed(*inputs):
    return conditional_attention(*inputs, backend="triton")


def together(*inputs):
    return packed_attention(*inputs, backend="triton")


def close(ours, reference, inputs, names, *rest):
    """float32 outputs and gradients to 1e-5 of the largest."""
    given, expected = outputs(ours, inputs, names, *rest), outputs(reference, inputs, names, *rest)
    for name, truth in expected.items():
        if truth.numel():
            error = (given[name] - truth).abs().max()
            assert error <= 1e-5 * truth.abs().max().clamp(min=1), (name, error)


def packed(batch, heads, queries, width, v_width=None, dtype=torch.float32):
    x = torch.randn(batch, queries, heads, 2 * width + (v_width or width), dtype=torch.float64).to(dtype)
    return (part.transpose(1, 2) for part in x.split([width, width, v_width or width], dim=-1))


def check_cases():
    for name in group.CASES:
        q, k, v, layout, active = group.make_case(name)
        close(groups, group.group_attention_reference, (q, k, v), "qkv", layout, active)
    for name in conditional.CASES:
        *inputs, valid = conditional.make_case(name)
        one_head = [x[:, :1] for x in inputs]
        close(crossed, conditional.conditional_attention_reference, one_head, PARTS, valid)
        both, v, valid = conditional.make_packed_case(name)
        if name != "c5":  # slow
            close(together, conditional.packed_attention_reference, (both, v), ("both", "v"), valid)
    for width in (1, 7):
        inputs = torch.randn(2, 3 * 2 * width, 5).transpose(1, 2), torch.randn(2, 3, 5, 4)
        close(together, conditional.packed_attention_reference, inputs, ("both", "v"), None)


def check_dtypes():
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("tiny", "no-matching-queries"):
            q, k, v, layout, active = group.make_case(name, dtype)
            compare(groups, group.group_attention_reference, (q, k, v), "qkv", dtype, layout, active)
        for name in ("tiny", "nothing-valid"):
            *inputs, valid = conditional.make_case(name, dtype)
            compare(crossed, conditional.conditional_attention_reference, inputs, PARTS, dtype, valid)
            both, v, valid = conditional.make_packed_case(name, dtype)
            compare(together, conditional.packed_attention_reference, (both, v), ("both", "v"), dtype, valid)


def check_layouts():
    """Tiles smaller than groups, larger than several groups, and neither dividing anything."""
    for tile in (Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)):
        use(tile)
        for layout, live in (
            ((3, 7, 20), (7, 3)),
            ((2, 33, 17), (33, 18)),
            ((4, 1, 16), (1, 0)),
            ((1, 48, 3), (47, 48)),
        ):
            layout = GroupLayout(*layout)
            inputs = tuple(packed(2, 1, layout.queries, 16))
            close(groups, group.group_attention_reference, inputs, "qkv", layout, torch.tensor(live, dtype=torch.int32))


def check_widths():
    layout, active = GroupLayout(2, 5, 9), torch.tensor([4], dtype=torch.int32)
    for width, v_width in ((1, 1), (16, 16), (24, 40), (48, 16), (64, 32), (100, 128), (128, 128)):
        inputs = tuple(packed(1, 2, layout.queries, width, v_width))
        close(groups, group.group_attention_reference, inputs, "qkv", layout, active)
    for content, position, v_width in ((24, 8, 40), (128, 100, 16), (32, 64, 32)):
        q_content, k_content, v = packed(1, 2, 11, content, v_width)
        q_position, k_position, _ = packed(1, 2, 11, position)
        inputs = (q_content, q_position, k_content, k_position, v)
        close(crossed, conditional.conditional_attention_reference, inputs, PARTS, None)


def check_strides():
    """Projections packed, head-major, column-major, reversed in memory order, and a gradient that is one number."""
    layout, active = GroupLayout(2, 4, 6), torch.tensor([3, 1], dtype=torch.int32)
    q, k, v = packed(2, 2, 14, 16)
    forms = (q.contiguous(), k.transpose(-1, -2).contiguous().transpose(-1, -2), v.permute(3, 2, 1, 0).contiguous())
    leaves = [forms[0], forms[1], forms[2].permute(3, 2, 1, 0)]
    results = []
    for attend in (groups, group.group_attention_reference):
        inputs = [x.detach().requires_grad_() for x in leaves]
        out = attend(*inputs, layout, active)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    *inputs, valid = conditional.make_case("c5")
    inputs = [x[:, :1] for x in inputs]
    close(crossed, conditional.conditional_attention_reference, inputs, PARTS, valid.t().contiguous().t())


def check_live_slots_in_a_view():
    """One number for all images, as the official padding has it, with something else behind it in memory."""
    q, k, v, layout, _ = group.make_case("tiny")
    active = torch.tensor([3, 0, 7], dtype=torch.int32)[:1].expand(2)
    close(groups, group.group_attention_reference, (q, k, v), "qkv", layout, active)


def check_nan():
    """What is not a number stays none, in its own row, also where a single part of the keys holds it."""
    q, k, v, layout, active = group.make_case("tiny")
    q = q.clone()
    q[0, 0, 7] = float("nan")
    given, expected = (attend(q, k, v, layout, active) for attend in (groups, group.group_attention_reference))
    assert given[0, 0, 7].isnan().all()
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    use(Tile(16, 16, 4, 1))
    q_content, q_position, k_content, k_position, v = (torch.randn(1, 1, n, 16) for n in (7, 7, 40, 40, 40))
    k_content[0, 0, 20, 3] = float("nan")
    q_content[0, 0, 2] *= float("inf")
    for splits in (1, 3):
        out, lse = torch.zeros(1, 1, 7, 16), torch.zeros(1, 1, 7)
        inputs = (q_content, q_position, k_content, k_position, v, None, 0.3, "ieee")
        conditional_kernels.conditional_attention_forward(*inputs, out, lse, splits=splits)
        assert out.isnan().all() and lse.isnan().all()


def check_the_tensors_own_device():
    q, k, v, layout, active = group.make_case("tiny")
    *inputs, valid = conditional.make_case("tiny")
    with mock.patch.object(torch.cuda, "device_of", wraps=torch.cuda.device_of) as entered:
        outputs(groups, (q, k, v), "qkv", layout, active)
        outputs(crossed, inputs, PARTS, valid)
    assert entered.call_count == 4


def check_many_queries():
    use(Tile(128, 128, 4, 1))
    layout = GroupLayout(3, 250, 1400)
    inputs = tuple(packed(1, 1, layout.queries, 16))
    close(groups, group.group_attention_reference, inputs, "qkv", layout, torch.tensor([200], dtype=torch.int32))


def check_splits():
    """Keys cut into parts, some of them without a single valid key, some beyond the last key."""
    use(Tile(16, 16, 4, 1))
    *inputs, _ = conditional.make_case("all-valid")
    q_content, q_position, *_ = inputs
    k_content, k_position, v = (torch.randn(2, 2, 90, 8) for _ in range(3))
    inputs = (q_content, q_position, k_content, k_position, v)
    valid = torch.arange(90) < torch.tensor([[70], [5]])
    expected = conditional.conditional_attention_reference(*inputs, valid, 0.3)
    exact = torch.empty(2, 2, 7)
    whole = torch.empty(2, 2, 7, 8)
    conditional_kernels.conditional_attention_forward(*inputs, valid, 0.3, "ieee", whole, exact, splits=1)
    for splits in (2, 3, 5, 8):
        out, lse = torch.full((2, 2, 7, 8), float("nan")), torch.full((2, 2, 7), float("nan"))
        conditional_kernels.conditional_attention_forward(*inputs, valid, 0.3, "ieee", out, lse, splits=splits)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, exact, rtol=1e-5, atol=1e-5)
    assert conditional_kernels.key_splits(128, 66, 132) == 2 and conditional_kernels.key_splits(8, 66, 132) == 16
    assert conditional_kernels.key_splits(4096, 66, 132) == conditional_kernels.key_splits(1, 3, 132) == 1


def check_golden_masks():
    """Attention with each recorded mask, written out densely, against the kernel that only knows three numbers."""
    golden = goldens.unit("dn_attn_masks.pt")["cases"]
    seen = set()
    for case in golden:
        layout = GroupLayout(case["scalar"], case["single_pad"], case["num_queries"] * max(1, case["num_patterns"]))
        if layout in seen:
            continue
        seen.add(layout)
        q, k, v = packed(1, 1, layout.queries, 16)
        masked = (q @ k.transpose(-1, -2) * 0.25).masked_fill(case["attn_mask"], float("-inf"))
        torch.testing.assert_close(groups(q, k, v, layout), masked.softmax(-1) @ v, rtol=1e-5, atol=1e-5)
    assert len(seen) > 20


def check_registration():
    q, k, v, layout, active = group.make_case("tiny")
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    for live in (active, None):
        torch.library.opcheck(torch.ops.dndetr.group_attention.default, (q, k, v, live, *layout, 0.3, "ieee", "triton"))
    *inputs, valid = conditional.make_case("tiny")
    inputs = [x.detach().requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.dndetr.conditional_attention.default, (*inputs, valid, 0.3, "ieee", "triton"))
    both, v, valid = conditional.make_packed_case("tiny")
    packed = both.requires_grad_(), None, None, None, v.detach().requires_grad_(), valid
    torch.library.opcheck(torch.ops.dndetr.conditional_attention.default, (*packed, 0.3, "ieee", "triton"))


def check_compile():
    q, k, v, layout, active = group.make_case("tiny")
    compiled = torch.compile(groups, fullgraph=True, backend="aot_eager")
    close(compiled, groups, (q, k, v), "qkv", layout, active)
    *inputs, valid = conditional.make_case("tiny")
    close(torch.compile(crossed, fullgraph=True, backend="aot_eager"), crossed, inputs, PARTS, valid)
    both, v, valid = conditional.make_packed_case("tiny")
    close(torch.compile(together, fullgraph=True, backend="aot_eager"), together, (both, v), ("both", "v"), valid)


def check_autocast():
    q, k, v, layout, active = group.make_case("tiny")
    *inputs, valid = conditional.make_case("tiny")
    with torch.autocast("cpu", torch.bfloat16):
        out = groups(q, k, v.bfloat16(), layout, active)
        other = crossed(*inputs, valid)
    assert out.dtype == other.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), groups(q, k, v, layout, active), rtol=0.05, atol=0.05)


def check_determinism():
    q, k, v, layout, active = group.make_case("one-group")
    first, second = (outputs(groups, (q, k, v), "qkv", layout, active) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def check_what_the_kernels_do_not_take():
    q, *_, layout, active = group.make_case("tiny", torch.float64)
    for wide in (q, torch.randn(2, 2, 10, 130)):
        try:
            groups(wide, wide, wide, layout, active)
        except ValueError as failure:
            assert "leave the backend to auto" in str(failure)
        else:
            raise AssertionError("taken")


def check_leaks():
    """In whole models: matching queries never feel the targets, and permuted groups give permuted outputs."""
    order = torch.tensor([1, 0])
    for name in ("dn-detr", "dn-deformable-detr"):
        model, batch = detectors.build(name).eval(), detectors.make_batch([3, 1], 8)
        other = Targets((batch.targets.labels + 1) % detectors.CLASSES, 1 - batch.targets.boxes, batch.targets.counts)
        noise = draw_noise(batch.targets, 2, detectors.CLASSES, torch.Generator().manual_seed(0))
        turned = Noise(*(part[:, order] for part in noise))
        plain, changed, permuted = (
            model(images_of(batch), batch.sizes, noised_queries(targets, draws))
            for targets, draws in ((batch.targets, noise), (other, noise), (batch.targets, turned))
        )
        for given, of_others, of_turned in zip(plain[:2], changed[:2], permuted[:2], strict=True):
            assert torch.equal(given[:, :, 16:], of_others[:, :, 16:]), name
            assert not torch.equal(given[:, :, :16], of_others[:, :, :16]), name
            grouped = given[:, :, :16].unflatten(2, (2, 8))[:, :, order].flatten(2, 3)
            torch.testing.assert_close(of_turned[:, :, :16], grouped, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(of_turned[:, :, 16:], given[:, :, 16:], rtol=1e-4, atol=1e-5)
    assert _backend.choose("group_attention")[0] == _backend.choose("conditional_attention")[0] == "triton"


def run(checks: list[str]) -> None:
    os.environ |= {"DNDETR_BACKEND_GROUP_ATTENTION": "triton", "DNDETR_BACKEND_CONDITIONAL_ATTENTION": "triton"}
    for name in checks:
        torch.manual_seed(0)
        use(None)
        globals()[f"check_{name}"]()
        print(name, flush=True)
