"""How fast training runs get to which AP: ``python benchmarks/time_to_ap.py RUN... [--results FILE]``.

Times are training times, without start, evaluations and pictures; a run that was interrupted is told as far as it got.
"""

import argparse
import json
from pathlib import Path

from recording import Recording, provenance

from dndetr.analysis.comparison import reach, read_track
from dndetr.runs.run_log import read_rows


def told(folder: Path) -> dict:
    """What a run's log says: epochs, AP and training seconds of its evaluations, and its speed."""
    track = read_track(folder, "", 0)
    speeds = [row["images_per_second"] for row in read_rows(folder / "metrics.jsonl") if row["event"] == "train"]
    final = next((ap for ap in reversed(track.AP) if ap is not None), None)
    shares = () if final is None else (0.5, 0.9)
    return {
        "epochs": track.epochs,
        "AP": track.AP,
        "AP50": track.AP50,
        "training_seconds": track.seconds,
        "step_seconds": track.step_seconds,
        "images_per_second": max(speeds, default=None),
        "seconds_to_share_of_final_AP": {share: reach(track.seconds, track.AP, share * final) for share in shares},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--results", type=Path, help="add it to this JSON file")
    given = parser.parse_args()
    record = Recording(given.results, provenance())
    for folder in given.runs:
        found = told(folder)
        record(f"training of {folder.name}", {}, config=json.loads((folder / "config.json").read_text()), **found)
        print(f"{folder}: {found['step_seconds'] * 1e3:.1f} ms a step, {found['images_per_second']} images/s at best")
        for epoch, ap, seconds in zip(found["epochs"], found["AP"], found["training_seconds"], strict=True):
            print(f"  epoch {epoch:3} {seconds:8.1f} s  AP {ap}")


if __name__ == "__main__":
    main()
