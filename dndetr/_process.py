"""Imported before torch by commands that compute: how this process waits, and how it keeps memory.

An idle OpenMP thread of libgomp spins for milliseconds before it sleeps. That is free on an idle machine, but where
another process wants the same cores, threads wait for partners that are not running and a step takes fifty times as
long. A short spin costs nothing measurable when alone (docs/results.md) and ends the collapse. libgomp reads the
variable when it is loaded, with torch.

glibc gives every large activation back to the system as soon as it is free, so that the next step faults each of its
pages in again, thousands in a step. Here what was freed is kept for the next step.
"""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of glibc's mallopt(3)

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

_own_choice = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
_glibc = libc if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version") else None
if _glibc is not None and not _own_choice:
    _glibc.mallopt(_MMAP_MAX, 0)
    _glibc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def give_back() -> None:
    """Return to the system what is kept now."""
    if _glibc is not None:
        _glibc.malloc_trim(0)
