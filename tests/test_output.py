"""What is printed never ends a command, wherever it goes; files that cannot be written are named."""

import errno
import io
import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from short_runs import SMALL, short_run, write_pictures

from dndetr import bench, check_data, profile, shapes, train
from dndetr.commandline import exit_status
from dndetr.files import demand_file, write_atomic, writing
from dndetr.output import unfailing

FEW = [*SMALL, "--epochs", "1", "--batch-size", "4", "--train-images", "8", "--val-images", "6"]
NAMED = ((3, "größe"), (7, "点"), (12, "hair"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("encoding", "written"), [("ascii", b"gr\\xf6\\xdfe \\udc80"), ("latin-1", b"gr\xf6\xdfe \\udc80"),
                              ("utf-8", b"gr\xc3\xb6\xc3\x9fe \\udc80")]
)  # fmt: skip
def test_what_an_encoding_lacks_is_escaped(monkeypatch, encoding, written):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    with unfailing():
        print("größe \udc80", end="")
    assert raw.getvalue() == written


@pytest.mark.parametrize("broken", [None, "closed", "full"])
def test_output_that_goes_nowhere_is_no_error(monkeypatch, broken):
    stream = None if broken is None else open("/dev/full" if broken == "full" else os.devnull, "w")  # noqa: SIM115
    if broken == "closed":
        stream.close()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    assert train.main([*FEW, "--output", "run"]) == 0
    assert train.main(["--resume", "nowhere"]) == 1
    assert sys.stdout is stream and Path("run/best.pt").exists()
    if broken == "full":
        stream.close()  # nothing is left that could not be written


def test_what_another_thread_prints_to_stays_where_that_put_it(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with unfailing():
        sys.stdout = other = io.StringIO()
    assert sys.stdout is other


@pytest.mark.parametrize("command", ["train", "check_data"])
def test_names_that_cannot_be_printed_are_escaped(monkeypatch, command):
    data = write_pictures(Path("données"), classes=NAMED)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    if command == "train":
        flags = ["--preset", "small", "--data", str(data), "--epochs", "1", "--max-steps-per-epoch", "1"]
        flags += ["--batch-size", "2", "--images.canvas", "64", "64", "--output", "né"]
        assert train.main(flags) == 0
    else:
        assert check_data.main([str(data)]) == 0
    assert rb"gr\xf6\xdfe" in raw.getvalue() and rb"\u70b9" in raw.getvalue() and rb"n\xe9" in raw.getvalue()


def test_a_live_bar_fits_a_terminal_that_is_not_utf8(monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "latin-1"))
    assert train.main([*FEW, "--output", "run"]) == 0
    assert b"----" in raw.getvalue() and b"\\u" not in raw.getvalue()


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
def test_closed_descriptors_do_not_end_a_run_nor_leak_into_its_files(unbuffered):
    Path("program.py").write_text(f"""
import sys
from short_runs import train, without_pictures
with without_pictures():
    sys.exit(train.main({FEW!r} + ["--output", "run"]))
""")
    path = os.pathsep.join([str(Path(train.__file__).parents[1]), str(Path(short_run.__code__.co_filename).parent)])
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": path}
    command = ["bash", "-c", f"{sys.executable} program.py >&- 2>&-"]
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["event"] == "end"


def test_a_command_that_only_prints_ends_well_on_a_full_disk():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "dndetr", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def _no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("dndetr.runs.checkpoint.torch.save", "run/checkpoint.pt"),
        ("dndetr.runs.run_log._line", "run/metrics.jsonl"),
    ],
)
def test_a_file_of_a_run_that_cannot_be_written_is_named(monkeypatch, capsys, name, file):
    monkeypatch.setattr(name, _no_space)
    assert train.main([*FEW, "--quiet", "--output", "run"]) == 1
    assert capsys.readouterr().err == f"error: cannot write {file}: No space left on device\n"


@pytest.mark.parametrize(
    ("main", "flags", "told"),
    [
        (train.main, [*FEW, "--output", "taken/run"], "taken/run cannot be made: {here}/taken is a file"),
        (train.main, FEW, "runs/tiny cannot be made: {here}/runs is a file"),
        (check_data.main, ["data", "--output", "none/a.png"], "none/a.png cannot be made: No such file or directory"),
        (check_data.main, ["data", "--output", "."], ". cannot be made: it is a folder"),
        (profile.main, ["--trace", "taken/trace.json"], "taken/trace.json cannot be made: {here}/taken is a file"),
        (
            shapes.main,
            ["taken/data", "--train", "1", "--val", "1"],
            "taken/data cannot be made: {here}/taken is a file",
        ),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_the_work(capsys, main, flags, told):
    Path("taken").touch()
    Path("runs").touch()
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error: {told.format(here=Path.cwd())}") and "Errno" not in error and error.count("\n") == 1
    )
    assert sorted(path.name for path in Path().iterdir()) == ["runs", "taken"]


def test_a_folder_that_may_not_be_written_is_told_before_the_work(monkeypatch, capsys):
    def refuse(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("dndetr.files.tempfile.TemporaryFile", refuse)  # as for all but root, or read-only
    assert train.main([*FEW, "--output", "run"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: run cannot be made: Permission denied, in ")
    with pytest.raises(OSError, match=r"^a\.png cannot be made: Permission denied, in .*: give another$"):
        demand_file(Path("a.png"), "give another")


def test_an_error_is_told_without_its_number_and_once(monkeypatch, capsys):
    run = short_run(Path("run"))
    (run / "checkpoint.pt").unlink()
    (run / "checkpoint.pt").mkdir()
    assert train.main(["--resume", str(run)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(OSError, match=r"^cannot write run/checkpoint\.pt: Is a directory$"), writing("elsewhere"):
        write_atomic(run / "checkpoint.pt", b"")
    monkeypatch.setattr(bench, "ROOT", run)
    assert bench.main(["compare", str(run), str(run)]) == 2
    assert capsys.readouterr().err == "dndetr.bench: run: Is a directory\n"


def test_a_disk_that_fills_up_leaves_no_half_file():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"^cannot write file: File too large$"):
            write_atomic("file", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(Path().iterdir())


def test_warnings_of_commands_are_one_line(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # and as it was afterwards
    assert exit_status(lambda: None) == 0
    assert warnings.formatwarning("no room", UserWarning, "a.py", 3) == "warning: no room\n"
    assert warnings.formatwarning("old", DeprecationWarning, "a.py", 3) == "a.py:3: DeprecationWarning: old\n"
