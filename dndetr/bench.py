"""``python -m dndetr.bench``: compares benchmark results, and writes the tables of the docs from the committed ones.

    pytest benchmarks/ --results FILE.json     measures
    python -m dndetr.bench compare A.json B.json
    python -m dndetr.bench readme              rewrites the tables (--check: only says which are stale)

A result file holds ``provenance`` (device, versions, commit) and ``results``: name -> ``seconds``, the median of each
implementation that was timed, ours under "ours", and whatever else was counted. docs/performance.md has all of them but
what is marked ``detail``, the README those in ``HEADLINES``.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path

from .files import write_atomic
from .output import in_words, unfailing

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- performance: python -m dndetr.bench readme -->", "<!-- end of performance -->"
# What matters to someone who trains, and what it is compared with; the rest explains where it comes from.
HEADLINES = (
    ("step of dn-deformable-detr-r50, 2 images of 800x1333", "HF DeformableDetr, float32"),
    ("step of dn-deformable-detr-r50, 2 images of 800x1333", "HF DeformableDetr, bfloat16"),
    ("step of dn-deformable-detr-r50, 2 images of 800x1333", "official, float32"),
    ("step of dn-detr-r50, 2 images of 800x1333", "HF DabDetr, float32"),
    ("step of dn-detr-r50, 2 images of 800x1333", "HF DabDetr, bfloat16"),
    ("deformable attention, forward and backward, encoder, 2 images, torch.float32", "classical mapping"),
    ("group attention, Q 1300, B 16, torch.bfloat16, graph, forward and backward", "sdpa"),
    ("match cuda 16x6-300x7-20 trained", "official"),
)
DEVICE = ("gpu", "cpu", "cores", "threads", "simd")


def read(path: Path) -> dict:
    """A result file; ValueError, in one line, for anything else."""
    try:
        content = json.loads(path.read_text())
        content["provenance"], content["results"]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; measure with: pytest benchmarks/ --results {path}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a result file; measure with: pytest benchmarks/ --results {path}") from None
    return content


def device(provenance: dict) -> dict:
    """What must agree for times to be comparable."""
    return {key: provenance.get(key) for key in DEVICE}


def device_name(provenance: dict) -> str:
    """The device in words."""
    if provenance.get("gpu"):
        return provenance["gpu"]
    return f"{provenance['cpu']}, {provenance['threads']} threads, {provenance['simd']}"


def compare(first: dict, second: dict, across_devices: bool = False) -> str:
    """A table of ratios: how many times as fast ``second`` is, by name and implementation.

    Raises ValueError where the devices differ, unless ``across_devices``, or nothing was measured in both.
    """
    a, b = device(first["provenance"]), device(second["provenance"])
    differing = [f"{key} {a[key]} and {b[key]}" for key in DEVICE if a[key] != b[key]]
    if differing and not across_devices:
        raise ValueError(f"measured on different devices ({'; '.join(differing)}); compare anyway: --across-devices")
    rows, ours = [], []
    for name, result in first["results"].items():
        other = second["results"].get(name, {"seconds": {}})["seconds"]
        for who, seconds in result["seconds"].items():
            if who in other:
                ratio = seconds / other[who]
                rows.append((name, who, milliseconds(seconds), milliseconds(other[who]), f"{ratio:.2f}x"))
                ours += [ratio] * (who == "ours")
    if not rows:
        raise ValueError("the two files have no measurement in common")
    commits = (f"A {first['provenance'].get('commit')}", f"B {second['provenance'].get('commit')}")
    lines = aligned([("measured", "of", *commits, "B is"), *rows])
    if ours:
        lines.append(f"geometric mean of ours: {statistics.geometric_mean(ours):.2f}x over {len(ours)}")
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    """Three significant digits, in the unit that fits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def table(results: Sequence[dict], chosen: Sequence[tuple[str, str]] | None = None) -> str:
    """Markdown: what was timed beside something else, a table per device and torch; chosen: only these, in order."""
    found: dict[str, list] = {}
    for content in results:
        provenance = content["provenance"]
        about = f"{device_name(provenance)}; torch {provenance['torch']}:"
        for name, who, ours, theirs in rivals(content["results"]):
            if chosen is None or (name, who) in chosen:
                times = milliseconds(ours), who, milliseconds(theirs), f"{theirs / ours:.1f}x"
                row = f"| {' | '.join((name, *times, provenance['commit']))} |"
                found.setdefault(about, []).append((chosen.index((name, who)) if chosen else 0, row))
    header = "| | ours | compared with | | ratio | commit |\n| --- | --- | --- | --- | --- | --- |"
    blocks = []
    for about, rows in found.items():
        rows.sort(key=itemgetter(0))
        blocks.append("\n".join((about, "", header, *(row for _, row in rows))))
    return "\n\n".join(blocks) or "No result has been committed yet."


def rivals(results: dict) -> Iterator[tuple[str, str, float, float]]:
    """(name, whom ours was timed beside, our seconds, theirs), without details."""
    for name, result in results.items():
        ours = result["seconds"].get("ours")
        for who, theirs in result["seconds"].items():
            if who != "ours" and ours and theirs and not result.get("detail"):
                yield name, who, ours, theirs


def renewed(page: str, table: str) -> str:
    """The page with its performance table made anew."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must hold {BEGIN!r} and {END!r} once")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def pages(root: Path) -> dict[Path, str]:
    """The pages that have a table, as they should be."""
    results = committed(root)
    tables = {"README.md": table(results, HEADLINES), "docs/performance.md": table(results)}
    found = {}
    for name, rows in tables.items():
        path = root / name
        if not path.is_file():
            raise ValueError(f"{path} does not exist: this command works in a clone of the repository")
        found[path] = renewed(path.read_text(), rows)
    return found


def committed(root: Path) -> list[dict]:
    """The result files of the repository, by name."""
    return [read(path) for path in sorted((root / "benchmarks" / "results").glob("*.json"))]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m dndetr.bench", description=__doc__.partition("\n")[0])
    commands = made.add_subparsers(dest="command", required=True)
    comparing = commands.add_parser("compare", help="ratios between two result files")
    comparing.add_argument("first", type=Path, metavar="A.json")
    comparing.add_argument("second", type=Path, metavar="B.json")
    comparing.add_argument("--across-devices", action="store_true", help="compare even where the devices differ")
    writing = commands.add_parser("readme", help="write the tables of README and docs from benchmarks/results")
    writing.add_argument("--check", action="store_true", help="change nothing; exit status 1 where it is stale")
    return made


@unfailing()
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of the command line."""
    given = parser().parse_args(arguments)
    try:
        if given.command == "compare":
            print(compare(read(given.first), read(given.second), given.across_devices))
            return 0
        return renew_pages(given.check)
    except (ValueError, OSError) as mistake:
        print(f"dndetr.bench: {in_words(mistake)}", file=sys.stderr)
        return 2


def renew_pages(check: bool) -> int:
    """Write the tables of the pages anew, or only say which are stale -> exit status."""
    stale = {path: page for path, page in pages(ROOT).items() if path.read_text() != page}
    names = " and ".join(str(path.relative_to(ROOT)) for path in stale)
    if not stale:
        print("the performance tables are up to date")
    elif check:
        print(f"stale: {names}; type: python -m dndetr.bench readme", file=sys.stderr)
        return 1
    else:
        for path, page in stale.items():
            write_atomic(path, page.encode())
        print(f"new performance tables: {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
