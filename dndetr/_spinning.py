"""Imported before torch by commands that compute: how long an idle OpenMP thread spins before it sleeps.

libgomp's default is to spin for milliseconds. That is free on an idle machine, but where another process wants the same
cores, threads wait for partners that are not running and a step takes fifty times as long. A short spin costs nothing
measurable when alone (docs/results.md) and ends the collapse. libgomp reads the variable when it is loaded, with torch.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")
