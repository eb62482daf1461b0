"""What the pages say exists: links, files, commands with their flags, imports."""

import ast
import contextlib
import importlib
import re
import shlex

import pytest

from dndetr import train
from dndetr.__main__ import COMMANDS
from dndetr.presets import PRESETS
from dndetr.runs import detector_folder

PLACES = "dndetr|csrc|kernels|tests|benchmarks|docs"


@pytest.fixture(scope="module")
def pages(root) -> dict:
    found = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]
    return {path: path.read_text() for path in found}


def slug(heading: str) -> str:
    """A heading's anchor, as it is made where the pages are shown."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def code(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def test_links_lead_somewhere(pages):
    broken = []
    for path, page in pages.items():
        for target in re.findall(r"\]\(([^)]+)\)", page):
            name, _, anchor = target.partition("#")
            if name.startswith(("http://", "https://")):
                continue
            there = (path.parent / name).resolve() if name else path
            headings = re.findall(r"^#+ (.+)$", pages.get(there, ""), re.M)
            if not there.exists() or (anchor and anchor not in map(slug, headings)):
                broken.append(f"{path.name}: {target}")
    assert broken == []


def test_the_index_has_every_page(root, pages):
    index = pages[root / "docs" / "index.md"]
    assert [path.name for path in pages if path.parent.name == "docs" and f"({path.name})" not in index] == ["index.md"]


def test_the_front_page_is_short(root, pages):
    assert pages[root / "README.md"].count("\n") <= 130


def test_files_that_are_named_are_there(root, pages):
    missing = []
    for path, page in pages.items():
        for name in re.findall(rf"`((?:{PLACES})/[^\s`]*)`", page):
            if "<" not in name and not list(root.glob(name.partition("::")[0].rstrip("/"))):
                missing.append(f"{path.name}: {name}")
    assert missing == []


def test_names_that_are_imported_are_there(pages):
    found = 0
    for page in pages.values():
        for block in code(page, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "dndetr":
                    module = importlib.import_module(node.module)
                    for entry in node.names:
                        getattr(module, entry.name, None) or importlib.import_module(f"{node.module}.{entry.name}")
                        found += 1
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dndetr":
                    module = importlib.import_module("dndetr")
                    getattr(module, node.attr, None) or importlib.import_module(f"dndetr.{node.attr}")
                    found += 1
    assert found > 10


def test_modules_that_are_named_are_there(pages):
    for path, page in pages.items():
        for name in re.findall(r"`(dndetr(?:\.(?!json|safetensors)\w+)+)", page):
            module, _, attribute = name.rpartition(".")
            there = importlib.import_module(module)
            assert hasattr(there, attribute) or importlib.import_module(name), f"{path.name}: {name}"


def test_commands_that_are_shown_exist_with_their_flags(pages, capsys, monkeypatch):
    # Names on the hub are not asked for.
    monkeypatch.setattr(detector_folder, "as_starting_point", lambda name: PRESETS["dn-detr-r50"]())
    shown = []
    for path, page in pages.items():
        for text in [*code(page, ""), *re.findall(r"`([^`\n]*python -m dndetr[^`\n]*)`", page)]:
            for line in text.replace("\\\n", " ").splitlines():
                for command in re.findall(r"(?:python -m dndetr\.|dndetr )(\w+)([^#&|;]*)", line):
                    shown.append((path.name, *command))
    assert len(shown) > 40
    helps = {}
    for page, command, rest in shown:
        assert command in COMMANDS, f"{page}: {command}"
        if command not in helps:
            with contextlib.suppress(SystemExit):
                importlib.import_module(f"dndetr.{command}").main(["--help"])
            helps[command] = capsys.readouterr().out
        flags = [word.partition("=")[0] for word in shlex.split(rest.replace("'", "")) if word.startswith("--")]
        # Of a comparison, all flags that training has; of a benchmark's subcommands, those below them.
        known = helps[command] + (helps["train"] if command in ("compare", "profile") else "")
        unknown = [flag for flag in flags if f"{flag} " not in known.replace(",", " ") and command != "bench"]
        assert unknown == [], f"{page}: python -m dndetr.{command}{rest}"
        if command == "train" and "--help" not in flags:
            train.parse(shlex.split(rest))  # also refuses values that a flag does not take
