"""Multi-scale deformable attention against the grid_sample composite and whatever peer can be imported.

``pytest benchmarks/bench_ms_deform_attn.py -s --results FILE``; ratios of medians are printed, with bytes and their
share of what this machine's memory does at best. Value, offsets and logits get gradients, as in the models; reference
points do not. CPU results are always deterministic; on a GPU the deterministic backward has its own row.
"""

import importlib
import statistics
import time
from functools import partial

import ceilings
import deform_attn_peers
import pytest
import torch

from dndetr.ops import ms_deform_attn_fused

op = importlib.import_module("dndetr.ops.ms_deform_attn")

FULL = ((100, 167), (50, 84), (25, 42), (13, 21))  # the levels of an image of 800 x 1333
PIXELS = sum(h * w for h, w in FULL)
DECODERS = {f"decoder-{queries}": (1, queries, 8, 32, FULL, 4, 4, True) for queries in (300, 500, 1100)}
TRAINING = {name: case for name, case in op.CASES.items() if name.startswith("train")}
ON_CPU = {**TRAINING, "quarter-encoder": op.CASES["quarter-encoder"], **DECODERS}
ON_CPU["decoder-500, 2 images"] = (2, *DECODERS["decoder-500"][1:])
ON_GPU = {
    f"{name}, {batch} images": (batch, *case[1:])
    for batch in (2, 16)
    for name, case in {
        "encoder": (1, PIXELS, 8, 32, FULL, 4, 2, True),
        "decoder-500": DECODERS["decoder-500"],
    }.items()
}
# What the CPU path must reach, with AVX-512 and with AVX2: forward, forward and backward.
DECODER_GOAL = {"avx512": (8, 8), "avx2": (5, 5)}
GOALS = {
    "quarter-encoder": {"avx512": (10, 8), "avx2": (6, 5)},
    "decoder-500": DECODER_GOAL,
    "decoder-500, 2 images": DECODER_GOAL,
}


def traffic(arguments) -> dict[str, int]:
    """Bytes that a forward pass gathers, and that each pass has to move to and from memory once."""
    value, _, reference, offsets, logits, _ = arguments
    size, width = value.element_size(), value.shape[3]
    gathered = logits.numel() * 4 * width * size
    out = offsets.shape[0] * offsets.shape[1] * offsets.shape[2] * width * size
    inputs = sum(x.nbytes for x in (value, reference, offsets, logits))
    grads = offsets.nbytes + logits.nbytes + value.numel() * (4 + (0 if size >= 4 else size))
    return {"gathered": gathered, "forward": inputs + out, "backward": inputs + out + grads}


@pytest.fixture(scope="module")
def best(request):
    """Ceilings of the device whose benchmark runs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = ceilings.measure(device)
    print("\n" + ", ".join(f"{kind} {rate / 1e9:.0f} GB/s" for kind, rate in found.items()))
    return found


def fused(arguments, backend: str) -> tuple:
    """The op on a backend as a function without arguments, and its inputs, which want gradients."""
    value, _, _, offsets, logits, _ = arguments
    inputs = tuple(x.requires_grad_() for x in (value, offsets, logits))
    return partial(ms_deform_attn_fused, *arguments, backend=backend), inputs


def functions(arguments, device) -> tuple[dict, dict]:
    """Every implementation as a function without arguments, with its inputs, and what is missing."""
    value, shapes, reference, offsets, logits, _ = arguments
    runs = {
        "grid_sample": fused(arguments, "reference"),
        "ours": fused(arguments, {"cpu": "cpp", "cuda": "cuda"}[device]),
    }
    peers, missing = deform_attn_peers.importable(device)
    with torch.no_grad():
        locations = op.sampling_locations(reference.to(offsets.dtype), offsets, shapes)
        weights = logits.softmax(-1).view(offsets.shape[:-1])
    inputs = (value, locations.requires_grad_(), weights.requires_grad_())
    for name, peer in peers.items():
        runs[name] = (partial(peer, value, shapes, *inputs[1:]), inputs)
    return runs, missing


def timed(run, inputs, grad_out) -> tuple[float, float]:
    """Seconds of the forward pass, and of both passes."""
    start = time.perf_counter()
    out = run()
    middle = time.perf_counter()
    torch.autograd.grad(out, inputs, grad_out)
    return middle - start, time.perf_counter() - start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ON_CPU)
def bench_ms_deform_attn(benchmark, record, provenance, best, name, dtype, seconds=1.5):
    arguments = op.make_inputs(ON_CPU[name], dtype)
    runs, missing = functions(arguments, "cpu")
    grad_out = torch.randn_like(runs["ours"][0]().detach())
    times = {peer: [] for peer in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 5:
        for peer, (run, inputs) in runs.items():
            times[peer].append(timed(run, inputs, grad_out))
    median = {peer: [statistics.median(column) for column in zip(*rows, strict=True)] for peer, rows in times.items()}
    goal = GOALS.get(name, {}).get(provenance["simd"])
    found = {}
    if goal and dtype == torch.float32:
        ratios = [slow / fast for slow, fast in zip(median["grid_sample"], median["ours"], strict=True)]
        reached = all(ratio >= wanted for ratio, wanted in zip(ratios, goal, strict=True))
        found = {"goal": goal, "goal_reached": reached}
        print(f"\ngoal {goal[0]}x forward, {goal[1]}x both: {'reached' if reached else 'NOT REACHED'}", end="")
    report(record, f"{name}, {dtype}", arguments, median, best, missing, **found)
    benchmark(timed, *runs["ours"], grad_out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ON_GPU)
def bench_ms_deform_attn_on_gpu(record, best, name, dtype):
    arguments = op.make_inputs(ON_GPU[name], dtype, "cuda")
    runs, missing = functions(arguments, "cuda")
    grad_out = torch.randn_like(runs["ours"][0]().detach())
    median, memory, title = {}, {}, f"{name}, {dtype}"
    for peer in sorted(runs, key=lambda peer: peer != "ours"):  # ours first, whatever becomes of the rest
        run, inputs = runs[peer]
        try:
            memory[peer] = peak_memory(run, inputs, grad_out)
            median[peer] = gpu_times(run, inputs, grad_out)
        except Exception as failure:  # out of memory, too: the composite keeps every sample
            missing[peer] = f"{type(failure).__name__}: {failure}".splitlines()[0]
            torch.cuda.empty_cache()
        if "ours" in median:
            keep(record, title, arguments, median, best, missing, peak_memory=memory)
    torch.use_deterministic_algorithms(True)
    try:
        median["ours, deterministic"] = gpu_times(*runs["ours"], grad_out)
    finally:
        torch.use_deterministic_algorithms(False)
    report(record, title, arguments, median, best, missing, peak_memory=memory)


def peak_memory(run, inputs, grad_out) -> int:
    """Bytes that a pass forward and backward needs at most, beside its inputs."""
    torch.autograd.grad(run(), inputs, grad_out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(run(), inputs, grad_out)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def gpu_times(run, inputs, grad_out) -> list[float]:
    """Seconds of GPU time of the forward pass, and of both passes."""
    both = partial(lambda: torch.autograd.grad(run(), inputs, grad_out))
    with torch.no_grad():
        forward = ceilings.gpu_seconds(run)
    return [forward, ceilings.gpu_seconds(both)]


def keep(record, name, arguments, median, best, missing, **found) -> dict[str, float]:
    """Store seconds and shares of the ceilings; the shares."""
    ours, moved = median["ours"], traffic(arguments)
    shares = {kind: moved["gathered"] / ours[0] / rate for kind, rate in best.items() if kind.startswith("gather")}
    shares["copy"] = moved["forward"] / ours[0] / best["copy"]
    backward = max(ours[1] - ours[0], 1e-9)
    if "reductions in L2" in best:  # float32 sums, whatever the dtype of value
        reduced = moved["gathered"] * 4 // arguments[0].element_size()
        shares["reductions in L2"] = reduced / backward / best["reductions in L2"]
    found |= {"bytes": moved, "ceilings": best, "shares": shares, "missing": missing, "detail": True}
    for index, passes in enumerate(("forward", "forward and backward")):
        seconds = {peer: times[index] for peer, times in median.items()}
        record(f"deformable attention, {passes}, {name}", seconds, **found)
    return shares


def report(record, name, arguments, median, best, missing, **found) -> None:
    """Store it, and print milliseconds, ratios and shares."""
    shares, ours = keep(record, name, arguments, median, best, missing, **found), median["ours"]
    ratios = {
        peer: [slow / fast for slow, fast in zip(times, ours, strict=True)]
        for peer, times in median.items()
        if peer != "ours"
    }
    print(f"\n{name}: forward {ours[0] * 1e3:.3f} ms, both {ours[1] * 1e3:.3f} ms")
    for peer, (forward, both) in ratios.items():
        print(f"  {peer}: {forward:.1f}x forward, {both:.1f}x both")
    print("  of the ceiling: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()))
    for peer, reason in missing.items():
        print(f"  not measured: {peer}, {reason}")
