"""Weights lowered all at once: the results and gradients of autocast, and nothing else of the model is touched."""

from dataclasses import replace

import detectors
import pytest
import torch
from torch import nn

from dndetr.denoising import draw_noise, noised_queries
from dndetr.models.build import build_model
from dndetr.models.layers import Recomputable
from dndetr.ops import images_of
from dndetr.training.distributed import Processes
from dndetr.training.graphs import GraphedStep
from dndetr.training.lowered import Lowered, lower
from dndetr.training.step import TrainStep

BF16 = torch.bfloat16


def build(name, checkpointing=False):
    torch.manual_seed(0)
    return build_model(replace(detectors.CONFIGS[name], checkpointing=checkpointing), detectors.CLASSES)


def outcome(model, called, precision=BF16, seed=0):
    """Loss of a step under autocast (of fixed sums, since matching would amplify rounding), and its gradients."""
    model.zero_grad()
    batch, draw = detectors.make_batch([3, 5], 8), torch.Generator().manual_seed(seed)
    batch = replace(batch, pixels=torch.randint(256, batch.pixels.shape, generator=draw, dtype=torch.uint8))
    noise = draw_noise(batch.targets, 2, detectors.CLASSES, draw)
    noised = noised_queries(batch.targets, noise, 0.2, 0.4, False)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        logits, boxes, *_ = called(images_of(batch), batch.sizes, noised)
    loss = logits.float().sigmoid().square().mean() + boxes.float().square().mean()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def error(grads, exact):
    """Relative, of all gradients together and of the worst that is not tiny."""
    assert {name: grad is None for name, grad in grads.items()} == {n: grad is None for n, grad in exact.items()}
    there = [name for name in grads if grads[name] is not None]
    assert all(grads[name].dtype == torch.float32 for name in there)
    off = torch.stack([(grads[name] - exact[name]).norm() for name in there])
    whole = torch.stack([exact[name].norm() for name in there])
    return off.norm() / whole.norm(), (off / (whole + 1e-3 * whole.norm())).max()


def check(called, plain, exact):
    """As near to float32 as autocast, and no weight's gradient goes astray; each a model and what to call.

    The median of some batches: in any one rounding may change which proposals are selected, or many a ReLU, in
    autocast's way or in ours, and one of both is twice as far off as the other. Which, depends on the processor.
    """
    ours, theirs = [], []
    for seed in range(5):
        loss, grads = outcome(*exact, torch.float32, seed)
        for each, errors in ((called, ours), (plain, theirs)):
            found, its = outcome(*each, BF16, seed)
            errors.append([abs(found / loss - 1), *error(its, grads)])
    (loss, mine, worst), (_, autocast, _) = (torch.tensor(x).median(0).values for x in (ours, theirs))
    assert loss <= (1e-3 if called[0].proposals is None else 3e-2), loss  # other proposals, another loss
    assert mine <= 1.5 * autocast and worst < 0.5, (mine, autocast, worst)


@pytest.mark.parametrize("name", detectors.CONFIGS)
def test_loss_and_gradients_are_those_of_autocast(name):
    model = build(name).to(memory_format=torch.channels_last)
    before = {key: value.clone() for key, value in model.state_dict().items() if "running_" not in key}
    called = Lowered(model, BF16)
    check((model, called), (model, model), (model, model))
    found, plain = outcome(model, called), outcome(model, model)
    if name == "batch-norm-from-scratch":  # all weights are multiplied as they are
        assert found[0] == plain[0] and error(found[1], plain[1]) == (0, 0)
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
    after = model.state_dict()
    assert all(after[key].dtype == before[key].dtype for key in before)
    assert all(torch.equal(after[key], before[key]) for key in before if not key.endswith("num_batches_tracked"))


@pytest.mark.parametrize("name", ["dn-detr", "dn-deformable-detr"])
def test_weights_of_products_are_lowered_and_no_others(name):
    model = build(name)
    lowered = set(Lowered(model, BF16)._full)
    owners = {key: type(model.get_submodule(key.rpartition(".")[0])) for key, _ in model.named_parameters()}
    products = {key for key, owner in owners.items() if issubclass(owner, (nn.Linear, nn.Conv2d)) or "in_proj" in key}
    assert lowered == products
    others = {owner.__name__ for key, owner in owners.items() if key not in lowered}
    assert "ResidualNorm" in others
    assert others <= {"LayerNorm", "ResidualNorm", "GroupNorm", "Embedding", "QueryTable", "PReLU", "InputProjection"}
    seen = {}

    def note(module, inputs):
        seen[module] = {parameter.dtype for parameter in module.parameters(recurse=False)}

    for module in model.modules():
        module.register_forward_pre_hook(note)
    outcome(model, Lowered(model, BF16))
    kinds = {
        kind: {d for m, ds in seen.items() if isinstance(m, kind) for d in ds} for kind in (nn.Linear, nn.LayerNorm)
    }
    assert kinds == {nn.Linear: {BF16}, nn.LayerNorm: {torch.float32}}


@pytest.mark.parametrize("name", ["dn-detr", "dn-deformable-detr"])
def test_recomputing_changes_no_gradient(name):
    kept, recomputed = (build(name, checkpointing) for checkpointing in (False, True))
    blocks = [block for block in recomputed.modules() if isinstance(block, Recomputable) and block.recomputed]
    inside = {parameter for block in blocks for parameter in block.parameters()}
    called = Lowered(recomputed, BF16)
    assert blocks and called._full and inside.isdisjoint(called._full.values())
    check((recomputed, called), (kept, Lowered(kept, BF16)), (kept, kept))
    check((recomputed, called), (recomputed, recomputed), (kept, kept))


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts casts, one by one and all at once."""

    def __init__(self):
        super().__init__()
        self.single = self.together = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.together += function is aten._foreach_copy_.default
        self.single += function.overloadpacket in (aten._to_copy, aten.copy_, aten.clone)
        return function(*args, **kwargs or {})


def test_one_call_each_way():
    draw = [torch.randn(size) for size in ((4, 3), (4,), (5, 3, 3, 3), (6, 2, 1, 1))]
    leaves = [x.requires_grad_() for x in draw[:2]]
    leaves += [x.to(memory_format=torch.channels_last).requires_grad_() for x in draw[2:]]
    with Copies() as copies:
        lowered = lower(leaves, BF16)
        grads = torch.autograd.grad(lowered, leaves, [torch.ones_like(low) for low in lowered])
    assert (copies.together, copies.single) == (2, 0)
    for low, leaf, grad in zip(lowered, leaves, grads, strict=True):
        assert torch.equal(low, leaf.to(BF16)) and low.stride() == leaf.stride() == grad.stride()
        assert grad.dtype == torch.float32 and (grad == 1).all()


def test_gradients_of_any_strides_and_none():
    leaves = [torch.randn(4, 6, requires_grad=i != 1) for i in range(5)]
    lowered = lower(leaves, BF16)
    assert [low.requires_grad for low in lowered] == [True, False, True, True, True]
    spread = torch.randn(1, 6).to(BF16).expand(4, 6)
    across, gaps = torch.randn(6, 4).to(BF16).t(), torch.randn(12, 8).to(BF16).t()[::2, ::2]
    torch.autograd.backward([lowered[i] for i in (0, 3, 4)], [spread, across, gaps])
    assert leaves[1].grad is None and leaves[2].grad is None
    for i, wanted in {0: spread, 3: across, 4: gaps}.items():
        assert leaves[i].grad.dtype == torch.float32 and torch.equal(leaves[i].grad, wanted.float())
        assert leaves[i].grad.is_contiguous()


class Silent(torch.autograd.Function):
    """Hands no gradient on."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_without_any_gradient_there_is_nothing_to_bring_back():
    leaf = torch.ones(3, requires_grad=True)
    Silent.apply(*lower([leaf], BF16)).backward()
    assert leaf.grad is None


@pytest.mark.parametrize(("device", "precision"), [(False, BF16), (True, torch.float32), (True, BF16)])
def test_steps_on_a_device_lower(monkeypatch, device, precision):
    monkeypatch.setattr(TrainStep, "on_device", device)
    step = detectors.make_step(build("dn-detr"), precision=precision)
    assert (type(step._called) is Lowered) == (device and precision == BF16)
    batch = detectors.make_batch([3, 5], 8)
    history = [step(batch)[0].total.item() for _ in range(12)]
    assert sum(history[-3:]) < 0.95 * sum(history[:3])
    assert {parameter.dtype for parameter in step.model.parameters()} == {torch.float32}


def test_several_processes_do_not_lower(monkeypatch):
    """They could not average gradients while backward still runs."""
    shared = []
    monkeypatch.setattr(TrainStep, "on_device", True)
    monkeypatch.setattr("dndetr.training.step.DistributedDataParallel", lambda model, **_: shared.append(model))
    model = build("dn-detr")
    detectors.make_step(model, precision=BF16, processes=Processes({"WORLD_SIZE": "2"}))
    assert shared == [model]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dn-detr", "dn-deformable-detr"])
def test_captured_steps_on_a_gpu_are_the_eager_ones(name):
    ends = []
    for kind in (TrainStep, GraphedStep):
        step = detectors.make_step(build(name).to("cuda", memory_format=torch.channels_last), precision=BF16, kind=kind)
        batch = detectors.make_batch([3, 5], 8)
        ends.append(torch.stack([step(batch)[0].total.clone() for _ in range(4)]))
    assert step._captured and step._trusted
    torch.testing.assert_close(*ends, rtol=2e-2, atol=0)


@pytest.mark.gpu
def test_a_gpu_lowers_by_few_kernels():
    model = build("dn-detr").to("cuda", memory_format=torch.channels_last)
    leaves = list(Lowered(model, BF16)._full.values())
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    lowered = lower(leaves, BF16)
    grads = [torch.ones_like(low) for low in lowered if low.requires_grad]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        lowered = lower(leaves, BF16)
        torch.autograd.grad([low for low in lowered if low.requires_grad], trained, grads)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(kernels) < len(leaves) / 4
