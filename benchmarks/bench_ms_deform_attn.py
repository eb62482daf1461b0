"""Multi-scale deformable attention on the CPU: compiled against the grid_sample composite, timed alternately.

``pytest benchmarks/bench_ms_deform_attn.py -s``; ratios of medians are printed and stored in ``extra_info``. Offsets,
logits and value get gradients, as in the models; reference points do not.
"""

import importlib
import statistics
import time
from functools import partial

import pytest
import torch

from dndetr.ops import ms_deform_attn_fused

op = importlib.import_module("dndetr.ops.ms_deform_attn")

TIMED = [name for name in op.CASES if name.startswith("train") or name in ("quarter-encoder", "decoder")]


def timed(backend, arguments, grad_out) -> tuple[float, float]:
    """Seconds of the forward pass, and of both passes."""
    value, _, _, offsets, logits, _ = arguments
    start = time.perf_counter()
    out = ms_deform_attn_fused(*arguments, backend=backend)
    middle = time.perf_counter()
    torch.autograd.grad(out, (value, offsets, logits), grad_out)
    return middle - start, time.perf_counter() - start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TIMED)
def bench_ms_deform_attn(benchmark, provenance, name, dtype, seconds=1.5):
    arguments = op.make_case(name, dtype)
    for index in (0, 3, 4):
        arguments[index].requires_grad_()
    grad_out = torch.randn_like(ms_deform_attn_fused(*arguments).detach())
    run = {backend: partial(timed, backend, arguments, grad_out) for backend in ("reference", "cpp")}
    times = {backend: [] for backend in run}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["cpp"]) < 5:
        for backend, function in run.items():
            times[backend].append(function())
    median = {
        backend: [statistics.median(column) for column in zip(*rows, strict=True)] for backend, rows in times.items()
    }
    forward, both = (slow / fast for slow, fast in zip(median["reference"], median["cpp"], strict=True))
    benchmark.extra_info.update(provenance, seconds=median, forward_ratio=forward, both_ratio=both)
    ours, plain = ("/".join(f"{x * 1e3:.2f}" for x in median[backend]) for backend in ("cpp", "reference"))
    print(f"\n{name} {dtype}: grid_sample {plain} ms, ours {ours} ms, forward {forward:.1f}x, both {both:.1f}x")
    benchmark(run["cpp"])
