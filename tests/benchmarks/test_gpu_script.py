"""``benchmarks/gpu.sh`` without a GPU: the commands that it would run exist, and it survives what happens to them."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest

from dndetr import commandline, compare, train


class Stage(NamedTuple):
    """A stage as DRY_RUN prints it."""

    name: str
    limit: int
    command: list[str]


def start(root, *arguments, **environment):
    return subprocess.Popen(
        [root / "benchmarks" / "gpu.sh", *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def dry_run(root, *arguments, **environment) -> list[Stage]:
    process = start(root, *arguments, DRY_RUN="1", **environment)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    rows = [line.split("\t") for line in out.splitlines()]
    return [Stage(name, int(limit), shlex.split(command)) for name, limit, command in rows]


@pytest.fixture(scope="module")
def planned(root, tmp_path_factory):
    """All stages, with a folder of one wheel."""
    wheels = tmp_path_factory.mktemp("wheels")
    (wheels / "some-1.0-py3-none-any.whl").touch()
    out = tmp_path_factory.mktemp("dry") / "out"
    stages = dry_run(root, out, 500, wheels)
    assert not out.exists()
    return stages


def after(command: list[str], *words: str) -> list[str] | None:
    """What follows these words in a command, or None."""
    for place in range(len(command) - len(words) + 1):
        if command[place : place + len(words)] == list(words):
            return command[place + len(words) :]
    return None


def test_order_and_names(planned):
    names = [stage.name for stage in planned]
    assert names[:6] == ["device", "wheels", "build", "doctor", "tests-compiled", "tests-others"]
    assert len(set(names)) == len(names)
    first = {
        word: next(n for n, name in enumerate(names) if name.startswith(word)) for word in ("ceilings", "step", "msda")
    }
    assert first["ceilings"] < first["step"] < first["msda"]
    assert [word for word in names if word.startswith("step")] == [
        f"step-{model}-{images}" for images in (2, 16) for model in ("deformable", "dense")
    ]
    assert all(10 < stage.limit <= 300 for stage in planned)
    assert planned[1].command[-1].endswith("some-1.0-py3-none-any.whl")


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        ("build msda", ["build", "msda"]),
        ("step-dense", ["step-dense-2", "step-dense-16"]),
        ("step-dense-16 sanitize-racecheck", ["sanitize-racecheck", "step-dense-16"]),
        ("train-bccd", ["train-bccd", "train-bccd-times"]),
    ],
)
def test_selected_stages(root, stages, names):
    assert [stage.name for stage in dry_run(root, "out", STAGES=stages)] == names


def test_a_stage_that_does_not_exist(root):
    process = start(root, "out", STAGES="build mdsa", DRY_RUN="1")
    out, errors = process.communicate()
    assert process.returncode == 2 and "no stage mdsa" in errors and out == ""


@pytest.mark.parametrize(
    ("arguments", "stages", "why"),
    [
        (("out",), "build step-desne", "there was no stage step-desne"),
        (("out",), " ", "STAGES is empty"),
        (("out", "1.5"), "build", "SECONDS must be a whole number, got 1.5"),
        (("out", "09"), "build", "SECONDS must be a whole number, got 09"),
        (("out", "60", "no/such"), "wheels", "there is no folder of wheels no/such"),
    ],
)
def test_what_cannot_be_meant_is_refused(root, arguments, stages, why):
    process = start(root, *arguments, STAGES=stages, DRY_RUN="1")
    _, errors = process.communicate()
    assert process.returncode == 2 and why in errors


def test_benchmarks_can_be_collected(root, planned):
    commands = [found for stage in planned if (found := after(stage.command, "-m", "pytest")) is not None]
    named = sorted({found[0] for found in commands if found[0].startswith("benchmarks/")})
    files = {name.partition("::")[0] for name in named}
    assert {file.removeprefix("benchmarks/bench_").removesuffix(".py") for file in files} == {
        *("ceilings", "gpu_step", "ms_deform_attn", "matching", "attention", "losses", "fused")
    }
    results = [after(found, "--results")[0] for found in commands if found[0].startswith("benchmarks/")]
    assert all(path.endswith(".json") for path in results) and len(set(results)) == len(files)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-s", "--results", "x.json", *named]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for file in files:
        assert f"{file}::" in done.stdout
    matching, attention = (importlib.import_module(f"bench_{name}") for name in ("matching", "attention"))
    assert any("64x6" in name for name in matching.IDS)  # what -k leaves out
    assert matching.bench_match and attention.bench_group_attention and attention.bench_conditional_attention


@pytest.mark.slow
def test_every_test_for_a_gpu_is_run_once(root, planned):
    def collected(*arguments):
        command = [sys.executable, "-m", "pytest", "--collect-only", *arguments]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        return re.findall(r"^tests/\S+::.*$", done.stdout, re.M)

    stages = [after(stage.command, "-m", "pytest") for stage in planned if stage.name.startswith("tests")]
    run = [test for arguments in stages for test in collected(*arguments)]
    assert len(run) > 100 and sorted(run) == sorted(collected("-q", "-m", "gpu", "tests"))


@pytest.mark.slow
def test_sanitizers_get_small_cases_of_every_kernel(root, planned):
    commands = {tuple(after(stage.command, "-m", "pytest")) for stage in planned if stage.name.startswith("sanitize")}
    (command,) = commands
    command = [sys.executable, "-m", "pytest", "--collect-only", *command]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    tests = re.findall(r"^tests/ops/\S+$", done.stdout, re.M)
    assert done.returncode == 0 and len(tests) < 150, done.stdout
    for kernels in (
        "ms_deform_attn_cuda",
        "match_cuda",
        "match_cost",
        "set_loss",
        "group_attention",
        "conditional_attention",
    ):
        assert any(kernels in test for test in tests), kernels
    # Large, or captured, which torch's uncached memory does not allow.
    assert not [test for test in tests if re.search("train-|quarter|decoder|coco|graph|solver|thousand|emulated", test)]


def test_flags_of_our_commands(planned):
    seen = set()
    for stage in planned:
        found = after(stage.command, "python", "-m")
        if found is None or not found[0].startswith("dndetr."):
            continue
        module, *flags = found
        seen.add(module)
        if module == "dndetr.train":
            config = train.parse(flags)
            assert config.model.backbone.norm == "batch" and config.model.backbone.frozen == 0 and config.epochs == 12
        elif module == "dndetr.compare":
            given, rest = commandline.parse(
                compare.Arguments, flags, "compare", description="", return_unknown_args=True
            )
            plan = compare.make_plan(given, rest)
            assert plan.values == ["4", "0"]
        else:
            assert module == "dndetr.doctor" and not flags
    assert seen == {"dndetr.train", "dndetr.compare", "dndetr.doctor"}


FAKE = """#!/usr/bin/env bash
# Stands for python: what each kind of command does is at the end of its line in the log.
case "$*" in
*"-m gpu tests/ops/test_match"*) echo "1 failed"; exit 3 ;;
*"-m gpu tests "*) trap 'echo "1 failed until now"; exit 2' INT; sleep 60 & wait ;;
*bench_ms_deform_attn*) echo '{"measured": 1}' >"${@: -3:1}"; echo measured; sleep 60 ;;
*dndetr.train*)
    trap 'echo saved; kill %1; exit 143' TERM
    mkdir -p "$RUN"; echo '{"event": "eval"}' >"$RUN/metrics.jsonl"; sleep 60 & wait ;;
*) echo "ran $*" ;;
esac
"""


@pytest.fixture(scope="module")
def interrupted(root, tmp_path_factory):
    """Calls that run out of time while they measure, test, train: exit status, stages.tsv, OUT and errors of each."""
    programs = tmp_path_factory.mktemp("bin")
    for name, text in {
        "python": FAKE,
        "nvidia-smi": "#!/bin/sh\necho 'NVIDIA H999 80GB, more'\n",
        "compute-sanitizer": "#!/bin/sh\necho ran\n",
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    started = []
    for stages in ("device wheels doctor tests-compiled sanitize-memcheck msda losses", "tests-others", "train"):
        out = tmp_path_factory.mktemp("out") / "new"
        shared = {"DNDETR_SHARED": str(out / "nowhere")}
        started.append((start(root, out, 12, PATH=path, STAGES=stages, RUN=f"{out}/shapes-r50", **shared), out))
    ends = []
    for process, out in started:
        _, errors = process.communicate(timeout=60)
        rows = [line.split("\t") for line in (out / "stages.tsv").read_text().splitlines()]
        ends.append((process.returncode, {row[0]: row[1:] for row in rows}, out, errors))
    return ends


@pytest.mark.slow
def test_what_became_of_each_stage_is_written(interrupted):
    status, rows, out, errors = interrupted[0]
    assert status == 1 and errors == ""
    assert {name: row[0] for name, row in rows.items()} == {
        "device": "ok",
        "wheels": "skipped",
        "doctor": "ok",
        "tests-compiled": "failed",
        "sanitize-memcheck": "ok",
        "msda": "interrupted",
        "losses": "skipped",
    }
    assert rows["wheels"][2] == "no folder of wheels was given"
    assert rows["tests-compiled"][2] == "exit status 3, see tests-compiled.log"
    assert rows["losses"][2] == "no time was left"
    assert (out / "tests-compiled.log").read_text() == "1 failed\n"


@pytest.mark.slow
def test_an_interrupted_stage_leaves_what_it_measured(interrupted):
    out = interrupted[0][2]
    assert json.loads((out / "h999-msda.json").read_text()) == {"measured": 1}
    assert "measured" in (out / "msda.log").read_text()


@pytest.mark.slow
def test_interrupted_tests_say_what_failed(interrupted):
    _, rows, out, _ = interrupted[1]
    assert rows["tests-others"][0] == "interrupted"
    assert (out / "tests-others.log").read_text() == "1 failed until now\n"


@pytest.mark.slow
def test_a_run_that_is_interrupted_can_save(interrupted):
    status, rows, out, _ = interrupted[2]
    assert status == 0 and rows["train-shapes"][0] == "interrupted"
    assert (out / "train-shapes.log").read_text().startswith("saved")
    assert rows["train-shapes-times"][0] == "skipped" and rows["train-bccd"][0] == "skipped"
    assert rows["train-bccd"][2].startswith("DNDETR_SHARED holds no data/bccd")
