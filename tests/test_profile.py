"""The profile command: a trace that can be read, and the parts that cost most."""

import gzip
import json

from dndetr import profile


def test_trace_and_dearest_parts(tmp_path, capsys):
    path = tmp_path / "trace.json.gz"
    few = ["--batch-size", "2", "--train-images", "16", "--val-images", "2", "--device", "cpu"]
    assert profile.main(["--steps", "2", "--trace", str(path), *few]) == 0
    head, columns, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("2 steps of tiny, ") and str(path) in head and columns.split()[0] == "ms/step"
    spent = [float(row.split()[0]) for row in rows]
    assert len(rows) == 10 and spent == sorted(spent, reverse=True) and spent[0] > 0
    with gzip.open(path) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"waiting for data", "aten::convolution"} <= names


def test_mistakes_are_told_in_one_line(tmp_path, capsys):
    assert profile.main(["--steps", "0"]) == 1
    assert profile.main(["--preset", "small"]) == 1
    assert profile.main(["--no-such-flag", "1"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and "--data DIR" in told[1]
