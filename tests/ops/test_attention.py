"""Group attention and conditional attention against their references, forward and every gradient."""

import re
from pathlib import Path

import goldens
import pytest
import torch
import torch.nn.functional as F
from gradients import DTYPES, compare, outputs
from operations import Operations

from dndetr.ops import GroupLayout, _backend, conditional_attention, group_attention, packed_attention
from dndetr.ops.conditional_attention import CASES as CONDITIONAL
from dndetr.ops.conditional_attention import (
    conditional_attention_reference,
    make_packed_case,
    packed_attention_reference,
)
from dndetr.ops.conditional_attention import make_case as conditional_case
from dndetr.ops.group_attention import CASES as GROUPS
from dndetr.ops.group_attention import group_attention_reference
from dndetr.ops.group_attention import make_case as group_case


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", GROUPS)
def test_group_attention(name, dtype):
    q, k, v, layout, active = group_case(name, dtype)
    compare(group_attention, group_attention_reference, (q, k, v), "qkv", dtype, layout, active)


@pytest.mark.parametrize("name", GROUPS)
def test_inactive_slots_are_zero_and_silent(name):
    q, k, v, layout, active = group_case(name)
    if active is None:
        active = torch.full((2,), layout.slots, dtype=torch.int32)
    found = outputs(group_attention, (q, k, v), "qkv", layout, active)
    dead = ~layout.slot_alive(active)
    for name in ("out", "q", "k", "v"):
        assert not found[name][:, :, : layout.denoising].transpose(1, 2)[dead].any(), name


def test_a_group_sees_itself_and_the_matching_part_only():
    layout = GroupLayout(2, 2, 3)
    v = torch.eye(7).expand(1, 1, 7, 7)
    weights = group_attention(torch.zeros(1, 1, 7, 4), torch.zeros(1, 1, 7, 4), v, layout)[0, 0]
    seen = weights > 0
    assert torch.equal(seen, ~layout.blocked())
    assert seen[0].tolist() == [True, True, False, False, True, True, True]
    assert seen[6].tolist() == [False, False, False, False, True, True, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditional_attention(name, dtype):
    *inputs, valid = conditional_case(name, dtype)
    names = ("q_content", "q_position", "k_content", "k_position", "v")
    compare(conditional_attention, conditional_attention_reference, inputs, names, dtype, valid)


def test_an_image_without_valid_keys_gives_zeros():
    *inputs, valid = conditional_case("nothing-valid")
    assert not conditional_attention(*inputs, valid)[0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CONDITIONAL)
def test_packed_attention(extension, name, dtype):
    """torch's own attention, and both of ours."""
    both, v, valid = make_packed_case(name, dtype)

    def torchs(both, v, valid):
        q, k = (part.unflatten(-1, (v.shape[1], -1)).transpose(1, 2) for part in both.chunk(2, dim=-1))
        scores = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(-1) if valid is None else None
        return F.scaled_dot_product_attention(q, k, v, valid[:, None, None]) if scores is None else scores @ v

    if name != "nothing-valid":
        torch.testing.assert_close(
            packed_attention_reference(both.double(), v.double(), valid), torchs(both.double(), v.double(), valid)
        )
    compare(packed_attention, packed_attention_reference, (both, v), ("both", "v"), dtype, valid, least=1e-14)


def test_packed_attention_takes_any_width_and_strides(extension):
    torch.manual_seed(0)
    for width in (1, 7):
        both, v = torch.randn(2, 3 * 2 * width, 5).transpose(1, 2), torch.randn(2, 3, 5, 4)
        compare(packed_attention, packed_attention_reference, (both, v), ("both", "v"), torch.float32, None)


def test_gradients_of_packed_queries_and_keys_come_in_one_tensor(extension):
    both, v, valid = make_packed_case("tiny")
    leaves = both.requires_grad_(), v.detach().requires_grad_()
    out = packed_attention(*leaves, valid, backend="cpp")
    weighting = torch.ones_like(out)
    with Operations() as counted:
        grads = torch.autograd.grad(out, leaves, weighting)
    assert counted.count == 1 and [grad.shape for grad in grads] == [both.shape, v.shape]


def test_packed_attention_names_what_does_not_fit():
    both, v, valid = make_packed_case("tiny")
    for wrong in (both[:, 1:], both[..., 1:], both[..., :0], both[0]):
        with pytest.raises(ValueError, match="must hold queries and keys of the heads"):
            packed_attention(wrong, v, valid)
    with pytest.raises(ValueError, match=r"valid must be bool \[2, 5\], got torch.bool \[2, 4\]"):
        packed_attention(both, v, valid[:, 1:])


@pytest.mark.parametrize(
    "function, case",
    [
        (group_attention, group_case),
        (conditional_attention, conditional_case),
        (packed_attention, make_packed_case),
    ],
)
def test_compiles_without_a_graph_break(function, case):
    inputs = case("tiny")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs))


class Unasked(torch.autograd.Function):
    """Hands no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("attend, case", [(group_attention, group_case), (conditional_attention, conditional_case)])
def test_backward_is_one_operation_and_none_without_a_gradient(extension, attend, case):
    leaf, *rest = case("tiny")
    leaf = leaf.detach().requires_grad_()
    out = attend(leaf, *rest, backend="cpp")
    weighting = torch.ones_like(out)
    with Operations() as counted:
        torch.autograd.grad(out, leaf, weighting, retain_graph=True)
    assert counted.count == 1
    Unasked.apply(out).backward()
    assert leaf.grad is None


def test_wrong_sizes_are_named():
    q, k, v, layout, active = group_case("tiny")
    with pytest.raises(ValueError, match="describes 10"):
        group_attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], layout, active)
    with pytest.raises(ValueError, match="must agree"):
        group_attention(q, k[:, :, 1:], v, layout, active)
    *inputs, valid = conditional_case("tiny")
    inputs[2] = inputs[2][:, :, 1:]
    with pytest.raises(ValueError, match="keys and values"):
        conditional_attention(*inputs, valid)


def test_a_first_call_under_autocast_is_no_obstacle(extension, fresh_backends):
    with torch.autocast("cpu", torch.bfloat16):
        group_attention(*group_case("tiny"))
        conditional_attention(*conditional_case("tiny"))
        for op in ("group_attention", "conditional_attention"):
            assert _backend.choose(op)[0] == "cpp"


def test_the_reference_can_be_asked_for():
    q, k, v, layout, active = group_case("demo")
    expected = group_attention_reference(q, k, v, layout, active)
    assert torch.equal(group_attention(q, k, v, layout, active, backend="reference"), expected)
    with pytest.raises(ValueError, match="no backend 'cuda'"):
        group_attention(q, k, v, layout, active, backend="cuda")


INTERPRETED = Path(__file__).with_name("attention_in_the_interpreter.py")
SLOW = ("golden_masks", "many_queries", "leaks", "registration", "compile", "widths", "dtypes")
CHECKS = re.findall(r"^def check_(\w+)", INTERPRETED.read_text(), re.M)


@pytest.mark.parametrize("which", ["fast", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_in_the_interpreter(interpreter, which):
    checks = [name for name in CHECKS if (name in SLOW) == (which == "slow")]
    if not (goldens.GOLDEN / "dn_attn_masks.pt").is_file():
        checks = [name for name in checks if name != "golden_masks"]
    assert interpreter(f"import {INTERPRETED.stem} as all\nall.run({checks})").split() == checks


def test_training_under_autocast():
    """Backward outside autocast, as training does it, in the dtype of the forward."""
    q, k, v, layout, active = group_case("demo")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = group_attention(*leaves, layout, active)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    exact = [x.detach().requires_grad_() for x in (q, k, v)]
    group_attention_reference(*exact, layout, active).square().sum().backward()
    for leaf, truth in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == torch.float32
        torch.testing.assert_close(leaf.grad, truth.grad, rtol=0.05, atol=0.02 * truth.grad.abs().max().item())
