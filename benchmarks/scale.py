"""What training on many GPUs would take, on paper: ``python benchmarks/scale.py`` prints the tables of docs/scale.md.

``python benchmarks/scale.py docs/scale.md`` writes them there. Steps are counted (``scale_counts.py``, which takes
minutes, wrote ``scale_counts.json``), all-reduces computed (``all_reduce.py``), waits simulated
(``scale_simulator.py``), and losses named (``scale_work.py``).
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from all_reduce import H100S, LOW_LATENCY, SIMPLE, all_reduce, hierarchical, ring
from scale_simulator import LOADER, STRAGGLERS, exchanged, undisturbed
from scale_work import (
    CAPTURED,
    CAUSES,
    COCO,
    COUNTS,
    DISK,
    EAGER,
    LAUNCH,
    SLOWER,
    all_at_the_end,
    best,
    efficiency,
    trained,
    work_of,
)

from dndetr import commandline
from dndetr.files import write_atomic

PROCESSES, IMAGES, MOST = (8, 64, 512), (16, 64, 256, 1024), 512
EPOCHS = {"dn-detr-r50": 50, "dn-deformable-detr-r50": 50, "dino-r50": 12}  # of the presets
RECIPE, RATE = 16, 1e-4  # images a step and learning rate of the presets
OPTIONS = {"half": True, "view": True, "buffers": False}


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def milliseconds(seconds: float) -> str:
    """With three digits."""
    return f"{seconds * 1e3:.3g}" if seconds < 0.9995 else f"{seconds * 1e3:,.0f}"


def hours(seconds: float) -> str:
    """Hours, or minutes of what takes less than two."""
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.0f} min"


def assumptions() -> str:
    simple, low = (f"{p.start * 1e6:g}, {p.hop * 1e6:g}, {p.network_hop * 1e6:g} us" for p in (SIMPLE, LOW_LATENCY))
    rows = [
        ("kernels over their count", f"{SLOWER:g}", "measured on an H200: 1.12 to 1.28"),
        ("a launch by the host, eager", f"{LAUNCH * 1e6:g} us", "measured beside an H200: 37 to 78"),
        ("NVLink, one way", f"{H100S.nvlink / 1e9:g} GB/s", "of 450; NCCL's ring, nccl-tests issue 212"),
        ("InfiniBand of a GPU, one way", f"{H100S.network / 1e9:g} GB/s", "of 50; nccl-tests issue 290"),
        ("start, hop in a node, hop between", simple, "NCCL's `tuning.cc`, ring, Simple"),
        ("the same of short messages", low, "LL, a quarter of the rate"),
        ("workers of a process", f"{LOADER.workers}, {LOADER.ahead} batches ahead each", "the presets; as they do"),
        ("an image in a worker", f"{LOADER.median * 1e3:g} ms", "measured without a disk: 2.5 to 2.8"),
        ("its spread", f"log-normal, {LOADER.spread:g}", "assumed"),
        ("spread of a process's step", f"log-normal, {STRAGGLERS.spread:g}", "assumed"),
        ("pauses", f"{STRAGGLERS.pause * 1e3:g} ms, 1 of {1 / STRAGGLERS.rare:,.0f} steps", "assumed"),
        ("a checkpoint's disk", f"{DISK / 1e9:g} GB/s", "assumed"),
    ]
    return table(("what", "value", "from"), rows)


def gradients() -> str:
    rows = []
    for model, counts in COUNTS.items():
        numbers, total = f"{counts['trained'] / 1e6:.1f} M in {counts['tensors']}", sum(counts["buckets"])
        sizes = ", ".join(f"{size / 1e6:.0f}" for size in counts["buckets"])
        sent = ", ".join(f"{2 * (gpus - 1) / gpus * total / 1e6:.0f}" for gpus in PROCESSES)
        took = (sum(all_reduce(size, gpus) for size in counts["buckets"]) for gpus in PROCESSES)
        rows.append([f"`{model}`", numbers, f"{total / 1e6:.0f}", sizes, sent, ", ".join(map(milliseconds, took))])
    header = ("model", "trained numbers, tensors", "MB", "buckets, MB", "a GPU of 8, 64, 512 sends, MB")
    return table((*header, "all-reduces in a row, ms"), rows)


def algorithms() -> str:
    rows = []
    for name, size in (("25 MiB", 25 * 2**20), ("425 KB", 424_960), ("4 bytes", 4)):
        for gpus in PROCESSES:
            across = (hierarchical(size, gpus, H100S, SIMPLE, trees) for trees in (False, True))
            found = (ring(size, gpus, H100S, SIMPLE), *across, all_reduce(size, gpus))
            rows.append([name, gpus, *map(milliseconds, found)])
    return table(
        ("size", "GPUs", "ring, ms", "hierarchical, ring", "hierarchical, trees", "fastest, either protocol"), rows
    )


def loaders() -> str:
    rows = []
    for model in COUNTS:
        busy = LOADER.median * np.exp(LOADER.spread**2 / 2) / best(model)
        rows.append([f"`{model}`", f"{1 / best(model):.0f}", f"{busy:.2f}", f"{8 * busy:.1f}"])
    return table(("model", "images a second, one GPU", "workers busy for it", "of a node"), rows)


def _cases() -> Iterator[tuple[str, int, int]]:
    """Model, images a step, GPUs: at least an image for each."""
    yield from ((model, n, gpus) for model in COUNTS for n in IMAGES for gpus in PROCESSES if gpus <= n)


def steps() -> str:
    rows = []
    for model, images, gpus in _cases():
        row = [f"`{model}`", f"{images:,}", gpus, images // gpus]
        for mode in (EAGER, CAPTURED):
            found, lost = trained(model, images, gpus, mode)
            run = EPOCHS[model] * (COCO // images) * found.step
            row += [milliseconds(found.step), f"{efficiency(lost):.0%}", hours(run)]
        rows.append(row)
    modes = (name for mode in ("eager", "captured") for name in (f"{mode}, ms", "efficiency", "run"))
    return table(("model", "images a step", "GPUs", "a GPU", *modes), rows)


def losses() -> str:
    rows = []
    for model, images, gpus in _cases():
        (_, now), (_, could) = (trained(model, images, gpus, mode) for mode in (EAGER, CAPTURED))
        shares = [now["launches"], *(could[cause] for cause in CAUSES if cause != "launches")]
        rows.append([f"`{model}`", f"{images:,}", gpus, *(f"{share:.0%}" for share in shares)])
    causes = (cause for cause in CAUSES if cause != "launches")
    return table(
        ("model", "images a step", "GPUs", "eager: launches", *(f"captured: {cause}" for cause in causes)), rows
    )


def limits() -> str:
    rows = []
    for model in COUNTS:
        for images in IMAGES:
            cells = [_falls(model, images, mode, least) for mode in (EAGER, CAPTURED) for least in (0.8, 0.5)]
            rows.append([f"`{model}`", f"{images:,}", *cells])
    header = ("model", "images a step", "eager: under 80 %", "under 50 %", "captured: under 80 %", "under 50 %")
    return table(header, rows)


def _falls(model: str, images: int, mode: float, least: float) -> str:
    """The first number of GPUs with a lower efficiency, and what takes most there."""
    gpus = 2
    while gpus <= min(images, MOST):
        _, lost = trained(model, images, gpus, mode)
        if efficiency(lost) < least:
            cause = max(lost, key=lost.get)
            return f"{gpus}: {cause} {lost[cause]:.0%}"
        gpus *= 2
    return f"not by {min(images, MOST)}"


def options() -> str:
    rows = []
    for model in COUNTS:
        for gpus in PROCESSES:
            plain = work_of(model, 1, CAPTURED)
            usual = undisturbed(plain, gpus, H100S)
            late = float(exchanged(plain.ready, plain, gpus, H100S)) - plain.ready[-1]
            others = (work_of(model, 1, CAPTURED, **{option: value}) for option, value in OPTIONS.items())
            saved = [usual - undisturbed(other, gpus, H100S) for other in others]
            saved.append(usual - all_at_the_end(model, 1, gpus, H100S))
            shown = (f"{seconds * 1e3:.2f}" for seconds in (usual - plain.whole, late, *saved))
            rows.append([f"`{model}`", gpus, milliseconds(usual), *shown])
    header = ("model", "GPUs", "step, ms", "communication", "after backward", "half-precision hook saves")
    options = ("`gradient_as_bucket_view`", "`broadcast_buffers=False`", "all at the end, lowered at once")
    return table((*header, *options), rows)


def epochs() -> str:
    rows = []
    for images in IMAGES:
        ratio, count = images / RECIPE, COCO // images
        rates = (f"{RATE * ratio**0.5:g}", f"{RATE * ratio:g}")
        rows.append([f"{images:,}", f"{count:,}", f"{count * 12:,}", f"{count * 50:,}", *rates])
    return table(("images a step", "steps an epoch", "in 12", "in 50", "`--lr`, square root", "`--lr`, linear"), rows)


TABLES = (assumptions, gradients, algorithms, loaders, steps, losses, limits, options, epochs)


def written(page: str) -> str:
    """The page with each marked table as it is now; ValueError for a table that has no place there, or several."""
    for make in TABLES:
        mark, end = f"<!-- scale: {make.__name__} -->", "<!-- end -->"
        before, *after = page.split(mark)
        if len(after) != 1 or end not in after[0]:
            raise ValueError(
                f"the table {make.__name__} needs one place in the page: {mark} on a line, {end} on another"
            )
        page = f"{before}{mark}\n{make()}\n{end}{after[0].partition(end)[2]}"
    return page


def run(arguments: Sequence[str]) -> None:
    """Print the tables, or write them into the page that is named."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        raise ValueError(f"{' '.join(arguments)}: name one page, such as docs/scale.md, or nothing to print the tables")
    if arguments:
        path = Path(arguments[0])
        write_atomic(path, written(path.read_text()).encode())
    else:
        print("\n\n".join(make() for make in TABLES))


if __name__ == "__main__":
    sys.exit(commandline.exit_status(lambda: run(sys.argv[1:])))
