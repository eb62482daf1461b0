"""The order of rooms in docs/design.md holds: imports run downwards, in no circle, and every file is one idea."""

import ast

import pytest
import rooms

import dndetr.__main__

LONGEST = 400  # lines


@pytest.fixture(scope="module")
def order(root):
    return rooms.order_in((root / "docs" / "design.md").read_text())


def test_no_import_runs_upwards(root, order):
    assert rooms.upward(root / "dndetr", order) == []


def test_no_import_runs_in_a_circle(root):
    assert rooms.circle(root / "dndetr") == []


def test_the_door_opens_nothing_by_itself(root):
    """What the package offers by name is imported when it is asked for: commands set up their process before torch."""
    body = ast.parse((root / "dndetr" / "__init__.py").read_text()).body
    own = [node for node in body if isinstance(node, ast.ImportFrom) and node.level]
    assert own == []


def test_no_private_name_is_imported(root):
    """What starts with an underscore is its module's own; there are modules of that kind, which are their room's."""
    known = rooms.modules(root / "dndetr")
    allowed = {name.rpartition(".")[2] for name in known} | {"__version__"}
    imported = [
        f"{name}: {entry.name}"
        for name, path in known.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
        for entry in node.names
        if entry.name.startswith("_") and entry.name not in allowed
    ]
    assert imported == []


def test_every_room_says_what_belongs_there(root, order):
    named = {room for level in order for room in level if (root / "dndetr" / room).is_dir()}
    folders = {path.parent for path in (root / "dndetr").glob("*/__init__.py")}
    # A folder named kernels with an __init__.py would shadow a distribution of that name (docs/design.md).
    assert {folder.name for folder in folders} | {"kernels"} == named
    for folder in folders:
        first = (ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "").split("\n")[0]
        assert first.endswith("."), folder.name


def test_commands_stand_in_front(root, order):
    assert set(dndetr.__main__.COMMANDS) <= set(order[1])


def test_tests_mirror_the_rooms(root):
    folders = {path.name for path in (root / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    own = {"parity", "benchmarks", "support", "fixtures"}
    assert folders - own <= {path.name for path in (root / "dndetr").iterdir() if path.is_dir()}


def test_no_file_is_longer_than_one_can_read(root):
    kinds = (".py", ".cpp", ".h", ".cu", ".cuh", ".sh")
    folders = ("dndetr", "csrc", "kernels", "benchmarks", "tests", "docs")
    files = [path for folder in folders for path in (root / folder).rglob("*") if path.suffix in kinds]
    lengths = {str(path.relative_to(root)): path.read_text().count("\n") for path in files}
    assert len(lengths) > 200 and {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


@pytest.fixture
def house(tmp_path):
    """A package of three rooms, from a dict of files."""

    def build(files: dict[str, str]):
        for name, text in {"__init__.py": "", **files}.items():
            path = tmp_path / "house" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "house"

    return build


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        ({"roof/a.py": "from ..hall import b", "hall/b.py": "from ..cellar import c", "cellar.py": "c = 1"}, []),
        ({"cellar.py": "def f():\n    from .roof.a import x"}, ["house.cellar:2 imports house.roof.a, which is above"]),
        ({"hall/b.py": "from .. import roof"}, ["house.hall.b:1 imports house.roof, which is above"]),
        ({"hall/b.py": "from house.cellar import c"}, ["house.hall.b:1 imports house.cellar absolutely"]),
        ({"hall/b.py": "from cellar import c"}, ["house.hall.b:1 imports house.cellar absolutely"]),
        ({"hall/b.py": "import cellar"}, ["house.hall.b:1 imports house.cellar absolutely"]),
        ({"attic.py": ""}, ["attic has no place in the order"]),
    ],
    ids=["fine", "late", "whole-room", "absolute", "as-if-on-top", "on-top", "unknown"],
)
def test_what_is_wrong_is_seen(house, files, wrong):
    rooms_there = {"roof/__init__.py": "", "roof/a.py": "x = 1", "hall/__init__.py": "", "cellar.py": ""}
    assert rooms.upward(house(rooms_there | files), [["roof"], ["hall"], ["cellar"]]) == wrong


def test_a_circle_is_seen(house):
    files = {"hall/__init__.py": "", "hall/a.py": "from .b import x", "hall/b.py": "def late():\n    from . import a"}
    assert rooms.circle(house(files)) == ["house.hall.a", "house.hall.b", "house.hall.a"]
    assert rooms.circle(house(files | {"hall/b.py": "x = 1"})) == []
