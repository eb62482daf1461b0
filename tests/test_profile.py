"""The profile command: a trace that can be read, and the parts that cost most."""

import gzip
import json
from types import SimpleNamespace

import pytest
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


def test_a_step_is_counted_without_gpu_and_data(tmp_path, capsys):
    path = tmp_path / "counted.json"
    flags = ["--preset", "small", "--batch-size", "1", "--canvas", "64x96", "--gpu", "a100", "--json", str(path)]
    assert profile.main(["--count", "--objects", "3", *flags]) == 0
    head, columns, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("a step of small, counted; images: 1 of 64x96, up to 3 objects each")
    assert "a100 (rates from its data sheet, not measured)" in head
    assert columns.split()[:2] == ["stage", "kernels"]
    found = json.loads(path.read_text())
    assert (found["canvas"], found["gpu"], found["images"], found["objects"]) == ([64, 96], "a100", 1, 3)
    total = next(row for row in rows if row.startswith("total"))
    assert int(total.split()[1].replace(",", "")) == found["total"]["kernels"] > 500
    assert f"{found['total']['seconds'] * 1e3:.3f}" == total.split()[-1]
    assert len(rows) == len(found["stages"]) + 3 + len(found["dearest"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--count --steps 3", "--count traces nothing: leave out --steps"),
        ("--count --trace x --steps 3", "leave out --steps, --trace"),
        ("--gpu h100 --json x", "--gpu, --json: only what is counted has this; add --count"),
        ("--count --gpu v100", "--gpu v100: choose one of h200, h100, a100, rtx-4090"),
        ("--count --canvas 800", "--canvas 800: give height and width, such as 800x1333"),
        ("--count --canvas 0x8", "--canvas 0x8: give"),
        ("--count --objects 0", "--objects 0: give 1 or more"),
        ("--count --classes -1", "--classes -1: give 1 or more"),
        ("--count --data shapes", "--count reads no data: leave out --data"),
        ("--count --init a.pth --resume=run", "--count reads no weights: leave out --init, --resume"),
        ("--count --gpu=", "--gpu : choose one of"),
        ("--count --json no/such/folder/x.json", "no/such/folder"),
        ("--count --model.checkpointing", "--model.checkpointing"),
        ("--count --no-such-flag 1", "--no-such-flag"),
    ],
)
def test_mistakes_in_counting_are_told_in_one_line(capsys, flags, told):
    assert profile.main(flags.split()) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and told in captured.err


def test_ops_that_run_on_no_gpu_are_not_counted(capsys, monkeypatch):
    monkeypatch.setenv("DNDETR_BACKEND", "reference")
    assert profile.main(["--count"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "runs on no GPU, and is not counted: unset DNDETR_BACKEND" in told


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
