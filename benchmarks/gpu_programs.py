"""What ``gpu.sh`` runs as programs of their own: the tests, a sanitizer, a training run, recorded benchmarks, ncu."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gpu_call import Block, Call

from dndetr.runs.run_log import read_rows

ROOT = Path(__file__).resolve().parents[1]
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
# Everything that is marked gpu; only what these files hold is collected, which takes seconds for all of tests/.
TESTS = (
    *("tests/ops", "tests/models", "tests/test_on_a_gpu.py", "tests/training/test_backends_train_alike.py"),
    *("tests/training/test_graphs.py", "tests/training/test_lowered.py"),
)
# Small cases of every kernel, and none that captures: without torch's cache every tensor has bounds that are checked.
# Cases of nothing launch no kernel; blocks of layers launch what the kernels' own cases launch.
SMALL = (
    "(precise and not (train or quarter or decoder or coco or resnet or 400000 or 26600 or 16800)"
    " or test_group_attention or test_conditional_attention or test_gpu_cases or awkward"
    " or (cost_is_the_reference or matches_as_the_cpu) and not coco)"
    " and not (nobody or no-images or no-pixels or no-columns or no-queries or blocks)"
)
SANITIZER = (
    *("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--report-api-errors", "no"),
    *("--kernel-name-exclude", "kns=at6native", "--target-processes", "application-only"),  # torch's are not checked
)
PATIENCE = 5  # seconds that an interrupted program has to say what it knows


def beside(call: Call, found: dict, commands: dict[str, Sequence[str]], **environment: dict[str, str]) -> None:
    """Run programs beside each other until the block's time is up; found: exit, seconds and last words of each.

    A program is interrupted then, so that pytest still says what failed until then. RuntimeError names those that
    failed. environment: further variables, by program.
    """
    started, running = time.monotonic(), {}

    def ended(name: str, how: int | str) -> None:
        words = (call.logs / f"{name}.log").read_text(errors="replace")[-600:]
        found[name] = {"exit": how, "seconds": round(time.monotonic() - started, 1), "end": words}

    try:
        for name, command in commands.items():
            with (call.logs / f"{name}.log").open("w") as log:
                try:
                    # A group of its own, so that its children can be told, too.
                    running[name] = subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=os.environ | environment.get(name, {}),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        process_group=0,
                    )
                except OSError as failure:
                    log.write(str(failure))
            if name not in running:
                ended(name, "not started")
        saved = time.monotonic()
        while running and call.left_of_block() > PATIENCE + 2:
            for name, process in [*running.items()]:
                if process.poll() is not None:
                    del running[name]
                    ended(name, process.returncode)
            if time.monotonic() - saved > 8:
                call.save()
                saved = time.monotonic()
            time.sleep(0.1)
    finally:
        _end(running.values())
        for name in running:
            ended(name, "interrupted")
    failed = [f"{name}: {told['exit']}" for name, told in found.items() if told["exit"] != 0]
    if failed:
        raise RuntimeError(", ".join(failed))


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Interrupt groups of processes, and kill what is left of them."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
        patience = time.monotonic() + PATIENCE
        while any(process.poll() is None for process in processes) and time.monotonic() < patience:
            time.sleep(0.05)


def correctness(call: Call, found: dict) -> None:
    """The tests, small ones under a sanitizer, and a training run on BCCD; only the last one's times mean anything."""
    shared, run = Path(os.environ.get("DNDETR_SHARED", "../shared")), Path(tempfile.mkdtemp(), "bccd")
    data, weights = shared / "data" / "bccd", shared / "weights" / "resnet18_imagenet_to_layer3.pt"
    commands = {
        "tests": (*PYTEST, "-m", "gpu", "-n", "8", "-v", "-rfE", "--timeout", "100", *TESTS),
        "memcheck": (*SANITIZER, *PYTEST, "-q", "-m", "gpu", "tests/ops", "-k", SMALL),
        "training": (
            *(sys.executable, "-m", "dndetr.train", "--preset", "small", "--data", str(data)),
            *("--init", str(weights), "--output", str(run)),
        ),
    }
    try:
        # The compiler's own processes, which hardly any test needs, would keep the tests waiting at their end.
        alone = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        beside(call, found, commands, tests=alone, memcheck={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    finally:
        with contextlib.suppress(OSError):
            shutil.copy(run / "metrics.jsonl", call.logs / "training.jsonl")
        found["training"] = found.get("training", {}) | learned(run / "metrics.jsonl")


def learned(log: Path) -> dict:
    """What the log of a training run says: AP by epoch, seconds of the whole, images per second at best."""
    rows = {event: [row for row in read_rows(log) if row["event"] == event] for event in ("train", "eval", "end")}
    return {
        "AP": {row["epoch"]: row["AP"] for row in rows["eval"]},
        "run_seconds": rows["end"][0]["seconds"] if rows["end"] else None,
        "images_per_second": max((row["images_per_second"] for row in rows["train"]), default=None),
    }


def counters(call: Call, found: dict) -> None:
    """What ncu counts in the kernels of deformable attention; the numbers are in ``counters.log``."""
    metrics = (
        *("gpu__time_duration.sum", "sm__inst_issued.avg.pct_of_peak_sustained_active", "smsp__inst_executed.sum"),
        *("sm__warps_active.avg.pct_of_peak_sustained_active", "sm__cycles_active.avg.pct_of_peak_sustained_elapsed"),
        *("l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed", "l1tex__t_sector_hit_rate.pct"),
        *("l1tex__data_bank_conflicts_pipe_lsu.sum", "lts__t_sectors.avg.pct_of_peak_sustained_elapsed"),
        *("lts__t_sectors_op_red.sum", "lts__t_requests_op_red.sum"),
    )
    kernels = ("--kernel-name-base", "demangled", "-k", "regex:dndetr::deform")
    options = ("--clock-control", "none", "--profile-from-start", "off", *kernels, "--section", "WarpStateStats")
    code = "import sys; sys.path.insert(0, 'benchmarks'); import gpu_blocks; gpu_blocks.both_passes()"
    shown = ("--metrics", ",".join(metrics), "--csv", "--page", "raw")
    beside(call, found, {"counters": ("ncu", *options, *shown, sys.executable, "-c", code)})


def _recorded(name: str, arguments: Sequence[str], call: Call, found: dict) -> None:
    beside(call, found, {name: (*PYTEST, "-q", "-s", "--results", str(call.results), *arguments)})


def recorded(name: str, need: int, most: int, *arguments: str) -> Block:
    """A block that runs benchmarks in a process of their own, which keeps every result as soon as it has it.

    arguments: files of this folder, or benchmarks in them, and options of pytest.
    """
    given = tuple(f"benchmarks/{each}" if each.startswith("bench_") else each for each in arguments)
    return Block(name, need, most, partial(_recorded, name.replace(" ", "-"), given))
