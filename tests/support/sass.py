"""What a GPU would run: kernels of a compiled file, as machine instructions and resources. Needs no GPU."""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


def find_cuobjdump() -> str | None:
    """CUDA's disassembler: on the path, in /usr/local/cuda, or the one that comes with Triton."""
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    except ImportError:
        bundled = Path()
    for path in (None, "/usr/local/cuda/bin", str(bundled)):
        if found := shutil.which("cuobjdump", path=path):
            return found
    return None


@dataclass(frozen=True)
class Kernel:
    """One kernel: registers of a thread, bytes of its stack, instructions (address, mnemonic, predicate and rest)."""

    name: str
    registers: int
    stack: int
    instructions: tuple[tuple[int, str, str], ...]

    def count(self, pattern: str, within: tuple[int, int] | None = None) -> int:
        """Instructions whose mnemonic matches all of a pattern, in a range of addresses or anywhere."""
        low, high = within or (0, 1 << 62)
        return sum(low <= place <= high and re.fullmatch(pattern, op) is not None for place, op, _ in self.instructions)

    @cached_property
    def loops(self) -> list[tuple[int, int]]:
        """Address ranges that a jump backwards closes, the shortest first."""
        jumps = ((place, re.search(r"\b0x([0-9a-f]+)", text)) for place, op, text in self.instructions if op == "BRA")
        spans = [(int(target[1], 16), place) for place, target in jumps if target and int(target[1], 16) < place]
        return sorted(spans, key=lambda span: span[1] - span[0])

    def loop_with(self, pattern: str) -> tuple[int, int]:
        """The shortest loop that holds such an instruction."""
        return next(span for span in self.loops if self.count(pattern, span))

    def executed(self, within: tuple[int, int], turns: Callable[[tuple[int, int]], int]) -> int:
        """Instructions that a warp executes in a range of addresses, in whose loops it takes so many turns.

        Jumps with a condition are not taken, unless they close a loop, so whatever may be skipped counts; what lies
        beyond the range, where lanes that went apart meet again, does not.
        """
        first, last = within
        closed = {low: (low, high) for low, high in self.loops if first <= low and high <= last}  # the longest
        closed.pop(first, None)
        places = [(place, op, text) for place, op, text in self.instructions if first <= place <= last]
        count, index = 0, 0
        while index < len(places):
            place, op, text = places[index]
            if place in closed:
                low, high = closed[place]
                count += turns((low, high)) * self.executed((low, high), turns)
                skip_to = high + 1
            else:
                count += 1
                jump = re.fullmatch(r"\s*0x([0-9a-f]+)\s*", text) if op == "BRA" else None
                skip_to = int(jump[1], 16) if jump and place < int(jump[1], 16) <= last else place + 1
            while index < len(places) and places[index][0] < skip_to:
                index += 1
        return count


def template_numbers(symbol: str) -> tuple[int, ...]:
    """The integers and booleans among the template arguments of a mangled name."""
    return tuple(int(number) for number in re.findall(r"L[ijb](\d+)E", symbol))


def architectures(cuobjdump: str, file: Path) -> list[str]:
    """Architectures that a file holds machine code for, such as sm_90."""
    listed = subprocess.run([cuobjdump, "--list-elf", str(file)], capture_output=True, text=True, check=True).stdout
    return sorted(set(re.findall(r"\.(sm_\d+[a-z]?)\.cubin", listed)))


def kernels(cuobjdump: str, file: Path, arch: str, name: str) -> list[Kernel]:
    """The kernels of a file for one architecture whose mangled names match ``name``."""

    def ask(what: str) -> str:
        command = [cuobjdump, what, "-arch", arch, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = {
        found[1]: (int(found[2]), int(found[3]))
        for found in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", ask("-res-usage"))
    }
    found = []
    for part in re.split(r"\n\s*Function : ", ask("-sass"))[1:]:
        symbol = part.split("\n", 1)[0].strip()
        if re.search(name, symbol):
            lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P[T\d]+ )?([A-Z][\w.]*)([^;/]*);", part)
            code = tuple((int(place, 16), op, f"{predicate}{text}") for place, predicate, op, text in lines)
            found.append(Kernel(symbol, *usage[symbol], code))
    return found
