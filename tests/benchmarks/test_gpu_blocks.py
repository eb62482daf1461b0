"""What the first call measures, on a CPU with small detectors and a trace written by hand."""

import json
import os
from functools import partial

import bench_attention
import bench_fused
import bench_gpu_step
import bench_matching
import ceilings
import cuda_calls
import detectors
import gpu_blocks
import gpu_programs
import pytest
import torch
from gpu_call import Call

STEP = {"cat": "user_annotation", "name": cuda_calls.STEP, "ts": 0, "dur": 500}
KERNELS = [(100, 40), (130, 30), (165, 10), (300, 20)]  # start and duration: the second begins within the first
EVENTS = [
    STEP,
    {"cat": "cuda_runtime", "name": "cudaGraphLaunch_v10000", "ts": 10, "dur": 5, "args": {"correlation": 1}},
    *({"cat": "kernel", "name": f"k{ts}", "ts": ts, "dur": dur, "args": {"correlation": 1}} for ts, dur in KERNELS),
]


@pytest.fixture
def call(tmp_path):
    return Call("FIRST", tmp_path / "out", 60)


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Steps are small and on the CPU; what they ask of torch.cuda is answered by a machine without a GPU."""
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    monkeypatch.setattr(bench_gpu_step, "BURSTS", 1)
    monkeypatch.setattr(bench_gpu_step, "BURST", 1)
    monkeypatch.setattr(gpu_blocks, "DEVICE", "cpu")

    def made(preset, images, graph):
        step = detectors.make_step(detectors.build("dn-detr"))
        return step, partial(step, detectors.make_batch([3, 5], 8))

    monkeypatch.setattr(gpu_blocks, "made", made)


def test_a_step_is_kept_before_the_next_one_is_made(on_a_cpu, call):
    told = call.content["blocks"]["step"] = {}
    gpu_blocks.step("preset", 2, ("captured", "eager"), call, told)
    assert list(told) == ["captured", "eager"] and len(told["captured"]["losses"]) == 4
    median, least, most = told["captured"]["ms"]
    assert 0 < least <= median <= most
    assert told["eager"]["waits"] is None and told["eager"]["peak_memory"] == 7
    assert json.loads(call.path.read_text())["blocks"]["step"] == told


def test_ops_are_switched_in_turn(on_a_cpu, call, monkeypatch, fresh_backends):
    seen = []

    def step(preset, images, kinds, call, told):
        seen.append({name for name in os.environ if name.startswith("DNDETR_BACKEND")})
        told["captured"] = {}
        if len(seen) == 3:
            raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_blocks, "step", step)
    found = {}
    with pytest.raises(RuntimeError):
        gpu_blocks.switched("preset", 16, gpu_blocks.FUSED, call, found)
    assert list(found) == ["as it is", "stem on its reference", "frozen_norm on its reference"]
    assert seen == [set(), {"DNDETR_BACKEND_STEM"}, {"DNDETR_BACKEND_FROZEN_NORM"}]
    assert not {name for name in os.environ if name.startswith("DNDETR_BACKEND")}


def test_a_trace_tells_work_from_gaps(on_a_cpu, call, monkeypatch):
    monkeypatch.setattr(cuda_calls, "trace", lambda run: EVENTS)
    found = {}
    gpu_blocks.trace("preset", 2, call, found)
    assert (found["launches"], found["kernels"]) == (1, 4)
    assert (found["span_us"], found["busy_us"], found["small_gaps_us"]) == (220, 100, 5)
    assert found["dearest"][0]["name"] == "k100" and found["shares"]["other"] == 1
    order = json.loads((call.logs / "order-preset-2.json").read_text())
    assert [name for name, _ in order] == ["k100", "k130", "k165", "k300"]


def test_attention_and_matching_are_timed(on_a_cpu, call, monkeypatch):
    monkeypatch.setattr(bench_attention, "replayed", lambda run: run)
    monkeypatch.setattr(ceilings, "gpu_seconds", lambda run: 1e-6)
    monkeypatch.setattr(bench_matching, "alternate", lambda runs, *_: {name: 2e-6 for name in runs if runs["ours"]()})
    found = {}
    gpu_blocks.dense_attention(call, found, tokens=40)
    assert found["ours, 2 images, forward"] > 0 and found["sdpa, 16 images, both passes"] > 0
    assert len(found) == 12
    found = {}
    gpu_blocks.matching(call, found)
    assert len(found) == 6 and all(list(times.values()) == [1.0, 2.0, 2.0] for times in found.values())


def test_activated_products_are_timed_against_two_steps(call, monkeypatch):
    monkeypatch.setattr(ceilings, "gpu_seconds", lambda run: 1e-6 if run() is not None else None)
    monkeypatch.setattr(ceilings, "gpu_copy", lambda: 4e12)
    contest = partial(bench_fused.of_activated_product, (50, 8, 16), "ReLU", True, "cpu", "reference")
    monkeypatch.setattr(bench_fused, "CONTESTS", {"prelu, 1": None, "activated_product_backward, 1": contest})
    found = {}
    gpu_blocks.activated_products(call, found)
    (told,) = found.values()
    assert told["ours"] == told["two steps"] == 1e-6 and told["operations_per_second"] == 2 * 50 * 8 * 16 / 1e-6


def test_a_training_run_is_told_as_far_as_it_got(tmp_path):
    log = tmp_path / "metrics.jsonl"
    rows = [
        {"event": "train", "step": 1, "images_per_second": 50.0},
        {"event": "train", "step": 2, "images_per_second": 60.0},
        {"event": "eval", "step": 2, "epoch": 1, "AP": 0.25},
        {"event": "end", "step": 2, "seconds": 84.6},
    ]
    assert gpu_programs.learned(log) == {"AP": {}, "run_seconds": None, "images_per_second": None}
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert gpu_programs.learned(log) == {"AP": {1: 0.25}, "run_seconds": 84.6, "images_per_second": 60.0}
