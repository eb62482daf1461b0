"""Comparing benchmark results, and the tables of the docs, which must be what the committed results say."""

import json

import pytest

from dndetr import bench


def content(seconds: dict, **provenance) -> dict:
    about = {"commit": "c0ffee", "torch": "2.13", "cpu": "Some CPU", "cores": 2, "threads": 2, "simd": "avx2"}
    return {"provenance": about | {"gpu": None} | provenance, "results": {"the step": {"seconds": seconds}}}


def write(path, what):
    path.write_text(json.dumps(what))
    return str(path)


def test_no_table_is_stale(root):
    for path, page in bench.pages(root).items():
        assert page == path.read_text(), "type: python -m dndetr.bench readme"


def test_every_headline_was_measured(root):
    rows = [line for line in bench.table(bench.committed(root), bench.HEADLINES).splitlines() if line.startswith("| ")]
    assert len(rows) - 2 == len(set(bench.HEADLINES)), "a row each, and two of the head"


def test_headlines_are_chosen_and_in_their_order():
    found = content({"ours": 0.5, "theirs": 1.5, "others": 2.5})
    found["results"]["another"] = {"seconds": {"ours": 0.1, "theirs": 0.2}}
    headlines = [("another", "theirs"), ("not measured", "theirs"), ("the step", "others"), ("the step", "nobody")]
    chosen = bench.table([found], headlines)
    assert "the step" in chosen and chosen.index("another") < chosen.index("the step") and "not measured" not in chosen
    assert "| others |" in chosen and "1.5 s" not in chosen and "nobody" not in chosen
    assert "the step" not in bench.table([found], headlines[:1])


def test_a_stale_table_is_noticed_and_renewed():
    page = f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n"
    rows = bench.table([content({"ours": 0.5, "theirs": 1.5})])
    new = bench.renewed(page, rows)
    assert "| the step | 500 ms | theirs | 1.5 s | 3.0x |" in new and "Some CPU" in new
    assert new.startswith("before\n") and new.endswith("after\n") and "old" not in new
    assert bench.renewed(new, rows) == new
    with pytest.raises(ValueError, match="must hold"):
        bench.renewed("no markers", rows)


def test_stale_pages_are_named_and_renewed(root, tmp_path, monkeypatch, capsys):
    results = [path.relative_to(root) for path in (root / "benchmarks" / "results").glob("*.json")]
    for name in ("README.md", "docs/performance.md", *results):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((root / name).read_bytes())
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert bench.main(["readme", "--check"]) == 0
    page = tmp_path / "docs" / "performance.md"
    page.write_text(page.read_text().replace("| ours |", "| us |"))
    assert bench.main(["readme", "--check"]) == 1
    assert capsys.readouterr().err == "stale: docs/performance.md; type: python -m dndetr.bench readme\n"
    assert bench.main(["readme"]) == 0 == bench.main(["readme", "--check"])
    assert page.read_bytes() == (root / "docs" / "performance.md").read_bytes()


def test_the_table_leaves_out_details_but_comparisons_do_not(tmp_path, capsys):
    found = content({"ours": 0.5, "theirs": 1.5})
    found["results"]["one of many"] = {"seconds": {"ours": 0.1, "theirs": 0.2}, "detail": True}
    assert "the step" in bench.table([found]) and "one of many" not in bench.table([found])
    path = write(tmp_path / "a.json", found)
    assert bench.main(["compare", path, path]) == 0
    assert "one of many" in capsys.readouterr().out


def test_comparison(tmp_path, capsys):
    a = write(tmp_path / "a.json", content({"ours": 0.4, "theirs": 1.0}))
    b = write(tmp_path / "b.json", content({"ours": 0.1, "theirs": 2.0}))
    assert bench.main(["compare", a, b]) == 0
    told = capsys.readouterr().out
    assert "4.00x" in told and "0.50x" in told and "geometric mean of ours: 4.00x" in told


def test_other_devices_need_a_flag(tmp_path, capsys):
    a = write(tmp_path / "a.json", content({"ours": 0.4}))
    b = write(tmp_path / "b.json", content({"ours": 0.1}, gpu="Some GPU"))
    assert bench.main(["compare", a, b]) == 2
    assert "different devices (gpu None and Some GPU)" in capsys.readouterr().err
    assert bench.main(["compare", a, b, "--across-devices"]) == 0


@pytest.mark.parametrize("text", [None, "{", "[]", '{"results": {}}'])
def test_what_is_no_result_file_is_told_in_one_line(tmp_path, capsys, text):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    good = write(tmp_path / "a.json", content({"ours": 0.4}))
    assert bench.main(["compare", good, str(path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "pytest benchmarks/ --results" in told


def test_nothing_in_common(tmp_path, capsys):
    a, b = (write(tmp_path / f"{name}.json", content({name: 1.0})) for name in ("ours", "theirs"))
    assert bench.main(["compare", a, b]) == 2
    assert "no measurement in common" in capsys.readouterr().err
