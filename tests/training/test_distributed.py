"""Several processes under torchrun (gloo, on the CPU): the same training as in one."""

import hashlib
import json
import signal
import socket
import subprocess
import sys
import time

import goldens
import pytest
import torch
from short_runs import SMALL, TORCHRUN, environment

from dndetr import compare, train
from dndetr.device import make_current, pick_device, pick_mode
from dndetr.ops import _backend
from dndetr.training.distributed import Processes

FEW = [*SMALL, "--epochs", "2", "--batch-size", "2", "--train-images", "12", "--val-images", "6", "--log-every", "2"]
# Statistics of a batch are those of a process: with them, two processes are not one with twice the images.
NO_BATCH_STATISTICS = ["--model.backbone.norm", "group"]


def torchrun(*command: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([*TORCHRUN, *command], env=environment(), cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "accumulate", "groups"),
    [
        ("dn-detr", 1, 3),
        pytest.param("dino", 2, 3, marks=pytest.mark.slow),
        pytest.param("two-stage", 1, 0, marks=pytest.mark.slow),
        pytest.param("dn-deformable-detr", 1, 0, marks=pytest.mark.slow),
    ],
)
def test_two_processes_take_the_step_of_one_with_both_batches(tmp_path, name, accumulate, groups):
    script = str(goldens.ROOT / "tests" / "support" / "train_as_one_of_two.py")
    done = torchrun(script, name, str(accumulate), str(groups), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["equal"]


def test_rows_of_two_processes_come_together_on_the_first(tmp_path):
    done = torchrun(str(goldens.ROOT / "tests" / "support" / "join_rows.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["joined"]
    alone = torch.arange(3)
    assert Processes({}).join(alone) is alone


def rows(folder, event):
    with open(folder / "metrics.jsonl") as file:
        return [row for row in map(json.loads, file) if row["event"] == event]


@pytest.mark.slow
def test_a_shared_run_writes_one_folder_and_resumes(tmp_path):
    script = str(goldens.ROOT / "tests" / "support" / "train_as_one_of_two.py")
    command = ["-m", "dndetr.train", *FEW, *NO_BATCH_STATISTICS]
    done = torchrun(script, "end-alone", *command[2:], "--output", "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("run folder: whole") == 1
    whole = tmp_path / "whole"
    assert [path.name for path in whole.glob("told-*")] == ["told-0"], "listeners are told on the first process"
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert [row["step"] for row in rows(whole, "train")] == [2, 3, 4, 6]  # 12 images, 4 a step
    assert [row["epoch"] for row in rows(whole, "eval")] == [1, 2]
    images = {result["image_id"] for result in json.loads((whole / "detections_val.json").read_text())}
    assert len(images) == 6

    process = subprocess.Popen(
        [*TORCHRUN, *command, "--output", "stopped"],
        env=environment(),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    log = tmp_path / "stopped" / "metrics.jsonl"
    while process.poll() is None and not log.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    saved = torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)
    assert 0 < saved["step"] < 6 and saved["processes"] == 2, errors[-3000:]

    old = saved | {"rng": saved["rng"] | {"noise": [torch.Generator().get_state()] * 2}}
    (tmp_path / "old").mkdir()
    torch.save(old, tmp_path / "old" / "checkpoint.pt")
    alone = subprocess.run(
        [sys.executable, "-m", "dndetr.train", "--resume", "old"],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 1 and "made by 2 processes of version 0.1.0" in alone.stderr
    done = torchrun("-m", "dndetr.train", "--resume", "stopped", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ends = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["ema"] for name in ("whole", "stopped")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.slow
def test_one_layer_alone_is_trained_too(tmp_path):
    """It has no use for what scales the positions of later layers."""
    command = ["-m", "dndetr.train", *FEW, *NO_BATCH_STATISTICS, "--model.decoder-layers", "1", "--output"]
    for groups in ("0", "3"):
        done = torchrun(*command, f"run{groups}", "--denoising.groups", groups, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(tmp_path):
    script = str(goldens.ROOT / "tests" / "support" / "train_as_one_of_two.py")
    started = time.perf_counter()
    done = torchrun(script, "lose-one", *FEW, "--checkpoint-every", "1", "--output", "run", cwd=tmp_path)
    assert done.returncode != 0 and time.perf_counter() - started < 120
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2


def test_accumulated_batches_are_one_batch(tmp_path, monkeypatch):
    """The step of two batches of two is counted, logged and resumed as one."""
    monkeypatch.chdir(tmp_path)
    folder = train.run([*FEW, "--accumulate", "2", "--quiet", "--output", "run"])
    assert [row["step"] for row in rows(folder, "train")] == [2, 3, 4, 6]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 6
    with pytest.raises(ValueError, match="--accumulate 7: an epoch has 6 batches of 2"):
        train.run([*FEW, "--accumulate", "7", "--quiet", "--output", "none"])
    assert not (tmp_path / "none").exists()


WHOLE = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("left", "told"),
    [
        ({"WORLD_SIZE": "2"}, r"^WORLD_SIZE=2 but RANK is not set: unset WORLD_SIZE"),
        (WHOLE | {"LOCAL_RANK": ""}, "LOCAL_RANK is not set"),
        (WHOLE | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        (WHOLE | {"MASTER_PORT": "http"}, "^MASTER_PORT=http is not a number from 1 to 65535"),
        (WHOLE | {"MASTER_PORT": "70000"}, "^MASTER_PORT=70000 is not a number"),
        ({"WORLD_SIZE": "two"}, "^WORLD_SIZE=two is not 1 or more: unset WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "^WORLD_SIZE=0 is not 1 or more"),
        (WHOLE | {"RANK": "2"}, r"^RANK=2 is not a number from 0 to 1 \(WORLD_SIZE is 2\)"),
        ({"RANK": "1"}, r"^RANK=1 is not a number from 0 to 0 \(WORLD_SIZE is not set\): unset RANK to train in one"),
        (WHOLE | {"LOCAL_RANK": "-1"}, "^LOCAL_RANK=-1 is not a number from 0 to 1"),
    ],
)
def test_left_over_variables_are_named(left, told):
    with pytest.raises(ValueError, match=told), Processes(left):
        pass


def test_a_left_over_variable_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert train.main(FEW) == 1 and compare.main([]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: WORLD_SIZE=2 but RANK is not set: ") and "start it without torchrun" in second
    assert not any(tmp_path.iterdir())


def test_processes_that_cannot_meet_say_where(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in (WHOLE | {"MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RuntimeError, match=rf"^MASTER_ADDR:MASTER_PORT localhost:{port}: the 2 processes did not"):
            Processes().__enter__()


class Store(dict):
    """A store that processes of this machine share; ``wait`` finds all there, or others come meanwhile."""

    def __init__(self, *others):
        super().__init__()
        self._others = list(others)

    def set(self, name: str, value: str) -> None:
        self[name] = value.encode()

    def multi_get(self, names: list[str]) -> list[bytes]:
        return [self[name] for name in names]

    def wait(self, names: list[str], timeout) -> None:
        if self._others:
            self._others.pop(0)(self)
        assert all(name in self for name in names)


def test_what_a_dead_process_left_in_the_store_is_not_believed(monkeypatch):
    """torchrun keeps one store over its restarts: the second process comes when the first has found its old name."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    names = []

    def comes_back(store):
        store.set("name/1", "new")

    def tells(store):
        names.append(store["told/0"])
        store["told/1"] = store["told/0"]

    store = Store(lambda store: None, lambda store: None, comes_back, lambda store: None, tells, tells)
    store.set("name/1", "old")
    store.set("told/1", "old")
    agreed = Processes(WHOLE)._agreed_name(store)
    assert agreed.encode() == store["told/0"] == store["told/1"] and names[-1] == agreed.encode()
    first = hashlib.blake2b(store["name/0"] + b"old", digest_size=16).hexdigest()
    assert agreed == hashlib.blake2b(store["name/0"] + b"new", digest_size=16).hexdigest() != first


def test_a_graph_needs_a_matcher_that_does_not_wait(monkeypatch):
    monkeypatch.setattr(_backend, "choose", lambda op, *_: (f"{op} on the GPU", "fastest that runs here"))
    gpu = torch.device("cuda:0")
    assert pick_mode("auto", gpu, 1) == "graph" and pick_mode("auto", gpu, 2) == "eager"
    monkeypatch.setattr(_backend, "choose", lambda op, *_: ("reference", "cuda: no nvcc was found"))
    assert pick_mode("auto", gpu, 1) == "eager"
    with pytest.raises(ValueError, match=r"waits for the host \(cuda: no nvcc was found\); use --mode eager"):
        pick_mode("graph", gpu, 1)


def test_devices_of_several_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", 1) == torch.device("cuda:1")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device(device).index))
    make_current(pick_device("auto"))
    make_current(pick_device("auto", 1))
    make_current(pick_device("cuda:0"))
    assert chosen == [1, 0]
    with pytest.raises(ValueError, match="takes its own GPU"):
        pick_device("cuda:0", 1)
    with pytest.raises(ValueError, match="--nproc-per-node 2 or less"):
        pick_device("cuda", 2)
    with pytest.raises(ValueError, match="there are 2 GPUs here"):
        pick_device("cuda:2")
    assert Processes({}).local_rank is None and Processes({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}).local_rank is None
