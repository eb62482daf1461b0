"""The C++ gradients of a linear layer's weight and bias against torch's: instruction sets, cuts, layouts, NaN."""

import pytest
import torch

from dndetr.ops import _backend, weight_gradients
from dndetr.ops.weight_gradients import CASES, make_case, weight_gradients_reference


@pytest.fixture
def calls(extension, monkeypatch):
    """Sizes that the compiled function was called with."""
    _backend.choose("weight_gradients")  # its self-test does not count
    seen = []

    class Module:
        weight_gradients_workspace = staticmethod(extension.weight_gradients_workspace)

        @staticmethod
        def weight_gradients(sizes, *given):
            seen.append(sizes)
            extension.weight_gradients(sizes, *given)

    monkeypatch.setattr(_backend, "compiled", lambda: Module)
    return seen


def ours(grad_out, x):
    return weight_gradients(grad_out, x, backend="cpp")


def compare(grad_out, x):
    """Both against float64: within twice what torch is off in float32, and a few rounding units of what is summed."""
    exact = weight_gradients_reference(grad_out.double(), x.double())
    summed = weight_gradients_reference(grad_out.double().abs(), x.double().abs())
    plain = weight_gradients_reference(grad_out, x)
    for found, truth, terms, torchs in zip(ours(grad_out, x), exact, summed, plain, strict=True):
        assert found.dtype == torch.float32 and found.shape == truth.shape
        if truth.numel():
            allowed = 2 * (torchs - truth).abs().max() + 2 * torch.finfo(torch.float32).eps * terms.max()
            assert (found - truth).abs().max() <= allowed


@pytest.mark.parametrize("name", CASES)
def test_sums_of_products(simd, name):
    compare(*make_case(name))


@pytest.mark.parametrize("rows", [1, 15, 17, 383, 385, 768, 1537])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (31, 33), (8, 65), (64, 1), (1, 64)])
def test_every_cut(simd, rows, inputs, outputs):
    torch.manual_seed(rows)
    compare(torch.randn(rows, outputs), torch.randn(rows, inputs))


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads_change_no_bit(simd, threads):
    given, before = make_case("many-parts"), torch.get_num_threads()
    once = ours(*given)
    try:
        torch.set_num_threads(threads)
        again = ours(*given)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, once, again))


def test_long_sums_lose_no_digits():
    """Two million equal terms: summed one after the other in float32, they would be off by a hundredth."""
    found, bias = ours(torch.full((2_000_000, 1), 0.1), torch.ones(2_000_000, 1))
    assert found.item() == pytest.approx(2e5, rel=5e-5)
    assert bias.item() == pytest.approx(2e5, rel=5e-5)


def test_any_layout_is_taken(extension):
    grad_out, x = make_case("cut-panels")
    expected = ours(grad_out, x)
    columns = (grad_out.t().contiguous().t(), x.t().contiguous().t())
    parts = (grad_out.repeat(1, 2)[:, : grad_out.shape[1]], x.repeat_interleave(2, 0)[::2])
    shifted = [torch.empty(t.numel() + 1)[1:].view_as(t).copy_(t) for t in (grad_out, x)]
    assert all(t.data_ptr() % 16 for t in shifted)
    for same in (columns, parts, shifted):
        assert all(map(torch.equal, ours(*same), expected))
    row = torch.randn(1, 40)
    compare(row.expand(33, 40), x)


def test_nan_stays_in_its_column(simd):
    grad_out, x = make_case("cut-panels")
    clean, clean_bias = ours(grad_out, x)
    grad_out[5, 40] = float("nan")
    spoilt, bias = ours(grad_out, x)
    assert spoilt[40].isnan().all() and bias[40].isnan()
    others = torch.arange(len(bias)) != 40
    assert torch.equal(spoilt[others], clean[others]) and torch.equal(bias[others], clean_bias[others])


def test_what_the_kernel_does_not_take_is_torchs(calls):
    grad_out, x = make_case("few-columns")
    assert weight_gradients(grad_out.double(), x.double())[0].dtype == torch.float64
    weight, bias = weight_gradients(grad_out, x[:, :0])
    assert weight.shape == (5, 0)
    assert torch.equal(bias, grad_out.sum(0))
    assert [grad.tolist() for grad in weight_gradients(grad_out[:0], x[:0])] == [[[0] * 3] * 5, [0] * 5]
    assert not calls
    weight_gradients(grad_out, x)
    assert calls == [(70, 3, 5)]


def test_shapes_that_do_not_fit_are_named():
    for grad_out, x in ((torch.ones(3, 2), torch.ones(4, 2)), (torch.ones(3), torch.ones(3, 2))):
        with pytest.raises(ValueError, match=r"grad_out must be \[M, N\], x \[M, K\]; got \[3"):
            weight_gradients(grad_out, x)


def test_registration(extension):
    torch.library.opcheck(torch.ops.dndetr.weight_gradients, make_case("cut-panels"))
