"""What commands that compute tell the process before torch is there."""

import os
import subprocess
import sys

import goldens
import pytest

_FAULTS = """
import dndetr._process, ctypes, os, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(2):  # the second time the same pages come again
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = libc.malloc(1 << 26)
    ctypes.memset(memory, 1, 1 << 26)
    libc.free(memory)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, os.environ["GOMP_SPINCOUNT"])
"""


def second_time(**environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "GOMP_"))}
    environment = clean | {"PYTHONPATH": str(goldens.ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", _FAULTS], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="not glibc")
def test_freed_memory_is_kept_unless_the_user_decides():
    faults, spin = second_time()
    assert int(faults) < 1000 and spin == "3000"  # 64 MiB are 16384 pages
    faults, spin = second_time(MALLOC_ARENA_MAX="8", GOMP_SPINCOUNT="7")
    assert int(faults) > 10000 and spin == "7"
