"""The whole training step: it learns, and it never makes the host wait for the device."""

import importlib.util
import subprocess
import sys
from dataclasses import replace

import backbones
import detectors
import pytest
import torch

from dndetr.denoising import Noise
from dndetr.models.build import build_model
from dndetr.models.layers import Recomputable
from dndetr.ops import images_of

every_model = pytest.mark.parametrize("name", detectors.CONFIGS)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason='transformers is not installed (pip install -e ".[hf]")'
)
DINO = ("dino-r50", "dino-r50-5scale")


# The sampling of the deformable models has no form for fake CUDA tensors; the next test covers them.
@pytest.mark.parametrize("groups", [5, 0])
@pytest.mark.parametrize("name", ["dn-detr", "dn-detr-dc5-patterns"])
def test_forward_and_losses_ask_nothing_of_a_cuda_device(fake_cuda, name, groups):
    model = detectors.emptied(detectors.build(name), "cuda")
    step = detectors.make_step(model, groups)
    noise = step.draw(detectors.empty_batch("cpu"))
    batch = detectors.empty_batch("cuda")
    if noise is not None:
        noise = Noise(*(part.to("cuda") for part in noise))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        predictions = model(images_of(batch), batch.sizes, step.noised(batch, noise))
    losses = step.criterion(predictions, batch.targets)
    assert losses.total.device.type == "cuda" and losses.total.shape == ()
    assert losses.parts.shape == (3, 6)


@pytest.mark.parametrize(
    "steps",
    [
        ("dn-deformable-detr:5", "hybrid-dino:5", "deformable-detr-two-stage:0"),
        pytest.param(
            (
                *(f"{name}:{groups}" for name in detectors.CONFIGS for groups in (5, 0)),
                *(f"{name}:5" for name in (*detectors.HYBRID, *DINO)),
                "hybrid-dino:5:federated",
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(tuple(f"{name}:5" for name in backbones.SETTINGS), marks=[pytest.mark.slow, needs_transformers]),
    ],
    ids=["three", "all", "backbones"],
)
def test_no_whole_step_asks_the_device_for_anything(root, steps):
    """Backward, clipping, AdamW and averaging too, on a device of its own kind: torch's CPU build cannot
    differentiate fake CUDA tensors. In a process of its own, since a new kind of device is there to stay."""
    command = [sys.executable, str(root / "tests" / "support" / "steps_on_a_fake_device.py"), *steps]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [*steps]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.sum().tolist(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
    ],
    ids=["item", "tolist", "bool", "boolean-index", "nonzero", "cpu", "to-cpu"],
)
def test_the_guard_sees_every_kind_of_wait(fake_cuda, wait):
    with pytest.raises(Exception, match=r"waits|copies|data-dependent|DataDependent|item|not supported|Cannot"):
        wait(torch.ones(3, device="cuda"))


@pytest.mark.parametrize("layers", [0, 1])
@every_model
def test_a_step_reaches_every_parameter(name, layers):
    """Whatever the encoder: several processes would wait for the gradient of one that is left out."""
    model = build_model(replace(detectors.CONFIGS[name], encoder_layers=layers), detectors.CLASSES)
    step = detectors.make_step(model)
    step(detectors.make_batch([3, 5], 8))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    reached = {name for name, parameter in model.named_parameters() if parameter in step.optimizer.state}
    assert trained == reached


@every_model
def test_the_loss_falls(name):
    batch = detectors.make_batch([3, 5], 8)
    step = detectors.make_step(detectors.build(name))
    steps = 60 if name == "dino" else 25  # what one pair of heads learns for one layer it forgets for another
    history = [step(batch)[0].total.item() for _ in range(steps)]
    assert all(map(torch.isfinite, map(torch.tensor, history)))
    assert sum(history[-3:]) < 0.85 * sum(history[:3])


def test_two_runs_are_bit_identical():
    ends = []
    for _ in range(2):
        batch = detectors.make_batch([3, 5], 8)
        model = detectors.build("dn-deformable-detr")
        step = detectors.make_step(model)
        for _ in range(3):
            step(batch)
        ends.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*ends)


@every_model
def test_frozen_parts_stay_and_the_rest_moves(name):
    model = detectors.build(name)
    before = {key: value.clone() for key, value in model.named_parameters()}
    step = detectors.make_step(model, lr=1e-2)
    for _ in range(3):
        step(detectors.make_batch([3, 5], 8))
    for key, value in model.named_parameters():
        assert torch.equal(value, before[key]) != value.requires_grad, key


def test_the_average_lags_behind_and_counts():
    model = detectors.build("batch-norm-from-scratch")
    step = detectors.make_step(model, lr=1e-2)
    weight, average = model.decoder.class_embed[0].weight, step.average.model.decoder.class_embed[0].weight
    start = weight.detach().clone()
    step(detectors.make_batch([3, 5], 8))
    share = 1 - 2 / 11  # the first update's decay is (1 + 1) / (10 + 1)
    torch.testing.assert_close(average, torch.lerp(start, weight.detach(), share))
    steps = model.backbone.bn1.num_batches_tracked
    assert step.average.model.backbone.bn1.num_batches_tracked == steps == 1


@every_model
def test_recomputing_changes_memory_and_nothing_else(name):
    kept, recomputed = [
        build_model(replace(detectors.CONFIGS[name], checkpointing=checkpointing), detectors.CLASSES).double()
        for checkpointing in (False, True)
    ]
    recomputed.load_state_dict(kept.state_dict())
    blocks = [block for block in recomputed.modules() if isinstance(block, Recomputable)]
    count = sum(block.recomputed for block in blocks)
    assert count == (3 if name == "batch-norm-from-scratch" else 9)  # all but the blocks with running statistics
    ends = []
    for model in (kept, recomputed):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            losses, norm = detectors.make_step(model)(detectors.make_batch([3, 5], 8, torch.float64))
        ends.append((sum(saved), losses.total, norm))
    assert ends[1][0] < 0.7 * ends[0][0]
    assert torch.equal(ends[0][1], ends[1][1])
    torch.testing.assert_close(ends[0][2], ends[1][2], rtol=1e-12, atol=0)


def test_accumulated_batches_give_the_loss_and_gradient_of_one():
    whole = detectors.make_batch([3, 0, 5, 1], 8, torch.float64)
    ends = []
    for batches in ([whole], [detectors.part(whole, slice(0, 1)), detectors.part(whole, slice(1, 4))]):
        step = detectors.make_step(detectors.build("dn-deformable-detr", torch.float64), groups=0)
        losses, norm = step(*batches)
        ends.append((losses.total, losses.parts, norm))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("most", "groups"), [(1000, 5), (40, 5), (39, 4), (8, 1), (7, 0)])
def test_crowded_batches_get_fewer_groups(most, groups):
    step = detectors.make_step(detectors.build("dn-detr"))
    step.denoising = replace(step.denoising, max_queries=most)
    batch = detectors.make_batch([3, 5], 8)
    assert step.denoising.groups_for(8) == groups
    noised = step.noised(batch, step.draw(batch))
    assert (0 if noised is None else noised.labels.shape[1]) == groups
    losses, norm = step(batch)
    assert losses.total.isfinite() and norm.isfinite()
    assert (losses.parts[:, 3:] == 0).all() == (groups == 0)
