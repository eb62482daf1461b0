"""The plan for a machine with a GPU: ``python3 benchmarks/gpu_plan.py FIRST|SECOND OUT SECONDS`` (use ``gpu.sh``).

FIRST says whether everything is right and where a step's time goes, most important first; SECOND takes the numbers that
the docs publish, the dearest contenders last. Needs are what an H200 took at best, what they sum to fits into 330
and 300 seconds, start and set-up included. ``DRY_RUN=1`` prints names, needs and limits instead.
"""

import os
import sys
from functools import partial

import gpu_blocks as blocks
from gpu_blocks import DEFORMABLE, DENSE, FUSED
from gpu_call import Block, main
from gpu_programs import correctness, counters, recorded

BOTH = ("captured", "eager")

FIRST = (
    Block("machine", 5, 30, blocks.machine),
    Block("doctor", 15, 60, blocks.doctor),
    Block("step deformable 2", 15, 50, partial(blocks.step, DEFORMABLE, 2, BOTH)),
    Block("step dense 2", 12, 40, partial(blocks.step, DENSE, 2, BOTH)),
    Block("tests, memcheck, training", 40, 125, correctness),
    Block("limits", 6, 20, blocks.limits),
    Block("deformable attention", 5, 20, blocks.deformable_attention),
    Block("activated products", 12, 40, blocks.activated_products),
    Block("deformable 2, activated products", 14, 45, partial(blocks.switched, DEFORMABLE, 2, FUSED[-1:])),
    Block("trace deformable 2", 6, 25, partial(blocks.trace, DEFORMABLE, 2)),
    Block("trace dense 2", 6, 25, partial(blocks.trace, DENSE, 2)),
    Block("trace dense 16", 8, 25, partial(blocks.trace, DENSE, 16)),
    Block("trace deformable 16", 10, 30, partial(blocks.trace, DEFORMABLE, 16)),
    Block("dense 16, each fused op", 50, 110, partial(blocks.switched, DENSE, 16, FUSED)),
    Block("dense encoder's attention", 4, 20, blocks.dense_attention),
    Block("step deformable 16", 12, 40, partial(blocks.step, DEFORMABLE, 16, BOTH[:1])),
    Block("matching", 5, 20, blocks.matching),
    Block("counters", 15, 45, counters),
)


def step(preset: str, images: int, need: int, most: int, contenders: str) -> Block:
    """The recorded benchmark of whole steps, in a process that meets nothing in the GPU's memory."""
    model = "deformable" if preset == DEFORMABLE else "dense"
    case = f"bench_gpu_step.py::bench_gpu_step[{preset}-{images}]"
    return recorded(f"step {model} {images}", need, most, case, "--contenders", contenders)


# The reference ops take gigabytes and seconds a step.
PEERS = "(?!reference).*"
OURS = "ours|HF.*"
OPS = "cuda and 16x6-300 or group and bfloat16-16 and (500 or 1300)"

# A process takes some ten seconds to start and to end: what needs no process of its own shares one.
SECOND = (
    Block("machine", 5, 30, blocks.machine),
    step(DEFORMABLE, 2, 20, 75, PEERS),
    step(DENSE, 2, 20, 65, PEERS),
    recorded("deformable attention", 15, 45, "bench_ms_deform_attn.py", "-m", "gpu"),
    recorded("ops", 20, 75, "bench_matching.py", "bench_attention.py", "-k", OPS),
    step(DENSE, 16, 15, 40, OURS),
    step(DEFORMABLE, 16, 15, 40, OURS),
    recorded("fused ops, ceilings", 40, 85, "bench_fused.py", "bench_ceilings.py", "bench_losses.py"),
    recorded("DINO", 30, 60, "bench_dino.py", "--contenders", PEERS),
)

PLANS = {"FIRST": FIRST, "SECOND": SECOND}

if __name__ == "__main__":
    status = main(PLANS, sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # a tracer that stays attached to the GPU can hang an ordinary exit
