"""Switching the implementation of an op changes a training run within tolerance only."""

import detectors
import pytest
import torch

from dndetr.ops import _backend

STEPS = 50


def losses(backend, monkeypatch) -> torch.Tensor:
    monkeypatch.setenv("DNDETR_BACKEND_MS_DEFORM_ATTN", backend)
    _backend.forget()
    batch = detectors.make_batch([3, 5], 8, canvas=(64, 64))
    step = detectors.make_step(detectors.build("dn-deformable-detr"), groups=2)
    return torch.stack([step(batch)[0].total.detach().clone() for _ in range(STEPS)])


@pytest.mark.slow
def test_deformable_attention_in_cpp_and_in_torch(extension, fresh_backends, monkeypatch):
    plain, compiled = (losses(backend, monkeypatch) for backend in ("reference", "cpp"))
    assert not torch.equal(plain, compiled), "both runs took the same implementation"
    assert plain[-5:].mean() < 0.8 * plain[:5].mean()
    # One rounding apart at first; the runs may drift, the curves must not.
    torch.testing.assert_close(compiled[:5], plain[:5], rtol=1e-4, atol=0)
    assert ((compiled - plain).abs() < 0.05 * plain).float().mean() > 0.9
    torch.testing.assert_close(compiled[-10:].mean(), plain[-10:].mean(), rtol=0.05, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_deformable_attention_in_cuda_and_in_torch(extension, fresh_backends, monkeypatch, precision):
    curves = []
    for backend in ("reference", "cuda"):
        monkeypatch.setenv("DNDETR_BACKEND_MS_DEFORM_ATTN", backend)
        _backend.forget()
        batch = detectors.make_batch([3, 5], 8, canvas=(64, 64))
        step = detectors.make_step(detectors.build("dn-deformable-detr").cuda(), groups=2, precision=precision)
        curves.append(torch.stack([step(batch)[0].total.detach().clone() for _ in range(STEPS)]))
    plain, compiled = curves
    torch.testing.assert_close(compiled[-10:].mean(), plain[-10:].mean(), rtol=0.05, atol=0)
