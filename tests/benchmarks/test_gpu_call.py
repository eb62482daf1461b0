"""A call of blocks: what fails is written down, what was measured is kept, a cut at any moment leaves whole files."""

import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time

import gpu_call
import pytest

PRELUDE = """
import sys, time
from gpu_call import Block, main
from gpu_programs import beside

def measure(call, found):
    found["half"] = 1
    found["nan"] = float("nan")

def fail(call, found):
    found["half"] = 1
    raise SystemExit("no such kernel")

def hang(call, found):
    while True:
        try:
            time.sleep(0.05)
        except Exception:  # as a loop over contenders does
            pass

def programs(call, found):
    count = "import time\\nfor i in range(100): print(i, flush=True); time.sleep(0.05)"
    beside(call, found, {"counts": [sys.executable, "-c", count], "ends": ["true"]})
"""


@pytest.fixture
def started(root, tmp_path):
    """started(blocks, seconds): a process with a plan of these blocks, and its OUT."""

    def start(blocks: str, seconds: float, prelude: str = PRELUDE):
        script, out = tmp_path / "plan.py", tmp_path / "out"
        script.write_text(f"{prelude}\nsys.exit(main({{'FIRST': [{blocks}]}}, sys.argv[1:]))\n")
        path = os.pathsep.join((str(root), str(root / "benchmarks")))
        environment = {**os.environ, "PYTHONPATH": path, "PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)}
        command = [sys.executable, script, "FIRST", out, str(seconds)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True), out

    return start


def left(out) -> tuple[dict, dict[str, str]]:
    """What left: the plan's blocks and all logs; every file is whole, and they are few and flat."""
    files = list(out.rglob("*"))
    assert len(files) <= 8 and all(file.is_file() and file.parent == out for file in files)
    with tarfile.open(out / "logs.tgz") as tar:
        logs = {member.name: tar.extractfile(member).read().decode() for member in tar if member.isfile()}
    return json.loads((out / "gpu-first.json").read_text()), logs


def test_whatever_a_block_raises_the_rest_goes_on(started):
    names = ("measure", "fail", "hang", "programs")
    blocks = [f"Block('{name}', 0, {1 if name == 'hang' else 9}, {name})" for name in names]
    process, out = started(", ".join([*blocks, "Block('late', 900, 900, measure)"]), 60)
    said, _ = process.communicate(timeout=60)
    content, logs = left(out)
    told = content["blocks"]
    assert process.returncode == 1 and content["ended"] and list(told) == [*names, "late"]
    assert told["measure"]["result"] == {"half": 1, "nan": "nan"} and "failed" not in told["measure"]
    assert told["fail"]["result"] == {"half": 1} and told["fail"]["failed"] == "SystemExit: no such kernel"
    assert told["hang"]["failed"] == "OutOfTime: stopped after 1 s" and told["hang"]["seconds"] < 5
    assert told["programs"]["result"]["ends"]["exit"] == 0
    assert told["programs"]["failed"] == "RuntimeError: counts: interrupted"
    assert told["late"]["skipped"].endswith("s were left, 900 are needed")
    assert "raise SystemExit" in logs["logs/failures.log"] and "0\n1\n2\n" in logs["logs/counts.log"]
    assert said.splitlines()[1].startswith("fail: failed: SystemExit: no such kernel")


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_plan_that_is_told_to_end_writes_what_it_has(started, sign):
    process, out = started("Block('measure', 0, 9, measure), Block('programs', 0, 30, programs)", 60)
    assert process.stdout.readline().startswith("measure: ok")
    time.sleep(0.5)
    process.send_signal(sign)
    process.communicate(timeout=20)
    content, logs = left(out)
    assert process.returncode == 1 and "ended" not in content
    assert content["blocks"]["measure"]["result"]["half"] == 1
    assert content["blocks"]["programs"]["result"]["counts"]["exit"] == "interrupted"
    assert logs["logs/counts.log"].startswith("0\n") and "KeyboardInterrupt" in logs["logs/counts.log"]


@pytest.mark.parametrize("after", [0.0, 0.013, 0.11])
def test_a_cut_leaves_whole_files(started, after):
    blocks = ", ".join(f"Block('{number}', 0, 9, measure)" for number in range(3000))
    process, out = started(blocks, 60)
    assert process.stdout.readline().startswith("0: ok")
    time.sleep(after)
    process.kill()
    process.wait()
    process.stdout.close()
    content, _ = left(out)
    assert "ended" not in content and content["blocks"]["0"]["result"]["half"] == 1


def test_a_lost_context_ends_the_process_and_not_the_plan(started):
    """A process whose GPU is lost for good starts anew behind the block that lost it."""
    lost = "import gpu_call; gpu_call.context_is_lost = lambda: len(sys.argv) == 4\n"
    process, out = started(
        "Block('measure', 0, 9, measure), Block('fail', 0, 9, fail), Block('pid', 0, 9, lambda call, found: "
        "found.update(logs=len(sys.argv), left=call.left()))",
        60,
        PRELUDE + lost,
    )
    said, _ = process.communicate(timeout=30)
    content, logs = left(out)
    assert [line.partition(":")[0] for line in said.splitlines()] == ["measure", "fail", "pid"]
    assert content["blocks"]["pid"]["result"]["logs"] == 5 and 30 < content["blocks"]["pid"]["result"]["left"] < 60
    assert content["ended"] and process.returncode == 1 and "SystemExit" in logs["logs/failures.log"]


def test_values_as_json_has_them():
    value = {1: (math.inf, "x", None, True), "path": [2.5, {"type": complex}]}
    assert gpu_call.plain(value) == {"1": ["inf", "x", None, True], "path": [2.5, {"type": "<class 'complex'>"}]}


def test_the_gpu_has_a_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_call.gpu_name() == "gpu" and not gpu_call.context_is_lost()
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H999 80GB, more'\n")
    program.chmod(0o755)
    assert gpu_call.gpu_name() == "h999"
