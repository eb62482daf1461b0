"""What GPUs do in a second: measured where there was one, otherwise from their makers' data sheets."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """One card.

    bandwidth: bytes per second of kernels that read and write memory; products: operations per second of large products
    and convolutions in half precision; pace: how fast it issues instructions, an H200 being 1; source: where the
    numbers are from.
    """

    bandwidth: float
    products: float
    pace: float
    source: str


# Seconds in a graph on an H200 (traces of benchmarks/results/, which name kernels, calls and times): the gap before a
# kernel, what an elementwise kernel takes that has next to nothing to do, and what a product of a few hundred rows
# takes. They are taken to be the same on other cards.
GAP, LEAST, LEAST_PRODUCT = 0.6e-6, 1.2e-6, 3.5e-6

# Of what its data sheet promises an H200 reaches these shares: 4.0 of 4.8 TB/s in our kernels of whole maps, 690 of 989
# TFLOP/s in a product of 8192. Cards that nobody measured are taken to reach the same.
_BANDWIDTH, _PRODUCTS = 4.0 / 4.8, 690 / 989
_PACE = 132 * 1.98  # multiprocessors times GHz


def _from_data_sheet(bandwidth: float, products: float, processors: int, gigahertz: float) -> Gpu:
    """TB/s, TFLOP/s in bfloat16 with float32 sums, multiprocessors, boost clock."""
    return Gpu(
        bandwidth * 1e12 * _BANDWIDTH,
        products * 1e12 * _PRODUCTS,
        processors * gigahertz / _PACE,
        "from its data sheet, not measured",
    )


GPUS = {
    "h200": Gpu(4.0e12, 690e12, 1.0, "measured"),
    "h100": _from_data_sheet(3.35, 989, 132, 1.98),  # SXM
    "a100": _from_data_sheet(2.04, 312, 108, 1.41),  # SXM, 80 GB
    "rtx-4090": _from_data_sheet(1.01, 165, 128, 2.52),
}


def gpu_named(name: str) -> Gpu:
    """The card of that name; ValueError for one that is not in the table."""
    if name not in GPUS:
        raise ValueError(f"--gpu {name}: choose one of {', '.join(GPUS)}")
    return GPUS[name]
