"""The run folder: a new one for every run, held by one process."""

import multiprocessing
from pathlib import Path

import pytest

from dndetr.runs.folder import claim_output, hold, new_run_folder


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
