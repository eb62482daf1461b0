"""What this machine does at best: the rates that the other benchmarks' shares refer to.

``pytest benchmarks/bench_ceilings.py -s --results FILE``: bytes and floating-point operations per second; on a GPU also
the seconds of a launch. Each is a measurement, none is a number from a data sheet.
"""

import ceilings
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _show(rates: dict[str, float], unit: str, scale: float) -> None:
    print("\n" + ", ".join(f"{kind} {rate / scale:.3g} {unit}" for kind, rate in rates.items()))


def bench_products(record):
    rates = ceilings.products(DEVICE)
    record(f"ceilings of arithmetic, {DEVICE}", {}, operations_per_second=rates)
    _show(rates, "TFLOP/s", 1e12)


def bench_memory(record):
    rates = ceilings.measure(DEVICE)
    if DEVICE == "cuda":
        rates["from the host"] = ceilings.to_device()
    record(f"ceilings of memory, {DEVICE}", {}, bytes_per_second=rates)
    _show(rates, "GB/s", 1e9)


@pytest.mark.gpu
def bench_launches(record):
    seconds = ceilings.launches()
    record("launches", {}, host_seconds=seconds)
    _show(seconds, "us", 1e-6)
