"""What was counted, by stage and by the dearest operations, in numbers and in words."""

from collections.abc import Iterable, Sequence

from .counter import Counted
from .gpus import Gpu

DEAREST = 20


def numbers(operations: Sequence[Counted], names: Sequence[str], gpu: Gpu) -> dict:
    """Stages in order, those in which nothing runs left out, the total, and the dearest operations of one shape.

    Each with kernels, flop (of products and convolutions), bytes (read and written by all else), seconds.
    """
    of_stage = {name: [each for each in operations if each.stage == name] for name in names}
    alike: dict[tuple[str, str], list[Counted]] = {}
    for each in operations:
        alike.setdefault((each.name, each.shapes), []).append(each)
    ranked = sorted(alike.items(), key=lambda item: -sum(each.on(gpu) for each in item[1]))
    return {
        "stages": {name: _sums(found, gpu) for name, found in of_stage.items() if found},
        "total": _sums(operations, gpu),
        "dearest": [
            {
                "name": name,
                "shapes": shapes,
                "calls": len(found),
                "kernels": sum(each.kernels for each in found),
                "bytes": sum(each.bytes for each in found),
                "seconds": sum(each.on(gpu) for each in found),
            }
            for (name, shapes), found in ranked[:DEAREST]
        ],
    }


def _sums(operations: Iterable[Counted], gpu: Gpu) -> dict[str, float]:
    return {
        "kernels": sum(each.kernels for each in operations),
        "flop": sum(each.flop or 0 for each in operations),
        "bytes": sum(each.beside for each in operations),
        "seconds": sum(each.on(gpu) for each in operations),
    }


def words(found: dict) -> list[str]:
    """Lines of two tables; GB of the dearest are all that they read and write, products too."""
    rows = {**found["stages"], "total": found["total"]}
    width = max(map(len, rows))
    lines = [f"{'stage':<{width}} {'kernels':>8} {'GFLOP':>9} {'GB beside products':>19} {'predicted ms':>13}"]
    for name, row in rows.items():
        gflop, gigabytes, milliseconds = row["flop"] / 1e9, row["bytes"] / 1e9, row["seconds"] * 1e3
        lines.append(f"{name:<{width}} {row['kernels']:8,} {gflop:9,.1f} {gigabytes:19.3f} {milliseconds:13.3f}")
    lines += ["", f"{'predicted ms':>12} {'calls':>6} {'kernels':>8} {'GB':>8}  operation, its largest inputs"]
    for row in found["dearest"]:
        lines.append(
            f"{row['seconds'] * 1e3:12.3f} {row['calls']:6} {row['kernels']:8} {row['bytes'] / 1e9:8.3f}  "
            f"{row['name']} {row['shapes']}"
        )
    return lines
