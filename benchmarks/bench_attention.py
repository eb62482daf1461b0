"""Attention ops against what one would use otherwise, timed in turn in one process.

``pytest benchmarks/bench_attention.py -s --results FILE``; ratios of medians are printed. Self-attention: SDPA with the
dense mask (built beforehand), the official bmm, softmax, bmm, and on a GPU, for 16 images in bfloat16, compiled
FlexAttention with a prebuilt block mask (compiling takes longer than all the rest). Cross-attention: SDPA on
concatenated queries and keys. On a GPU every function is also replayed as a CUDA graph; on a CPU the shapes are fewer.
"""

import statistics
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from dndetr.ops import GroupLayout, conditional_attention, group_attention

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LAYOUTS = {
    350: GroupLayout(5, 10, 300),
    500: GroupLayout(5, 40, 300),
    800: GroupLayout(5, 100, 300),
    1100: GroupLayout(10, 20, 900),
    1300: GroupLayout(10, 100, 300),
}
KEYS = {"C5": 25 * 42, "DC5": 50 * 84}
BATCHES = (2, 16)
HEADS, WIDTH = 8, 32


def official(q, k, v, mask):
    """Scores, additive mask, softmax and product, each written out, always in float32."""
    q, k, v = (x.float().flatten(0, 1) for x in (q, k, v))
    weights = (torch.bmm(q / WIDTH**0.5, k.transpose(1, 2)) + mask).softmax(-1)
    return torch.bmm(weights, v).unflatten(0, (-1, HEADS))


def flex(layout, queries):
    """Compiled FlexAttention with the block mask of a layout."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(_batch, _head, i, j):
        return (j >= layout.denoising) | ((i < layout.denoising) & (i // layout.slots == j // layout.slots))

    torch._dynamo.reset()  # the forms of other shapes would count towards the limit beyond which nothing is compiled
    mask = create_block_mask(seen, None, None, queries, queries, device=DEVICE)
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


def sdpa_backend(*arguments) -> str:
    """The kernel that SDPA takes for queries, keys, values and mask."""
    return SDPBackend(torch._fused_sdp_choice(*arguments)).name


def passes(attend, inputs, grad_out, backward: bool):
    """One forward pass, or both, as a function of nothing."""
    leaves = [x.detach().requires_grad_(backward) for x in inputs]

    def run():
        out = attend(*leaves)
        if backward:
            torch.autograd.grad(out, leaves, grad_out.to(out.dtype))

    return run


def replayed(run):
    """The function as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds(run) -> float:
    if not GPU:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def medians(runs: dict, budget: float) -> dict[str, float]:
    """Median seconds of functions called in turn, so that all meet the same machine."""
    times = {name: [] for name in runs}
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times["ours"]) < 5:
        for name, run in runs.items():
            times[name].append(seconds(run))
    return {name: statistics.median(values) for name, values in times.items()}


def report(benchmark, record, title, sdpa, contenders, inputs, grad_out):
    """Time every contender forward and both ways, eager and (on a GPU) replayed."""
    for mode in ("eager", "graph") if GPU else ("eager",):
        for backward in (False, True):
            runs, missing = {}, {}
            for who, attend in contenders.items():
                try:
                    run = passes(attend, inputs, grad_out, backward)
                    runs[who] = replayed(run) if mode == "graph" else run
                    runs[who]()
                except Exception as failure:  # what cannot be compiled, captured or held in memory
                    runs.pop(who, None)
                    missing[who] = str(failure).strip().partition("\n")[0]
            assert "ours" in runs, missing
            name = f"{title}, {mode}, {'forward and backward' if backward else 'forward'}"
            found = medians(runs, 0.3 if GPU else 0.4)
            record(name, found, sdpa=sdpa, missing=missing, detail=True)
            ratios = ", ".join(f"{who} {seconds / found['ours']:.2f}x" for who, seconds in found.items())
            print(f"\n{name}: ours {found['ours'] * 1e3:.3f} ms; {ratios} (SDPA: {sdpa})", end="")
    benchmark(passes(contenders["ours"], inputs, grad_out, True))


@pytest.mark.parametrize("queries", LAYOUTS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def bench_group_attention(benchmark, record, chosen, queries, batch, dtype):
    layout = LAYOUTS[queries]
    packed = torch.randn(batch, queries, 3, HEADS, WIDTH, dtype=dtype, device=DEVICE)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    blocked = layout.blocked(device=DEVICE)
    mask = torch.zeros(blocked.shape, device=DEVICE).masked_fill(blocked, float("-inf"))
    contenders = {
        "ours": partial(group_attention, layout=layout),
        "sdpa": partial(F.scaled_dot_product_attention, attn_mask=~blocked),
        "official": partial(official, mask=mask),
    }
    contenders = {name: attend for name, attend in contenders.items() if chosen(name)}
    if GPU and (batch, dtype) == (16, torch.bfloat16) and chosen("flex"):
        contenders["flex"] = flex(layout, queries)
    title = f"group attention, Q {queries}, B {batch}, {dtype}"
    grad_out = torch.randn(batch, queries, HEADS, WIDTH, dtype=dtype, device=DEVICE).transpose(1, 2)
    report(benchmark, record, title, sdpa_backend(q, k, v, ~blocked), contenders, (q, k, v), grad_out)


def concatenated(q_content, q_position, k_content, k_position, v, mask):
    """What one does without the op."""
    q, k = torch.cat((q_content, q_position), -1), torch.cat((k_content, k_position), -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("size", KEYS if GPU else ["C5"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def bench_conditional_attention(benchmark, record, size, batch, dtype):
    queries, keys = 500, KEYS[size]

    def heads(length):
        return torch.randn(batch, length, HEADS, WIDTH, dtype=dtype, device=DEVICE).transpose(1, 2)

    inputs = heads(queries), heads(queries), heads(keys), heads(keys), heads(keys)
    valid = torch.arange(keys, device=DEVICE) < torch.linspace(0.7, 1, batch, device=DEVICE)[:, None] * keys
    mask = valid[:, None, None, :]
    contenders = {
        "ours": partial(conditional_attention, valid=valid),
        "sdpa": partial(concatenated, mask=mask),
    }
    wide = torch.cat(inputs[:2], -1), torch.cat(inputs[2:4], -1), inputs[4], mask
    title = f"conditional attention, {size}, B {batch}, {dtype}"
    report(benchmark, record, title, sdpa_backend(*wide), contenders, inputs, heads(queries))
