"""Benchmark results are in their file as soon as they are measured."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import recording
from recording import Recording


def results(path):
    return json.loads(path.read_text())["results"]


def test_every_result_is_written_at_once(tmp_path):
    path = tmp_path / "out.json"
    record = Recording(path, {"gpu": "Some GPU"})
    assert not path.exists()
    record("one", {"ours": 1.0}, launches=3)
    assert results(path) == {"one": {"seconds": {"ours": 1.0}, "launches": 3}}
    record("two", {"ours": 2.0})
    record("one", {"ours": 0.5})
    assert results(path) == {"one": {"seconds": {"ours": 0.5}}, "two": {"seconds": {"ours": 2.0}}}
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


def test_results_of_the_same_provenance_are_kept(tmp_path):
    path = tmp_path / "out.json"
    Recording(path, {"commit": "a"})("one", {})
    Recording(path, {"commit": "a"})("two", {})
    assert list(results(path)) == ["one", "two"]
    Recording(path, {"commit": "b"})("three", {})
    assert list(results(path)) == ["three"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"provenance": {}}'])
def test_a_file_that_holds_something_else_is_kept_and_named(tmp_path, text):
    path = tmp_path / "out.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"out\.json: the file is there and holds no results"):
        Recording(path, {})
    assert path.read_text() == text


def test_a_new_folder_is_made_before_anything_is_measured(tmp_path):
    Recording(tmp_path / "new" / "out.json", {})
    assert (tmp_path / "new").is_dir()


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Recording(None, {})("one", {"ours": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_writing_results_does_not_make_the_commit_dirty(tmp_path, monkeypatch):
    """Else a second run would find results of another provenance in its file, and drop them."""
    for folder in ("benchmarks/results", "dndetr"):
        (tmp_path / folder).mkdir(parents=True)
    copy = Path(shutil.copy(recording.__file__, tmp_path / "benchmarks"))
    (tmp_path / "dndetr/step.py").write_text("1")
    (tmp_path / "benchmarks/results/cpu.json").write_text("{}")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(recording, "__file__", str(copy))
    commit = recording._commit()
    assert len(commit) >= 7 and not commit.endswith("-dirty")
    (tmp_path / "benchmarks/results/cpu.json").write_text("{1: 2}")
    assert recording._commit() == commit
    (tmp_path / "dndetr/step.py").write_text("2")
    assert recording._commit() == commit + "-dirty"
