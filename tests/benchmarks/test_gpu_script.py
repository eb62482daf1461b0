"""``benchmarks/gpu.sh`` without a GPU: what its plans name exists, and both come to their end wherever they are cut."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time

import gpu_programs
import pytest
from gpu_call import Block, Call
from gpu_plan import FIRST, PLANS, SECOND

LIMITS = {"FIRST": 330, "SECOND": 300}
SET_UP = 20  # seconds


def start(root, *arguments, **environment):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return subprocess.Popen(
        [root / "benchmarks" / "gpu.sh", *map(str, arguments)],
        env={**os.environ, "PATH": path, "DNDETR_SHARED": "/nowhere", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def collected(root, *arguments) -> tuple[list[str], str]:
    """Tests and benchmarks that pytest finds, and all that it says."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^(?:tests|benchmarks)/\S+::.*$", done.stdout, re.M), done.stdout


@pytest.fixture
def commands(monkeypatch):
    """commands(block, name): what a block runs as a program of that name, with further variables."""

    def those(block: Block, tmp_path) -> dict:
        found = {}
        monkeypatch.setattr(gpu_programs, "beside", lambda call, _, commands, **__: found.update(commands))
        block.run(Call("FIRST", tmp_path, 60), {})
        return found

    return those


def named(plan, name: str) -> Block:
    return next(block for block in plan if block.name == name)


@pytest.mark.parametrize("name", PLANS)
def test_dry_run(root, tmp_path, name):
    process = start(root, name, tmp_path / "out", LIMITS[name], DRY_RUN="1")
    said, errors = process.communicate()
    assert process.returncode == 0 and errors == "" and not (tmp_path / "out").exists()
    rows = [line.split("\t") for line in said.splitlines()]
    assert rows == [[block.name, str(block.need), str(block.most)] for block in PLANS[name]]


@pytest.mark.parametrize("name", PLANS)
def test_plans_fit_into_their_time(name):
    blocks = PLANS[name]
    assert sum(block.need for block in blocks) + SET_UP < LIMITS[name]
    assert all(0 < block.need < block.most <= 125 for block in blocks)
    assert len({block.name for block in blocks}) == len(blocks)


def test_what_matters_comes_first():
    first, second = ([block.name for block in plan] for plan in (FIRST, SECOND))
    assert first[:5] == ["machine", "doctor", "step deformable 2", "step dense 2", "tests, memcheck, training"]
    assert second[1:4] == ["step deformable 2", "step dense 2", "deformable attention"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("THIRD", "out", "60"), "there is no plan THIRD"),
        (("FIRST", "out", "1.5"), "SECONDS must be a whole number, got 1.5"),
        (("FIRST", "out", "09"), "SECONDS must be a whole number, got 09"),
        (("FIRST", "out"), "usage: benchmarks/gpu.sh FIRST|SECOND OUT SECONDS"),
    ],
)
def test_what_cannot_be_meant_is_refused(root, arguments, why):
    process = start(root, *arguments, DRY_RUN="1")
    said, errors = process.communicate()
    assert process.returncode in (1, 2) and why in errors and said == ""


@pytest.fixture
def recorded(commands, tmp_path) -> dict[str, list[str]]:
    """What the second plan gives to pytest behind --results: places and options, by block."""
    found = {}
    for block in SECOND[1:]:
        (command,) = commands(block, tmp_path).values()
        before, (results, *rest) = command[: len(gpu_programs.PYTEST)], command[command.index("--results") + 1 :]
        assert before == gpu_programs.PYTEST and results == str(tmp_path / "gpu.json")
        found[block.name] = rest
    return found


def test_benchmarks_that_are_named_are_there(root, recorded):
    files = {given.partition("::")[0] for given in itertools.chain(*recorded.values()) if given.startswith("bench")}
    assert {file.removeprefix("benchmarks/bench_") for file in files} == {
        *("gpu_step.py", "ms_deform_attn.py", "attention.py", "matching.py", "losses.py", "ceilings.py", "fused.py"),
        "dino.py",
    }
    assert all((root / file).is_file() for file in files)


@pytest.mark.slow
def test_benchmarks_that_are_named_can_be_collected(root, recorded):
    places = {given for given in itertools.chain(*recorded.values()) if given.startswith("bench")}
    found, _ = collected(root, "--results", "x.json", "--contenders", "ours", *places)
    assert all(any(test.startswith(place) for test in found) for place in places)
    # Benchmarks of matching have a device's name where it is there: what is left of the pattern finds something here.
    (chosen,) = (given for given in recorded.values() if "-k" in given)
    ops, _ = collected(root, *(part.replace("cuda", "cpu") for part in chosen))
    counts = {place: sum(test.startswith(place) for test in ops) for place in chosen[: chosen.index("-k")]}
    assert counts == {"benchmarks/bench_attention.py": 2, "benchmarks/bench_matching.py": 20}


def test_contenders_are_those_that_a_step_has(commands, tmp_path):
    bench = pytest.importorskip("bench_gpu_step")
    for preset, images in bench.CASES:
        (block,) = (
            b for b in SECOND if b.name == f"step {'deformable' if 'deformable' in preset else 'dense'} {images}"
        )
        (command,) = commands(block, tmp_path).values()
        pattern = command[command.index("--contenders") + 1]
        names = [name for name in bench.contenders(preset, None) if re.fullmatch(pattern, name)]
        assert names[0] == "ours" and names[-1].startswith("HF") == (images == 16)
        assert sum(name.startswith("HF") for name in names) == 2
        assert not [name for name in names if "reference" in name]


def test_dino_is_stepped_without_the_dearest(recorded):
    bench = pytest.importorskip("bench_dino")
    pattern = recorded["DINO"][recorded["DINO"].index("--contenders") + 1]
    names = [name for name in bench.contenders(None) if re.fullmatch(pattern, name)]
    assert names == ["ours", "ours, eager", "layer by layer"]


@pytest.mark.slow
def test_every_test_for_a_gpu_is_run_once(root, commands, tmp_path):
    command = commands(named(FIRST, "tests, memcheck, training"), tmp_path)["tests"]
    assert command[-len(gpu_programs.TESTS) :] == gpu_programs.TESTS
    run, _ = collected(root, "-m", "gpu", *gpu_programs.TESTS)
    assert len(run) > 150 and sorted(run) == sorted(collected(root, "-m", "gpu", "tests")[0])
    assert all(any(test.startswith(place) for test in run) for place in gpu_programs.TESTS)


@pytest.mark.slow
def test_the_sanitizer_gets_small_cases_of_every_kernel(root, commands, tmp_path):
    command = commands(named(FIRST, "tests, memcheck, training"), tmp_path)["memcheck"]
    tests, _ = collected(root, *command[command.index("gpu") - 1 :])
    assert len(tests) < 220
    for kernels in (
        *(
            "ms_deform_attn_on_a_gpu",
            "match_cuda",
            "match_cost",
            "set_loss",
            "group_attention",
            "conditional_attention",
        ),
        *("column_sums", "level_sums", "add_norm", "frozen_norm", "prelu", "stem", "activated_product"),
        *("refine_boxes", "anchor_encoding", "pixel_encoding"),
        "many-tiles",  # enough rows for training's kernels
    ):
        assert any(kernels in test for test in tests), kernels
    # Large, or captured, which torch's uncached memory does not allow.
    large = "train-|quarter|decoder|coco|graph|solver|thousand|emulated|400000|26600|resnet"
    assert not [test for test in tests if re.search(large, test)]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_without_a_gpu_comes_to_its_end(root, tmp_path, name):
    """Each block fails for want of a GPU, and says so."""
    script, out = tmp_path / "plan.py", tmp_path / "out"
    program = "import torch; torch.zeros(1, device='cuda')"
    script.write_text(
        f"import sys, gpu_call, gpu_plan, gpu_programs\ngpu_programs.PYTEST = (sys.executable, '-c', {program!r})\n"
        "sys.exit(gpu_call.main(gpu_plan.PLANS, sys.argv[1:]))\n"
    )
    path = os.pathsep.join((str(root), str(root / "benchmarks")))
    environment = {**os.environ, "PYTHONPATH": path, "DNDETR_SHARED": "/nowhere", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, script, name, out, str(LIMITS[name])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    blocks = finished(out, name)["blocks"]
    assert done.returncode == 1 and list(blocks) == [block.name for block in PLANS[name]], done.stderr
    assert {name for name, told in blocks.items() if "failed" not in told} <= {"doctor"}, done.stderr
    lost = [
        told["failed"]
        for told in blocks.values()
        if re.search("ImportError|NameError|no attribute '(?!_cuda)", str(told))
    ]
    assert not lost


def finished(out, name: str) -> dict:
    """What a plan left in OUT; every file is whole, and they are few and flat."""
    files = list(out.rglob("*"))
    assert len(files) <= 8 and all(file.is_file() and file.parent == out for file in files)
    for path in out.glob("*.tgz"):
        with tarfile.open(path) as tar:
            assert all(tar.extractfile(member).read() is not None for member in tar if member.isfile())
    contents = {path.name: json.loads(path.read_text()) for path in out.glob("*.json")}
    return contents.get(f"gpu-{name.lower()}.json", {})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sign"), [*zip(PLANS, (signal.SIGINT, signal.SIGTERM), strict=True)])
def test_the_script_is_cut_at_random_moments(root, extension, tmp_path, name, sign):
    if not hasattr(extension, "match_cuda"):
        pytest.skip("the script would build the extension")
    seconds = random.uniform(1, 25)
    process = start(root, name, tmp_path / "out", LIMITS[name], TMPDIR=str(tmp_path))
    time.sleep(seconds)
    process.send_signal(sign)
    said, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in errors, seconds
    content = finished(tmp_path / "out", name)
    ends = [line for line in said.splitlines() if re.match(r".*\(\d+\.\d s\)$", line)]
    assert "ended" not in content and len(content.get("blocks", ())) >= len(ends), (seconds, said)


def test_the_script_without_time_says_so(root, extension, tmp_path):
    if not hasattr(extension, "match_cuda"):
        pytest.skip("the script would build the extension")
    process = start(root, "FIRST", tmp_path / "out", 12, TMPDIR=str(tmp_path))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "no time was left after setting up" in errors
    assert "set up in" in (tmp_path / "out" / "setup.log").read_text()
