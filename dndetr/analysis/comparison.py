"""What a comparison of runs says: who reaches whose accuracy when, and how stable their matching is.

A run is a ``Track``, its log by epochs. Times are training times: without evaluation, start and pictures, which are the
same for all.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runs.run_log import read_rows

EARLY = (2, 8)  # epochs in which instability is told: later a falling rate freezes the matching of every run


@dataclass(frozen=True)
class Track:
    """One run: a value of the compared field, a seed, and a number (or None) for each evaluated epoch.

    seconds: training time so far; loss, matching, denoising: means over the steps since the evaluation before.
    """

    value: str
    seed: int
    folder: str
    epochs: list[int]
    AP: list[float | None]
    AP50: list[float | None]
    IS: list[float | None]
    seconds: list[float]
    loss: list[float]
    matching: list[float]
    denoising: list[float]
    step_seconds: float


def read_track(folder: Path, value: str, seed: int) -> Track:
    """The run in ``folder`` as far as it has got."""
    columns: dict[str, list] = {name: [] for name in Track.__annotations__ if name not in _SINGLE}
    seconds, step, steps, sums = 0.0, 0, 0, dict.fromkeys(("loss", "matching", "denoising"), 0.0)
    for row in read_rows(folder / "metrics.jsonl"):
        if row["event"] == "train" and {"seconds", *sums} <= row.keys():
            new = row["step"] - step
            seconds, step, steps = seconds + row["seconds"], row["step"], steps + new
            sums = {name: total + row[name] * new for name, total in sums.items()}
        elif row["event"] == "eval" and "epoch" in row:
            columns["epochs"].append(row["epoch"])
            for name in ("AP", "AP50", "IS"):
                columns[name].append(row.get(name))
            columns["seconds"].append(round(seconds, 3))
            for name, total in sums.items():
                columns[name].append(total / max(steps, 1))
            steps, sums = 0, dict.fromkeys(sums, 0.0)
    return Track(value, seed, folder.name, step_seconds=seconds / max(step, 1), **columns)


_SINGLE = ("value", "seed", "folder", "step_seconds")


def reach(xs: Sequence[float], values: Sequence[float | None], target: float) -> float | None:
    """Where ``values`` first get to ``target``, by linear interpolation from (0, 0); None if they never do."""
    x0, y0 = 0.0, 0.0
    for x, y in zip(xs, values, strict=True):
        if y is None:
            continue
        if y >= target:
            return x if y == y0 else x0 + (x - x0) * max(target - y0, 0.0) / (y - y0)
        x0, y0 = x, y
    return None


def spread(values: Sequence[float | None]) -> dict | None:
    """mean, min, max and each of some numbers; None as soon as one of them is missing."""
    if not values or any(value is None for value in values):
        return None
    rounded = [round(value, 4) for value in values]
    mean = round(statistics.fmean(values), 4)
    return {"mean": mean, "min": min(rounded), "max": max(rounded), "each": rounded}


def _final(track: Track) -> float:
    return track.AP[-1] or 0.0


def _early(track: Track) -> dict[int, float]:
    first, last = EARLY
    pairs = zip(track.epochs, track.IS, strict=True)
    return {epoch: value for epoch, value in pairs if value is not None and first <= epoch <= last}


def against(tracks: Sequence[Track], baselines: Sequence[Track]) -> dict:
    """One value's runs against the baseline's, seed by seed; both in the same order of seeds, all of them finished."""
    pairs = list(zip(tracks, baselines, strict=True))
    epochs = [reach(mine.epochs, mine.AP, _final(base)) for mine, base in pairs]
    seconds = [reach(mine.seconds, mine.AP, _final(base)) for mine, base in pairs]
    back_epochs = [reach(base.epochs, base.AP, _final(mine)) for mine, base in pairs]
    back_seconds = [reach(base.seconds, base.AP, _final(mine)) for mine, base in pairs]
    early = [(_early(mine), _early(base)) for mine, base in pairs]
    common = [[(mine[epoch], base[epoch]) for epoch in mine.keys() & base.keys()] for mine, base in early]
    return {
        "value": tracks[0].value,
        "final_AP": spread([_final(mine) for mine, _ in pairs]),
        "final_AP_of_baseline": spread([_final(base) for _, base in pairs]),
        "AP_gain": spread([_final(mine) - _final(base) for mine, base in pairs]),
        "AP50_gain": spread([(mine.AP50[-1] or 0.0) - (base.AP50[-1] or 0.0) for mine, base in pairs]),
        "epochs_to_baseline_AP": spread(epochs),
        "share_of_epochs": spread(_shares(epochs, [base.epochs[-1] for _, base in pairs])),
        "seconds_to_baseline_AP": spread(seconds),
        "share_of_seconds": spread(_shares(seconds, [base.seconds[-1] for _, base in pairs])),
        "epochs_of_baseline_to_this_AP": spread(back_epochs),
        "seconds_of_baseline_to_this_AP": spread(back_seconds),
        "step_cost": spread([mine.step_seconds / base.step_seconds - 1 for mine, base in pairs]),
        "IS": spread([_mean([mine for mine, _ in seed]) for seed in common]),
        "IS_of_baseline": spread([_mean([base for _, base in seed]) for seed in common]),
        "IS_epochs": list(EARLY),
        "IS_pairs": sum(map(len, common)),
        "IS_pairs_lower": sum(mine < base for seed in common for mine, base in seed),
    }


def _shares(parts: Sequence[float | None], wholes: Sequence[float]) -> list[float | None]:
    return [None if part is None else part / whole for part, whole in zip(parts, wholes, strict=True)]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def verdict(field: str, values: Sequence[str], tracks: Sequence[Track]) -> dict:
    """Everything that can be said of the finished runs, as plain values.

    values: of ``field``, the baseline last; only seeds that all values have are compared.
    """
    by = {(track.value, track.seed): track for track in tracks}
    seeds = [seed for seed in dict.fromkeys(track.seed for track in tracks) if all((v, seed) in by for v in values)]
    *others, baseline = values
    return {
        "field": field,
        "values": list(values),
        "baseline": baseline,
        "seeds": seeds,
        "comparisons": [
            against([by[value, seed] for seed in seeds], [by[baseline, seed] for seed in seeds])
            for value in others
            if seeds
        ],
        "runs": [vars(track) for track in tracks],
    }


def sentences(told: dict) -> list[str]:
    """The verdict in a few plain lines."""
    field, baseline, seeds = told["field"], told["baseline"], len(told["seeds"])
    lines = []
    for one in told["comparisons"]:
        of = f"{field} {one['value']} against {baseline}, {seeds} seed{'s' if seeds > 1 else ''}"
        ap, base = (_spread_text(one[name]) for name in ("final_AP", "final_AP_of_baseline"))
        lines.append(f"{of}: final AP {ap} against {base}, {one['AP_gain']['mean']:+.3f}")
        if one["epochs_to_baseline_AP"] is None:
            lines.append("  not every seed reaches the baseline's final AP")
        else:
            epochs, share = one["epochs_to_baseline_AP"]["mean"], one["share_of_epochs"]["mean"]
            lines.append(
                f"  reaches the baseline's final AP after {epochs:.1f} epochs, {share:.0%} of its epochs and "
                f"{one['share_of_seconds']['mean']:.0%} of its training time"
            )
        back = one["epochs_of_baseline_to_this_AP"]
        if back is not None:
            lines.append(f"  the baseline reaches this final AP after {back['mean']:.1f} epochs")
        if one["IS"] is not None:
            first, last = one["IS_epochs"]
            lines.append(
                f"  matching instability in epochs {first}-{last}: {one['IS']['mean']:.2f} against "
                f"{one['IS_of_baseline']['mean']:.2f} queries an image, lower in {one['IS_pairs_lower']} of "
                f"{one['IS_pairs']} epochs"
            )
        lines.append(f"  time of a training step: {one['step_cost']['mean']:+.0%}")
    return lines


def _spread_text(values: dict) -> str:
    if len(values["each"]) == 1:
        return f"{values['mean']:.3f}"
    return f"{values['mean']:.3f} ({values['min']:.3f} to {values['max']:.3f})"
