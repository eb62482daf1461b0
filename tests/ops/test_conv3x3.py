"""The C++ 3x3 convolution against torch's: instruction sets, edges, memory layouts, NaN, threads, registration."""

import pytest
import torch
from gradients import outputs

from dndetr.models.backbone import ResNet
from dndetr.ops import _backend
from dndetr.ops.conv3x3 import CASES, conv3x3, conv3x3_reference, make_case

NAMES = ("x", "weight", "bias")
TOLERANCE = 24 * torch.finfo(torch.float32).eps  # of the largest number


def ours(x, weight, bias=None, stride=1):
    return conv3x3(x, weight, bias, stride, backend="cpp")


def convolutions(stride):
    """Ours and torch's, of tensors alone."""
    return (
        lambda x, weight, bias=None: ours(x, weight, bias, stride),
        lambda x, weight, bias=None: conv3x3_reference(x, weight, bias, stride),
    )


def compare(inputs, stride):
    """Output and gradients by name against torch's in float64, within TOLERANCE or what torch is off in float32."""
    names, (mine, reference) = NAMES[: len(inputs)], convolutions(stride)
    exact = outputs(reference, [tensor.double() for tensor in inputs], names)
    plain, found = outputs(reference, inputs, names), outputs(mine, inputs, names)
    for name, truth in exact.items():
        assert found[name].isfinite().all(), name
        if truth.numel():
            allowed = torch.maximum(TOLERANCE * truth.abs().max(), (plain[name] - truth).abs().max())
            assert (found[name] - truth).abs().max() <= allowed, name


@pytest.fixture
def calls(extension, monkeypatch):
    """Names of the compiled functions that ran."""
    _backend.choose("conv3x3")  # its self-test does not count
    ran = []

    class Module:
        def __getattr__(self, name):
            ran.append(name)
            return getattr(extension, name)

    monkeypatch.setattr(_backend, "compiled", Module)
    return ran


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(simd, name, stride):
    compare(make_case(name), stride)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("width", [1, 3, 6, 12, 15])
def test_every_cut_of_the_last_tiles(simd, height, width, stride):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 32, height, width), torch.randn(32, 32, 3, 3)
    compare((x, weight), stride)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("name", ["many-tiles", "wide"])
def test_threads_change_no_bit(simd, name, threads, stride):
    """However tiles and outputs are shared out; three threads share outputs of the wide one."""
    inputs, before, (mine, _) = make_case(name), torch.get_num_threads(), convolutions(stride)
    once = outputs(mine, inputs, NAMES)
    try:
        torch.set_num_threads(threads)
        again = outputs(mine, inputs, NAMES)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_any_layout_is_taken():
    x, weight, bias = make_case("edges")
    expected = ours(x, weight, bias)
    shifted = torch.empty(x.numel() + 1)[1:].view(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2).copy_(x)
    assert shifted.data_ptr() % 64
    for same in (x.contiguous(), shifted, x.repeat(1, 1, 1, 2)[..., : x.shape[3]]):
        assert torch.equal(ours(same, weight.contiguous(), bias), expected)
    assert expected.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_any_layout(stride):
    x, weight, bias = make_case("edges")
    given = torch.randn_like(conv3x3_reference(x, weight, bias, stride)).contiguous()
    for same in (given, given.to(memory_format=torch.channels_last), given[:1].expand_as(given)):
        found, expected = [], []
        for convolve, results in zip(convolutions(stride), (found, expected), strict=True):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            results += torch.autograd.grad(convolve(*leaves), leaves, same)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_wanted_gradients_are_computed(calls, wanted):
    leaves = [tensor.requires_grad_(index in wanted) for index, tensor in enumerate(make_case("edges"))]
    ours(*leaves).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [index in wanted for index in range(3)]
    assert ("conv3x3_grad_input" in calls) == (0 in wanted)
    assert ("conv3x3_grad_weight" in calls) == (1 in wanted)


def test_nan_stays_within_reach(simd):
    """A pixel that is not a number spoils its tile's neighbourhood, no further, and no other image."""
    x, weight, bias = make_case("many-tiles")
    clean = ours(x, weight, bias)
    x[0, 3, 20, 20] = float("nan")
    spoilt = ours(x, weight, bias)
    assert spoilt[0, :, 19:22, 19:22].isnan().all()
    spoilt[0, :, 15:26, 15:26], clean[0, :, 15:26, 15:26] = 0, 0
    assert torch.equal(spoilt, clean)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_magnitude_does_not_matter(scale):
    x, weight, _ = make_case("wide")
    torch.testing.assert_close(ours(x * scale, weight) / scale, ours(x, weight), rtol=1e-4, atol=1e-4)


def test_what_the_kernel_does_not_take_is_torchs(calls):
    x, weight, bias = make_case("edges")
    assert conv3x3(x.double(), weight.double()).dtype == torch.float64
    assert conv3x3(x[:, :24], weight[:, :24], bias).shape[1] == 96
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3x3(x, weight, bias).dtype == torch.bfloat16
    exported = torch.export.export(torch.nn.Sequential(Convolution(weight)), (x,))
    assert not any("dndetr" in str(node.target) for node in exported.graph.nodes)
    assert not [name for name in calls if name.startswith("conv3x3")]
    assert torch.equal(conv3x3(x, weight, bias, backend="reference"), conv3x3_reference(x, weight, bias))


def test_a_second_derivative_is_refused():
    x, weight, bias = (tensor.requires_grad_() for tensor in make_case("edges"))
    (grad_x,) = torch.autograd.grad(ours(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="conv3x3 can be differentiated once"):
        grad_x.sum().backward()


def test_shapes_that_do_not_fit_are_named():
    x, weight, bias = make_case("edges")
    for wrong in ((x[0], weight, bias), (x, weight[:, :, :, :2], bias), (x, weight.repeat(1, 2, 1, 1), bias)):
        with pytest.raises(ValueError, match=r"weight \[K, C, 3, 3\], bias \[K\]; got \["):
            conv3x3(*wrong)
    with pytest.raises(ValueError, match=r"\[96, 32, 3, 3\], \[95\]"):
        conv3x3(x, weight, bias[1:])


class Convolution(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return conv3x3(x, self.weight)


@pytest.mark.parametrize("stride", [1, 2])
def test_registration(stride):
    inputs = [tensor.requires_grad_() for tensor in make_case("edges")]
    torch.library.opcheck(torch.ops.dndetr.conv3x3, (*inputs, stride))


def test_other_strides_are_refused():
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        conv3x3(*make_case("one-tile"), stride=3)


def test_compiles_whole(extension):
    inputs = make_case("edges")
    whole = torch.compile(lambda *given: conv3x3(*given) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(*inputs), ours(*inputs) * 2)


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_a_backbone_takes_it_where_it_can(calls, norm):
    """Convolutions of 3x3 with channels in whole panels; results and gradients are torch's."""
    torch.manual_seed(0)
    backbone = ResNet((1, 2), (32, 64), norm=norm, frozen=0, outputs=(1, 2))
    backbone.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)

    def run():
        backbone.zero_grad()
        maps = backbone(images)
        sum(m.square().mean() for m in maps).backward()
        return [*maps, *(parameter.grad.clone() for parameter in backbone.parameters())]

    found = run()
    assert calls.count("conv3x3") == 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DNDETR_BACKEND", "reference")
        _backend.forget()
        expected = run()
    _backend.forget()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item() + 1e-6)
