"""The benchmark of steps on a GPU, run on a CPU with small detectors: its race, its counts, and what it writes."""

import json
from functools import partial

import bench_gpu_step as bench
import cuda_calls
import detectors
import floors
import official
import peers
import pytest
import torch
from recording import Recording

from dndetr.config import Config, DenoisingConfig
from dndetr.counting.stages import STAGES
from dndetr.model_config import BackboneConfig, ModelConfig
from dndetr.ops import _backend

PRESET = "dn-deformable-detr-r50"


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """What the benchmark asks of torch.cuda, answered by a machine without one."""
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(bench, "floating_point_floor", lambda run, device: floors.floating_point_floor(run))
    monkeypatch.setattr(bench, "SIZE", (64, 96))
    monkeypatch.setattr(bench, "COUNTS", [3, 5])
    monkeypatch.setattr(bench, "BURSTS", 2)


@pytest.fixture
def small_contenders(monkeypatch):
    """Two steps that work, one that runs out of memory at once, and one that fails while it is timed."""
    calls = {"tires": 0}

    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB.\nmore")

    def tires():
        calls["tires"] += 1
        if calls["tires"] > bench.WARM + 1:
            raise RuntimeError("CUDA error: something")

    def contenders(preset, batch):
        def step():
            return partial(detectors.make_step(detectors.build("dn-deformable-detr"), precision=torch.bfloat16), batch)

        return {"ours": step, "ours, eager": step, "too large": too_large, "tires": lambda: tires}

    monkeypatch.setattr(bench, "contenders", contenders)
    monkeypatch.setattr(peers, "CLASSES", detectors.CLASSES)


@pytest.mark.slow
def test_the_whole_benchmark(no_gpu_needed, small_contenders, tmp_path, capsys):
    path = tmp_path / "out.json"
    bench.bench_gpu_step(Recording(path, {}), lambda name: True, PRESET, 2)
    result = json.loads(path.read_text())["results"][f"step of {PRESET}, 2 images of 64x96"]
    assert set(result["seconds"]) == set(result["images_per_second"]) == {"ours", "ours, eager"}
    assert result["images_per_second"]["ours"] == pytest.approx(2 / result["seconds"]["ours"])
    assert result["missing"] == {
        "too large": "OutOfMemoryError: CUDA out of memory. Tried to allocate 90 GiB.",
        "tires": "RuntimeError: CUDA error: something",
    }
    assert {"peak_memory", "reserved_memory", "launches", "waits", "kernels"} <= set(result["counted"]["ours"])
    assert result["refused_wait"] == {"ours": None, "ours, eager": None}
    assert set(result["shares"]) == {*STAGES, "other"}
    assert 0 < result["floor_fraction"] < 1
    assert "not measured: too large" in capsys.readouterr().out


@pytest.mark.slow
def test_a_step_that_waits_or_launches_too_much_fails_and_is_written(
    no_gpu_needed, small_contenders, tmp_path, monkeypatch
):
    path = tmp_path / "out.json"
    counted = {"launches": 4.0, "waits": 1.0}
    monkeypatch.setattr(cuda_calls, "per_step", lambda events: dict(counted))
    with pytest.raises(AssertionError):
        bench.bench_gpu_step(Recording(path, {}), lambda name: True, PRESET, 2)
    (result,) = json.loads(path.read_text())["results"].values()
    assert result["counted"]["ours"]["waits"] == 1.0 and "floor" in result


def test_an_interrupted_benchmark_leaves_what_it_measured(no_gpu_needed, small_contenders, tmp_path, monkeypatch):
    path = tmp_path / "out.json"

    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(cuda_calls, "trace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.bench_gpu_step(Recording(path, {}), lambda name: True, PRESET, 2)
    (result,) = json.loads(path.read_text())["results"].values()
    assert result["seconds"]["ours"] > 0


def test_a_refused_wait_is_told_in_a_line(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits():
        raise RuntimeError("called a synchronizing CUDA operation\nat ...")

    assert bench.refused_wait(waits) == "RuntimeError: called a synchronizing CUDA operation"
    assert bench.refused_wait(lambda: None) is None
    assert modes == ["error", "default"] * 2


def test_the_official_step_says_why_it_is_missing(monkeypatch, tmp_path):
    batch = peers.make_batch(1, 64, 64, [2])
    monkeypatch.delenv("DNDETR_OFFICIAL", raising=False)
    with pytest.raises(ImportError, match="DNDETR_OFFICIAL names no copy"):
        official.step(PRESET, batch, "cpu")
    monkeypatch.setenv("DNDETR_OFFICIAL", str(tmp_path))
    with pytest.raises(ImportError, match=r"holds no models/dn_dab_deformable_detr"):
        official.step(PRESET, batch, "cpu")


def test_references_leave_the_other_choices_alone(extension):
    chosen = _backend.choose("set_loss")
    with peers.references():
        assert _backend.choose("set_loss")[0] == "reference"
        _backend._findings.clear()
    assert _backend.choose("set_loss") == chosen and not _backend._findings


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["dn-detr", "dn-deformable-detr"])
def test_small_peers_train(monkeypatch, variant, precision):
    pytest.importorskip("transformers")
    several = variant == "dn-deformable-detr"
    model = ModelConfig(
        variant=variant,
        backbone=BackboneConfig(outputs=(2, 3, 4) if several else (4,)),
        width=32,
        heads=2,
        hidden=32,
        encoder_layers=1,
        decoder_layers=2,
        queries=10,
        levels=4 if several else 1,
    )
    monkeypatch.setitem(peers.PRESETS, "small peer", lambda: Config(model=model, denoising=DenoisingConfig()))
    batch = peers.make_batch(2, 64, 96, [3, 5])
    ours = peers.our_step("small peer", precision=precision)
    theirs = peers.hf_step("small peer", batch, precision=precision)
    for losses in ([ours(batch)[0].total.item() for _ in range(2)], [theirs().item() for _ in range(2)]):
        assert all(loss > 0 for loss in losses)
