"""The run folder: a new one for every run, held by one process."""

import errno
import multiprocessing
import os
import tempfile
from pathlib import Path

import pytest

from dndetr import check_data, export, profile, shapes
from dndetr.runs.folder import claim_output, hold, new_run_folder
from dndetr.runs.results import results_folder


def test_run_folders_count_up_and_are_never_reused(tmp_path: Path):
    root = tmp_path / "runs"
    assert new_run_folder("tiny", root) == root / "tiny-1"
    assert new_run_folder("tiny", root) == root / "tiny-2"
    (root / "tiny-9").write_text("a file takes its number as well")
    (root / "tiny-extra").mkdir()
    assert new_run_folder("tiny", root) == root / "tiny-10"
    assert new_run_folder("dn-detr-r50", root) == root / "dn-detr-r50-1"


def test_processes_that_start_together_get_folders_of_their_own(tmp_path: Path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        folders = pool.starmap(new_run_folder, [("tiny", tmp_path)] * 24)
    assert len(set(folders)) == 24


def test_claimed_output_is_new_or_empty(tmp_path: Path):
    assert claim_output(tmp_path / "a" / "b").is_dir()
    assert claim_output(str(tmp_path / "a" / "b")).is_dir()
    with pytest.raises(FileExistsError, match=r"not empty.*choose another --output$"):
        claim_output(tmp_path / "a")
    (tmp_path / "a" / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(FileExistsError, match=r"--resume .*/a$"):
        claim_output(tmp_path / "a")
    with pytest.raises(FileExistsError, match="is a file"):
        claim_output(tmp_path / "a" / "checkpoint.pt")


LONG = "x" * 300


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("file/run", r"file is a file"),
        ("file/some/more/run", r"file is a file"),
        (LONG, r"File name too long, in "),
        (f"{LONG}/run", r"File name too long, in "),
    ],
    ids=["in a file", "far in a file", "long", "in a long one"],
)
def test_folders_that_cannot_be_made_say_where_and_why(path: str, why: str, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"cannot be made: .*{why}.*: give another --output$") as told:
        claim_output(tmp_path / path)
    assert str(told.value).startswith(str(tmp_path / path)) and "Errno" not in str(told.value)
    with (
        pytest.raises(OSError, match=rf"cannot be made: .*{why}.*: give another --output$"),
        results_folder(tmp_path / path, "predictions"),
    ):
        raise AssertionError("made")
    with pytest.raises(OSError, match=rf"cannot be made: .*{why}.*: name another place with --output$"):
        new_run_folder("tiny", tmp_path / path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_folders_that_cannot_be_written_say_so_before_the_work(number: int, tmp_path: Path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), "somewhere")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        OSError, match=f"{tmp_path.name} cannot be made: {os.strerror(number)}, in .*: give another --output"
    ):
        claim_output(tmp_path)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        OSError, match=f"tiny cannot be made: {os.strerror(number)}, in .*: name another place with --output"
    ):
        new_run_folder("tiny", tmp_path)


def test_commands_say_what_is_wrong_with_their_output(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    commands = {
        "--trace": (profile.main, ["--trace", "file/trace.json.gz"]),
        "--output": (check_data.main, [".", "--output", "file/sheet.png"]),
        "folder": (shapes.main, ["file/data"]),
    }
    for what, (main, arguments) in commands.items():
        assert main(arguments) == 1
        assert (
            capsys.readouterr().err
            == f"error: {arguments[-1]} cannot be made: {tmp_path / 'file'} is a file: give another {what}\n"
        )
    for path, told in (("file/m.pt2", f"{tmp_path / 'file'} is a file"), (f"{LONG}.pt2", "File name too long")):
        assert export.main(["run", "--output", path]) == 1
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1 and "Errno" not in error


def test_half_a_first_checkpoint_does_not_keep_a_folder_from_being_used(tmp_path):
    (tmp_path / ".checkpoint.pt.1.abcd.tmp").write_bytes(b"half")
    assert claim_output(tmp_path) == tmp_path
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError):
        claim_output(tmp_path)


def test_a_folder_is_held_by_one_at_a_time_and_not_by_its_workers(tmp_path):
    with hold(tmp_path), pytest.raises(ValueError, match="is being trained by another process"), hold(tmp_path):
        raise AssertionError("held twice")
    fork = multiprocessing.get_context("fork")
    started, ended = fork.Event(), fork.Event()
    with hold(tmp_path):
        worker = fork.Process(target=lambda: (started.set(), ended.wait()))
        worker.start()
    try:
        assert started.wait(10)
        with hold(tmp_path):
            assert worker.is_alive()
    finally:
        worker.kill()
    assert not any(tmp_path.iterdir())
