"""What ``gpu.sh`` measures in its first call: blocks that run in the plan's own process.

A block imports what it needs itself, so that what cannot be imported fails that block alone. It fills ``found`` as it
goes (``gpu_call``). Times are medians, milliseconds of whole steps and microseconds of ops.
"""

import gc
import json
import os
import statistics
from collections.abc import Callable
from unittest import mock

from gpu_call import Call

DEVICE = "cuda"
DEFORMABLE, DENSE = "dn-deformable-detr-r50", "dn-detr-r50"
FUSED = (
    *("stem", "frozen_norm", "add_norm", "column_sums", "level_sums", "prelu"),
    *("refine_boxes", "anchor_encoding", "pixel_encoding", "activated_product"),
)


def machine(call: Call, found: dict) -> None:
    """Where everything else comes from."""
    import recording
    import torch
    import triton

    call.content["provenance"] = recording.provenance()
    found |= {"triton": triton.__version__, "cudnn": torch.backends.cudnn.version(), "host": os.cpu_count()}
    found["free_memory"], found["memory"] = torch.cuda.mem_get_info()


def doctor(call: Call, found: dict) -> None:
    """Every op's self-test."""
    from dndetr import doctor

    found |= doctor.examine()
    assert found["healthy"], [row for row in found["ops"] if row["failed"] or row["error"]]


def made(preset: str, images: int, graph: bool) -> tuple[Callable, Callable]:
    """Our step, and it on its batch as a function of nothing."""
    import bench_gpu_step as bench
    import peers
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    batch = peers.make_batch(images, *bench.SIZE, bench.COUNTS)
    step = peers.our_step(preset, device=DEVICE, precision=torch.bfloat16, graph=graph)
    return step, lambda: step(batch)


def step(preset: str, images: int, kinds: tuple[str, ...], call: Call, found: dict) -> None:
    """Whole steps: losses of the first ones, median, least and most ms, what waits, peak memory."""
    import bench_gpu_step as bench
    import torch

    for kind in kinds:
        told = found[kind] = {}
        run = made(preset, images, kind == "captured")[1]
        told["losses"] = [run()[0].total.item() for _ in range(4)]
        told["ms"] = [seconds * 1e3 for seconds in bench.timed(run)]
        told["waits"] = bench.refused_wait(run)
        told["peak_memory"] = torch.cuda.max_memory_allocated()
        call.save()
        del run


def limits(call: Call, found: dict) -> None:
    """Ceilings of this machine, and what launches cost."""
    import ceilings

    found["seconds"] = ceilings.launches()
    found["operations_per_second"] = ceilings.products("cuda")
    found["bytes_per_second"] = {"from the host": ceilings.to_device()}
    found["bytes_per_second"] |= ceilings.measure("cuda")


def deformable_attention(call: Call, found: dict) -> None:
    """Microseconds of ours, forward and both passes."""
    import bench_ms_deform_attn as bench
    import torch

    for name in ("encoder, 2 images", "decoder-500, 2 images"):
        for dtype in (torch.bfloat16, torch.float32):
            run, inputs = bench.fused(bench.op.make_inputs(bench.ON_GPU[name], dtype, "cuda"), "cuda")
            times = bench.gpu_times(run, inputs, torch.randn_like(run().detach()))
            found[f"{name}, {dtype}"] = [seconds * 1e6 for seconds in times]


def activated_products(call: Call, found: dict) -> None:
    """Seconds of products with activations and of the same in two steps, and the rates that the kernels reach."""
    import bench_fused as bench
    import ceilings

    copy = ceilings.gpu_copy()
    for name, contest in bench.CONTESTS.items():
        if name.startswith("activated_product"):
            bench.compete(
                lambda name, seconds, **told: found.update({name: {**seconds, **told}}), name, contest(), copy
            )
            call.save()


def both_passes() -> None:
    """Deformable attention of an encoder, forward and backward, for a tool that counts; told when it is to start."""
    import bench_ms_deform_attn as bench
    import torch

    for dtype in (torch.bfloat16, torch.float32):
        run, inputs = bench.fused(bench.op.make_inputs(bench.ON_GPU["encoder, 2 images"], dtype, "cuda"), "cuda")
        grad_out = torch.randn_like(run())  # behind the self-test
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        torch.autograd.grad(run(), inputs, grad_out)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def trace(preset: str, images: int, call: Call, found: dict) -> None:
    """A captured step's kernels and gaps, an eager one's shares by stage; whole tables are among the logs."""
    import cuda_calls
    import torch

    from dndetr.counting.stages import STAGES, stages

    _, run = made(preset, images, graph=True)
    for _ in range(3):
        run()
    events = cuda_calls.trace(run)
    found |= cuda_calls.per_step(events)
    work = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    work.sort(key=lambda event: event["ts"])
    found |= idle([(event["ts"], event["ts"] + event["dur"]) for event in work])
    table = cuda_calls.dearest(events, 400)
    found["dearest"] = table[:14]
    order = [(event["name"][:100], round(event["dur"], 2)) for event in work]
    for name, value in (("kernels", table), ("order", order)):
        (call.logs / f"{name}-{preset}-{images}.json").write_text(json.dumps(value, indent=0))
    del run, events
    eager, run = made(preset, images, graph=False)
    for _ in range(2):
        run()
    with stages(eager, torch.profiler.record_function):
        found["shares"] = cuda_calls.stage_shares(cuda_calls.trace(run), STAGES)


def idle(spans: list[tuple[float, float]], small: float = 50) -> dict[str, float]:
    """Microseconds from the first start to the last end, with work, and in gaps shorter than ``small``."""
    (first, last), *rest = spans
    gaps = 0.0
    for start, end in rest:
        gaps += start - last if 0 < start - last < small else 0
        last = max(last, end)
    return {"span_us": last - first, "busy_us": sum(end - start for start, end in spans), "small_gaps_us": gaps}


def switched(preset: str, images: int, ops: tuple[str, ...], call: Call, found: dict) -> None:
    """The captured step as it is, and with each op in turn on its reference."""
    from dndetr.ops import _backend

    try:
        for op in ("", *ops):
            _backend.forget()
            told = found[f"{op} on its reference" if op else "as it is"] = {}
            with mock.patch.dict(os.environ, {f"DNDETR_BACKEND_{op.upper()}": "reference"} if op else {}):
                step(preset, images, ("captured",), call, told)
    finally:
        _backend.forget()


def dense_attention(call: Call, found: dict, tokens: int = 1050) -> None:
    """The dense encoder's attention over tokens of which some are padding: ours and SDPA's, microseconds as graphs."""
    import bench_attention as bench
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from dndetr.ops import conditional_attention

    def ours(q, k, v):
        halves = (part for x in (q, k) for part in x.tensor_split(2, dim=-1))
        return conditional_attention(*halves, v, valid)

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :])

    def efficient(q, k, v):
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
            return sdpa(q, k, v)

    for images in (2, 16):
        shape = images, tokens, bench.HEADS, bench.WIDTH
        q, k, v, grad_out = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
        ends = torch.linspace(0.7, 1, images, device=DEVICE)[:, None] * tokens
        valid = torch.arange(tokens, device=DEVICE) < ends
        for attend in (ours, sdpa, efficient):
            for backward in (False, True):
                name = f"{attend.__name__}, {images} images, {'both passes' if backward else 'forward'}"
                try:
                    run = bench.replayed(bench.passes(attend, (q, k, v), grad_out, backward))
                    run()
                    found[name] = statistics.median(bench.seconds(run) for _ in range(30)) * 1e6
                except Exception as failure:  # what cannot be captured, or has no such kernel
                    found[name] = f"{type(failure).__name__}: {failure}"[:200]


def matching(call: Call, found: dict) -> None:
    """Microseconds of the GPU for ours, and of the whole call for ours and the official way."""
    import bench_matching as bench
    import ceilings

    for shape in ((2, 300, "7-20"), (16, 300, "7-20"), (16, 300, "100")):
        for kind in ("trained", "collapsed"):
            logits, boxes, targets = bench.predictions(*shape, kind)
            given = logits.to(DEVICE), boxes.to(DEVICE), targets.to(DEVICE), bench.CostWeights()
            contenders = {
                "ours": lambda given=given: bench.match(*given),
                "official": lambda given=given: bench.official(*given),
            }
            seconds = {"ours, of the GPU": ceilings.gpu_seconds(contenders["ours"])}
            seconds |= bench.alternate(contenders, DEVICE, 0.5)
            found[f"{shape}, {kind}"] = {name: value * 1e6 for name, value in seconds.items()}
