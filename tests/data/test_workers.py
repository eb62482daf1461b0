"""Whatever a worker loses ends the run in one line; want of shared memory is told before it begins."""

import os
import re
import resource
import signal
import sys
import time
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import pytest
import torch
from short_runs import write_pictures
from splits import read_split
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dndetr import evaluate, health, train
from dndetr.data import workers
from dndetr.data.errors import UnreadableImage
from dndetr.data.folder_dataset import FolderDataset
from dndetr.data.loader import build_loader, largest_batch
from dndetr.data.order import Order
from dndetr.data.shapes import ShapesDataset
from dndetr.data.transforms import Unresized
from dndetr.data.workers import WorkerLost, Workers, demand_room


@pytest.fixture
def room(monkeypatch):
    """Sets how many bytes of shared memory are free."""

    def has(free: int) -> None:
        status = SimpleNamespace(f_bavail=free, f_frsize=1)
        monkeypatch.setattr(workers, "os", SimpleNamespace(statvfs=lambda path: status))

    return has


@pytest.fixture
def impatient(monkeypatch):
    """Workers are looked for five times a second."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


class Failing(ShapesDataset):
    """Shapes of which the fourth does what it is told, in the worker that reads it."""

    def __init__(self, fail):
        super().__init__("train", 8)
        self._fail = fail

    def sample(self, index: int, epoch: int = 0):
        if index == 3:
            self._fail()
        return super().sample(index, epoch)


def failure(dataset: ShapesDataset, workers: int) -> str:
    """What is said when it is read; pytest would keep the error, and so the workers, for a while."""
    try:
        list(build_loader(dataset, 2, training=False, workers=workers).epoch())
    except WorkerLost as error:
        return str(error)
    raise AssertionError("nothing was lost")


class Awkward(Exception):
    """Neither goes through a pickle nor says anything."""

    def __reduce__(self):
        raise IndexError("not to be pickled")

    def __str__(self):
        return "awkward"


def _raise(error: BaseException):
    raise error


def _forget_how_to_share():
    """As where the system refuses when the batch is on its way already."""
    ForkingPickler.register(torch.Tensor, lambda tensor: _raise(RuntimeError(_FULL)))


_FULL = "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)"


@pytest.mark.parametrize(
    ("fail", "told"),
    [
        (
            _forget_how_to_share,
            r"found no room in shared memory \(.*\): use fewer --workers \(0: none\), or more",
        ),
        (lambda: _raise(OSError(24, "Too many open files")), r"may open no more files .* ulimit -n 65536"),
        (lambda: _raise(MemoryError()), r"memory ran out in a data worker .* use fewer --workers"),
        (lambda: _raise(Awkward()), r"a data worker failed \(Awkward: awkward in .*test_workers.py:\d+\); --workers 0"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), r"ended by SIGBUS, as by full shared memory: use fewer"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"killed \(SIGKILL\), as the system does when memory runs out"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), r"a data worker was ended by SIGSEGV; --workers 0 does without"),
        (lambda: os._exit(0), r"a data worker ended by itself with status 0; --workers 0"),
        (lambda: sys.exit(3), r"a data worker ended by itself with status [13]"),
    ],
    ids=["shm", "files", "memory", "unpicklable", "bus", "oom", "segv", "silent", "exit"],
)
def test_what_a_worker_loses_is_one_line(fail, told, capfd, impatient):
    before = signal.getsignal(signal.SIGCHLD)
    started = time.monotonic()
    error = failure(Failing(fail), workers=2)
    assert time.monotonic() - started < 30 and re.search(told, error) and "\n" not in error
    assert "Traceback" not in capfd.readouterr().err and signal.getsignal(signal.SIGCHLD) is before


def test_a_broken_image_stays_an_error_of_the_data():
    loader = build_loader(Failing(lambda: _raise(UnreadableImage("3.png: torn"))), 2, training=False, workers=1)
    with pytest.raises(ValueError, match=r"^3\.png: torn$"):
        list(loader.epoch())


def test_room_is_for_what_is_there_at_once(room):
    room(1000)
    demand_room(2, 200, 100, 1, 1)
    demand_room(2, 400, 2, 1, 1)  # no more than there are
    told = (
        r"^--workers 2: shared memory \(/dev/shm\) has 0.0 MB free, and needed are .*, 6 batches of .*: use --workers 1"
    )
    with pytest.raises(ValueError, match=told):
        demand_room(2, 200, 100, 2, 1)
    with pytest.raises(
        ValueError, match=r"for each of 2 processes: use --workers 0, or give it more \(docker run --shm"
    ):
        demand_room(2, 200, 100, 1, 2)


def test_without_such_a_limit_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(workers, "SHARED_MEMORY", "/nowhere")
    demand_room(8, 1 << 60, 100, 1, 1)


def test_the_largest_batch_is_known_without_reading_it(tmp_path):
    dataset = FolderDataset(read_split(write_pictures(tmp_path / "data"), "train"), Unresized())
    for batch_size, multiple in ((2, 64), (3, 32)):
        order = Order([height > width for height, width in dataset.sizes], batch_size, False, 0)
        read = build_loader(dataset, batch_size, training=False, multiple=multiple).epoch()
        assert largest_batch(dataset, order, multiple) == max(batch.pixels.nbytes for batch in read)


@pytest.mark.parametrize("command", ["train", "evaluate", "health"])
def test_want_of_shared_memory_is_told_before_the_work(tmp_path, monkeypatch, room, capsys, command, no_pictures):
    monkeypatch.chdir(tmp_path)
    flags = ["--train-images", "8", "--val-images", "8", "--batch-size", "2", "--epochs", "1", "--output", "run"]
    if command != "train":
        assert train.main([*flags, "--quiet"]) == 0
    room(100_000)
    if command == "train":
        status = train.main([*flags, "--workers", "2"])
    elif command == "health":
        status = health.main(["run", "--workers", "2", "--output", "out"])
    else:
        status = evaluate.main(["run", "--workers", "2", "--batch-size", "2", "--output", "out"])
    error = capsys.readouterr().err
    assert status == 1 and error.startswith("error: --workers 2: shared memory (/dev/shm) has 0.1 MB free")
    assert "--shm-size" in error and error.count("\n") == 1
    assert not (tmp_path / ("run" if command == "train" else "out")).exists()


def test_no_file_left_to_open_is_one_line():
    """The limit is met when a batch is sent, after it was made."""
    forbid = Failing(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)))
    assert "may open no more files" in failure(forbid, workers=1)


def test_workers_that_are_given_up_start_anew():
    reader = Workers(list(range(8)), 2)
    first = reader.read([0, 1, 2, 3, 4, 5])
    assert next(first) == 0
    assert list(reader.read([7, 6])) == [7, 6]
