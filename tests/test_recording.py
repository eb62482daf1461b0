"""Benchmark results are in their file as soon as they are measured."""

import json

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


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Recording(None, {})("one", {"ours": 1.0})
    assert list(tmp_path.iterdir()) == []
