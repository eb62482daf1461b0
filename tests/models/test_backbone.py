"""The backbone's norms: folded into convolutions on a CPU, one pass after them on a GPU, and what is kept of them."""

import copy
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dndetr.models import backbone
from dndetr.models.backbone import FrozenBatchNorm2d, ResNet
from dndetr.ops import _backend
from dndetr.ops.frozen_norm import frozen_norm_reference
from dndetr.ops.stem import stem_reference

KINDS = {
    "basic": {"blocks": (1, 1), "expansion": 1, "stem": "small"},
    "bottleneck": {"blocks": (1, 2), "expansion": 4},
    "dilated": {"blocks": (1, 2), "expansion": 4, "dilate_last": True},
}


def resnet(kind="basic", norm="frozen", device="cpu", dtype=torch.float32):
    """Two stages, with norms as of a trained network."""
    torch.manual_seed(0)
    model = ResNet(**KINDS[kind], planes=(8, 16), norm=norm, frozen=1, outputs=(1, 2))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape) + 0.5 * (name in ("weight", "running_var")))
    return model.to(device, dtype, memory_format=torch.channels_last)


def images(device="cpu", dtype=torch.float32):
    x = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(device, dtype, memory_format=torch.channels_last)


def maps_and_gradients(model, x):
    """By name."""
    maps = model(x)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    loss = sum((features.square() * features.detach().cos()).sum() for features in maps)
    grads = torch.autograd.grad(loss, list(trained.values()))
    return dict(enumerate(features.detach() for features in maps)) | dict(zip(trained, grads, strict=True))


def folded(x, conv, norm, relu=True, shortcut=None):
    """Each norm within the kernel, sums and ReLUs in place."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    x = F.conv2d(
        x,
        conv.weight * scale[:, None, None, None],
        norm.bias - norm.running_mean * scale,
        conv.stride,
        conv.padding,
        conv.dilation,
    )
    x = x if shortcut is None else x.add_(shortcut)
    return x.relu_() if relu else x


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_norms_are_folded_to_the_bit(kind, fresh_backends, monkeypatch):
    # torch's own convolution on both sides, whose order of summation is one
    monkeypatch.setenv("DNDETR_BACKEND_CONV3X3", "reference")
    model, x = resnet(kind), images()
    found = model(x)
    y = folded(x, model.conv1, model.bn1)
    y = F.max_pool2d(y, 3, 2, 1) if model.conv2 is None else folded(y, model.conv2, model.bn2)
    for features, layer in zip(found, (model.layer1, model.layer2), strict=True):
        for block in layer:
            shortcut = y if block.downsample is None else folded(y, *block.downsample, relu=False)
            y = folded(y, block.conv1, block.bn1)
            if block.conv3 is not None:
                y = folded(y, block.conv2, block.bn2)
            last = (block.conv2, block.bn2) if block.conv3 is None else (block.conv3, block.bn3)
            y = folded(y, *last, shortcut=shortcut)
        assert torch.equal(features, y)


@pytest.fixture
def calls(monkeypatch):
    """What the kernel is called with: networks take its way on a CPU, too, with its reference in its place."""
    calls = []

    def called(*given, twice=False):
        calls.append(given)
        y = frozen_norm_reference(*given)
        return (y, y.view_as(y)) if twice else y

    monkeypatch.setattr(backbone, "frozen_norm", called)
    monkeypatch.setattr(backbone, "_backend", SimpleNamespace(choose=lambda op, device_type: ("triton", "")))
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_shortcuts_norm_is_applied_by_the_blocks_last_pass(kind, calls):
    model, x = resnet(kind), images()
    found = maps_and_gradients(model, x)
    norms = [block.downsample[1] for layer in (model.layer1, model.layer2) for block in layer if block.downsample]
    assert len(calls) == sum(isinstance(module, nn.Conv2d) for module in model.modules()) - len(norms)
    of_shortcuts = [given[5:] for given in calls if given[5] is not None]
    assert len(of_shortcuts) == len(norms) == {"basic": 1}.get(kind, 2)
    for norm, given in zip(norms, of_shortcuts, strict=True):
        assert all(a is b for a, b in zip(norm.scale_shift(), given, strict=True))
    for block in (*model.layer1, *model.layer2):
        block.recomputed = True
    for name, again in maps_and_gradients(model, x).items():
        assert torch.equal(again, found[name]), name


@pytest.mark.parametrize("watched", ["block", "stage", "another's", "nothing"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_blocks_convolution_and_its_shortcut_take_different_tensors(kind, watched, calls):
    """So that their gradients meet where the map was made; modules that are watched hand on single maps."""
    model, x = resnet(kind), images()
    expected = maps_and_gradients(model, x)
    seen = []
    if watched == "another's":
        model.layer2[0] = nn.Sequential(model.layer2[0])  # which takes one map
    elif watched != "nothing":
        module = model.layer2 if watched == "stage" else model.layer2[0]
        module.register_forward_hook(lambda _, given, out: seen.append((*given, out)))
    calls.clear()
    found = maps_and_gradients(model, x)
    assert all(torch.equal(*pair) for pair in zip(found.values(), expected.values(), strict=True))
    assert all(isinstance(tensor, torch.Tensor) for given in seen for tensor in given)
    assert len(seen) == (watched in ("block", "stage")) and all(len(given) == 2 for given in seen)


@pytest.mark.parametrize("place", ["last", "shortcut"])
def test_norms_of_different_kinds_are_applied_one_by_one(place, calls):
    block = resnet("bottleneck").layer2[0]
    x = torch.randn(2, 32, 6, 5)
    if place == "last":
        block.bn3 = nn.BatchNorm2d(64)
    else:
        block.downsample[1] = nn.BatchNorm2d(64)
    found = block(x)
    assert len(calls) == 3 and all(given[5:] == (None, None) for given in calls)

    def apply(conv, norm, x):
        x = conv(x)
        return norm(x) if isinstance(norm, nn.BatchNorm2d) else frozen_norm_reference(x, *norm.scale_shift())

    y = apply(block.conv2, block.bn2, apply(block.conv1, block.bn1, x).relu()).relu()
    torch.testing.assert_close(found, (apply(block.conv3, block.bn3, y) + apply(*block.downsample, x)).relu())


def check_in_one_pass(kind, monkeypatch, device="cpu", dtype=torch.float64, tolerance=1e-9):
    """With the kernel after each convolution, maps and gradients are those of folded norms."""
    results = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("DNDETR_BACKEND_FROZEN_NORM", backend)
        _backend.forget()
        results[backend] = maps_and_gradients(resnet(kind, device=device, dtype=dtype), images(device, dtype))
    for name, expected in results["reference"].items():
        size = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(results["triton"][name], expected, rtol=tolerance, atol=tolerance * size)


INTERPRETED = """
import pytest
from test_backbone import *
for kind in KINDS:
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_in_one_pass(kind, monkeypatch)
        check_in_one_pass(kind, monkeypatch, dtype=torch.float32, tolerance=1e-5)
"""


def test_in_the_interpreter_of_triton(interpreter):
    interpreter(INTERPRETED)


STEMS = {
    "frozen": ({}, True),
    "learns": ({"frozen": 0}, False),
    "small": ({"stem": "small"}, False),
    "batch": ({"norm": "batch"}, False),
}


@pytest.mark.parametrize("kind", STEMS)
def test_stems_without_gradients_have_kernels_of_their_own(kind, monkeypatch):
    """Of a plain one; on a CPU, told that it is a GPU in float16."""
    options, taken = STEMS[kind]
    model, x, calls = ResNet((1,), (8,), outputs=(1,), **options), images(), []
    plain = [model.eval()(x)[0], model(x.requires_grad_())[0]]

    def recorded(x, weight, *norm):
        calls.append(weight.dtype)
        return stem_reference(x, weight.float(), *norm)

    monkeypatch.setattr(backbone, "half_precision", lambda *_: torch.float16)
    monkeypatch.setattr(backbone, "stem", recorded)
    on_the_reference = model(x.detach())
    assert not calls and torch.equal(*on_the_reference, plain[0])
    choose = _backend.choose
    monkeypatch.setattr(_backend, "choose", lambda op, **on: ("triton", "") if op == "stem" else choose(op, **on))
    (found,), (of_leaves,) = model(x.detach()), model(x)
    assert calls == [torch.float16] * taken and torch.equal(of_leaves, plain[1])
    torch.testing.assert_close(found, plain[0], rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        model(x)
    assert len(calls) == taken + (kind in ("frozen", "learns"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stems_under_autocast_on_a_gpu(dtype, fresh_backends, monkeypatch):
    """Maps and gradients are as close to those of float64 with the stem's own kernels as with torch's."""
    model, x, found = resnet("bottleneck", device="cuda"), images("cuda"), {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("DNDETR_BACKEND_STEM", backend)
        _backend.forget()
        with torch.autocast("cuda", dtype):
            found[backend] = maps_and_gradients(model, x.contiguous())
    exact = maps_and_gradients(model.double(), x.double())

    def error(backend, name):
        return (found[backend][name].double() - exact[name]).norm() / exact[name].norm()

    for name in exact:
        assert error("triton", name) < 2 * error("reference", name) + torch.finfo(dtype).eps, name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind, fresh_backends, monkeypatch):
    check_in_one_pass(kind, monkeypatch, "cuda")


@pytest.fixture
def norm():
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(6)
    norm.load_state_dict({name: torch.rand(6) + 0.5 for name in norm.state_dict()})
    return norm


def check(norm):
    """Scale and shift are right, and kept: -> them."""
    weight, bias, mean, var = (buffer.detach() for buffer in norm.buffers())
    scale, shift = found = norm.scale_shift()
    wanted = weight / (var + norm.eps).sqrt()
    torch.testing.assert_close(scale, wanted)
    torch.testing.assert_close(shift, bias - mean * wanted)
    assert all(a is b for a, b in zip(found, norm.scale_shift(), strict=True))
    return found


def changed(norm):
    norm.running_mean.add_(1)
    return norm


CHANGES = {
    "load": lambda norm: norm.load_state_dict({name: torch.rand(6) for name in norm.state_dict()}),
    "assign": lambda norm: norm.load_state_dict({name: torch.rand(6) for name in norm.state_dict()}, assign=True),
    "foreach": lambda norm: torch._foreach_lerp_(list(norm.buffers()), [torch.ones(6)] * 4, 0.3),
    "in-place": changed,
    "new-buffer": lambda norm: setattr(norm, "bias", torch.rand(6)),
    "data": lambda norm: setattr(norm.weight, "data", torch.rand(6)),
    "precise": lambda norm: norm.double(),
    "there-and-back": lambda norm: norm.bfloat16().float(),
    "copy": lambda norm: changed(copy.deepcopy(norm)),
    "pickle": lambda norm: changed(pickle.loads(pickle.dumps(norm))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_scale_and_shift_follow_the_buffers(norm, change):
    first = check(norm)
    result = CHANGES[change](norm)
    other = result if isinstance(result, FrozenBatchNorm2d) else norm
    # Made anew in place, for graphs that know the address; a copy has its own.
    elsewhere = other is not norm or change == "precise"
    assert all((a is not b) == elsewhere for a, b in zip(first, check(other), strict=True))
    assert list(norm.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    check(norm)


def test_nothing_made_in_a_trace_or_transform_is_kept(norm):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        norm.scale_shift()
    assert norm._kept is None
    x = torch.randn(3, 6)
    expected = x * norm.scale_shift()[0]
    norm._kept = None
    torch.testing.assert_close(torch.func.vmap(lambda x: x * norm.scale_shift()[0])(x), expected)
    torch.func.grad(lambda x: (x * norm.scale_shift()[0]).sum())(x)
    torch.testing.assert_close(
        torch.compile(lambda x: x * norm.scale_shift()[0], fullgraph=True, backend="eager")(x), expected
    )
    assert norm._kept is None
    check(norm)
    assert torch.equal(torch.func.vmap(lambda x: x * norm.scale_shift()[0])(x), expected)
    norm.weight.requires_grad_()
    assert norm.scale_shift()[0].requires_grad


def test_what_inference_keeps_serves_training(norm):
    with torch.inference_mode():
        scale, _ = check(norm)
    (torch.ones(6, requires_grad=True) * scale).sum().backward()
    with torch.inference_mode():
        norm.double().scale_shift()  # buffers without a count of changes
    assert norm._kept[1][0] is scale


@pytest.mark.gpu
def test_a_capture_keeps_nothing_and_uses_what_is_kept(norm):
    norm.cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = norm.scale_shift()
    assert norm._kept is None
    graph.replay()
    kept = check(norm)
    torch.testing.assert_close(found, kept)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert norm.scale_shift()[0] is kept[0]


NARROW = """
import torch
from dndetr.models.backbone import ResNet

torch.manual_seed(0)
model = ResNet((1, 1, 1, 1), (8, 12, 16, 20), frozen=0).to(memory_format=torch.channels_last)
for height in (448, 512, 448):
    (y,) = model(torch.randn(1, 3, height, 640))
    y.square().mean().backward()
exact = ResNet((1, 1, 1, 1), (8, 12, 16, 20), frozen=0).double()
exact.load_state_dict(model.state_dict())
images, grads = torch.randn(1, 3, 96, 64), []
for network, x in ((model, images), (exact, images.double())):
    (y,) = network(x)
    weights = [layer[0].downsample[0].weight for layer in (network.layer2, network.layer3, network.layer4)]
    grads.append(torch.autograd.grad(y.square().mean(), weights))
for grad, wanted in zip(*grads):
    assert (grad - wanted).norm() < 1e-3 * wanted.norm()
"""


def test_narrow_shortcuts_write_within_their_memory():
    """In a process of its own, which oneDNN's own gradient of strided weights, of few channels, ends on AVX-512."""
    done = subprocess.run([sys.executable, "-c", NARROW], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
