"""Launches, waits and shares are read right from traces, as torch writes them and as a GPU would fill them."""

import cuda_calls
import pytest
import torch

STAGES = ("forward", "backward")


def mark(name: str, start: float, end: float) -> dict:
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": start, "dur": end - start, "args": {}}


def call(name: str, at: float, number: int, cat: str = "cuda_runtime") -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": at, "dur": 0.5, "args": {"correlation": number}}


def work(name: str, seconds: float, number: int, cat: str = "kernel", at: float = 500.0) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": at, "dur": seconds * 1e6, "args": {"correlation": number}}


EVENTS = [
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    call("cudaLaunchKernel", 5, 1),  # before the first step
    work("before", 9, 1),
    mark(cuda_calls.STEP, 10, 20),
    {**mark(cuda_calls.STEP, 700, 900), "cat": "gpu_user_annotation"},
    mark("forward", 11, 14),
    call("cudaMemcpyAsync", 10.5, 2),
    work("Memcpy HtoD (Pinned -> Device)", 0.1, 2, "gpu_memcpy"),
    call("cuLaunchKernelEx", 12, 3, "cuda_driver"),
    work("group_attention_forward_kernel", 0.2, 3),
    mark("backward", 14, 18),
    call("cudaLaunchKernelExC_v11060", 15, 4),
    work("gemm", 0.4, 4),
    call("cudaEventRecord", 16, 5),
    call("cudaStreamWaitEvent", 16, 6),
    call("cudaMalloc", 16.5, 7),
    call("cudaStreamSynchronize", 17, 8),
    mark(cuda_calls.STEP, 30, 40),
    call("cudaGraphLaunch_v10000", 31, 9),
    work("gemm", 0.1, 9),
    work("Memset (Device)", 0.2, 9, "gpu_memset"),
    call("cudaMemcpy", 32, 10),
    call("cudaDeviceSynchronize", 50, 11),  # that of whoever traces
]


def test_what_a_step_asks_of_the_device():
    found = cuda_calls.per_step(EVENTS)
    assert found["launches"] == 5 / 2  # two copies, two kernels, one graph
    assert found["waits"] == 2 / 2
    assert found["allocations"] == 1 / 2
    assert found["kernels"] == 3 / 2
    assert found["device_seconds"] == pytest.approx(1.0 / 2)
    assert found["calls"]["cudaGraphLaunch"] == 0.5 and "cudaDeviceSynchronize" not in found["calls"]


def test_what_is_no_launch_and_no_wait():
    for name in (
        "cudaEventRecord",
        "cudaStreamWaitEvent",
        "cudaEventQuery",
        "cudaStreamIsCapturing",
        "cudaGetLastError",
    ):
        found = cuda_calls.per_step([mark(cuda_calls.STEP, 0, 9), call(name, 1, 1)])
        assert (found["launches"], found["waits"], found["allocations"]) == (0, 0, 0), name
    for name in ("cudaEventSynchronize", "cudaDeviceSynchronize", "cuStreamSynchronize", "cuMemcpyDtoH_v2"):
        assert cuda_calls.per_step([mark(cuda_calls.STEP, 0, 9), call(name, 1, 1)])["waits"] == 1, name
    for name in ("cudaMemcpyAsync", "__cudaLaunchKernel", "cudaLaunchCooperativeKernel"):
        found = cuda_calls.per_step([mark(cuda_calls.STEP, 0, 9), call(name, 1, 1)])
        assert (found["launches"], found["waits"]) == (1, 0), name


def test_device_time_by_stage():
    assert cuda_calls.stage_shares(EVENTS, STAGES) == {"forward": 0.2, "backward": 0.4, "other": 0.4}


def test_the_dearest_parts():
    first, second, *_ = cuda_calls.dearest(EVENTS, 3)
    assert first == {"name": "gemm", "calls": 1.0, "seconds": pytest.approx(0.25), "share": 0.5}
    assert second["share"] == 0.2 and len(cuda_calls.dearest(EVENTS, 3)) == 3


def test_torch_marks_steps_and_stages_as_expected():
    def step():
        with torch.profiler.record_function("forward"):
            torch.ones(3).sum()

    events = cuda_calls.trace(step, 3)
    assert len(cuda_calls._spans(events, cuda_calls.STEP)) == len(cuda_calls._spans(events, "forward")) == 3
    found = cuda_calls.per_step(events)
    assert found["launches"] == found["kernels"] == found["waits"] == 0 or torch.cuda.is_available()
