"""The profile command: a trace that can be read, and the parts that cost most."""

import gzip
import json
from types import SimpleNamespace

from torch.autograd import DeviceType

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


def test_kernels_alone_count_on_a_gpu():
    def event(key, kind, time, annotation=False):
        return SimpleNamespace(
            key=key,
            device_type=getattr(DeviceType, kind),
            is_user_annotation=annotation,
            self_device_time_total=time,
            count=2,
        )

    events = [
        event("aten::mm", "CPU", 6000.0),
        event("gemm", "CUDA", 6000.0),
        event("waiting for data", "CUDA", 9000.0, annotation=True),
        event("fill", "CUDA", 2000.0),
    ]
    _, *rows = profile.dearest(events, 2, "cuda")
    assert [row.split() for row in rows] == [["3.00", "75.0%", "1.0", "gemm"], ["1.00", "25.0%", "1.0", "fill"]]
