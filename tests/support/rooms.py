"""Reads the imports of a package, and what is wrong with them: those that run upwards, in a circle, or absolutely."""

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


def modules(package: Path) -> dict[str, Path]:
    """Module names below a package, with their files; a linked folder belongs to it."""
    found = {}
    folders = [package]
    while folders:
        folder = folders.pop()
        prefix = ".".join((package.name, *folder.relative_to(package).parts))
        for path in sorted(folder.iterdir()):
            if path.is_dir() and path.name != "__pycache__":
                folders.append(path)
            elif path.suffix == ".py":
                found[prefix if path.name == "__init__.py" else f"{prefix}.{path.stem}"] = path
    return found


def imports(name: str, path: Path, known: Sequence[str]) -> Iterator[tuple[int, str, bool]]:
    """Line, module, and whether it is relative, of every import of the package's own modules, wherever it stands.

    A folder of the package may be linked from the top of the repository, where it would be found as well: by chance.
    """
    top = name.partition(".")[0]
    linked = {entry.split(".")[1] for entry in known if entry.count(".")}
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for entry in node.names:
                first = entry.name.partition(".")[0]
                if first == top or (first in linked and first not in sys.stdlib_module_names):
                    yield node.lineno, entry.name if first == top else f"{top}.{entry.name}", False
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            first = source.partition(".")[0]
            if not node.level and first in linked and first not in sys.stdlib_module_names:
                yield node.lineno, f"{top}.{source}", False
            elif first == top:
                for entry in node.names:
                    full = f"{source}.{entry.name}"
                    yield node.lineno, full if full in known else source, bool(node.level)


def upward(package: Path, order: Sequence[Sequence[str]]) -> list[str]:
    """Imports of a room that stands above the importing one, or of one without a place; order: rooms, highest first.

    The package itself is no room: whoever imports a module has imported it.
    """
    known = modules(package)
    place = {room: level for level, rooms in enumerate(order) for room in rooms}
    wrong = []
    for name, path in known.items():
        if name == package.name:
            continue
        own = name.split(".")[1]
        if own not in place:
            wrong.append(f"{own} has no place in the order")
            continue
        for line, target, relative in imports(name, path, known):
            if not relative:
                wrong.append(f"{name}:{line} imports {target} absolutely")
            if target != package.name and place.get(target.split(".")[1], -1) < place[own]:
                wrong.append(f"{name}:{line} imports {target}, which is above")
    return wrong


def circle(package: Path) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    known = modules(package)
    graph = {name: {target for _, target, _ in imports(name, path, known)} for name, path in known.items()}
    graph[package.name] = set()
    done: set[str] = set()

    def follow(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            if found := follow(target, [*way, name]):
                return found
        done.add(name)
        return []

    return next(filter(None, (follow(name, []) for name in sorted(graph))), [])


def order_in(page: str) -> list[list[str]]:
    """The order of rooms as the design page has it: the first block of code below "Rooms", without what is said."""
    block = re.search(r"## Rooms\n.*?```\n(.*?)```", page, re.S)[1]
    return [line.partition("  ")[0].split() for line in block.splitlines() if line.strip()]
