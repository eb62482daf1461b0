"""``python -m dndetr.doctor``: what is installed, what was built and why, and which implementation every op takes.

Exit status 0 if every backend that can run here agrees with its reference, 1 otherwise. ``--json`` prints one object.
"""

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from . import __version__
from .output import unfailing

PACKAGES = ("torch", "triton", "numpy", "scipy", "pycocotools", "pillow")


def examine() -> dict:
    """Everything the command prints, as plain values: versions, devices, environment, build, ops, healthy."""
    import torch

    from .ops import _backend

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    ops = [_examine_op(_backend, op, device) for op in _backend.operations() for device in devices]
    simd = None if _backend.extension_obstacle("simd") else _backend.compiled().simd()
    return {
        "versions": {
            "dndetr": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "cpu": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "simd": simd,
        },
        "gpus": [_examine_gpu(_backend, index) for index in range(torch.cuda.device_count())],
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("DNDETR_")},
        "build": _backend.build_info(),
        "ops": ops,
        "healthy": all(op["error"] is None and not op["failed"] for op in ops),
    }


def _examine_gpu(backends, index: int) -> dict:
    """One row: what a GPU is, why compiled CUDA code does not run there if so, and what Triton's products can be."""
    import torch

    from .ops import _attention

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "architecture": properties.gcnArchName if torch.version.hip else f"{properties.major}.{properties.minor}",
        "no_cuda": backends.cuda_obstacle("ms_deform_attn_cuda", index=index),
        "tf32": _attention.has_tf32(torch.device("cuda", index)),
    }


def _examine_op(backends, op: str, device: str) -> dict:
    """One row: the choice on one device type, what is said of every fast backend, and what failed."""
    findings = backends.examine(op, device)
    row = {
        "op": op,
        "device": device,
        "backends": {f.backend: {"problem": f.problem, "self_test_error": f.error} for f in findings},
        # A self-test that ran and did not pass; a backend that is merely absent has no error to show.
        "failed": [f.backend for f in findings if f.problem is not None and f.error is not None],
        "chosen": None,
        "reason": None,
        "error": None,
    }
    try:
        row["chosen"], row["reason"] = backends.choose(op, None, device)
    except (RuntimeError, ValueError) as failure:
        row["error"] = str(failure)
    return row


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def lines(report: dict) -> list[tuple[str, str]]:
    """The report as (heading, text) pairs, one a line."""
    build = report["build"]
    out = [(name, found or "not installed") for name, found in report["versions"].items()]
    cpu = report["cpu"]
    vectors = cpu["simd"] or "unknown (nothing compiled)"
    out.append(("cpu", f"{cpu['machine']}, {cpu['cores']} cores, torch uses {cpu['threads']}, vectors {vectors}"))
    for index, gpu in enumerate(report["gpus"]):
        native = f"no CUDA ops: {gpu['no_cuda']}" if gpu["no_cuda"] else "CUDA ops run on it"
        products = "" if gpu["tf32"] else "; Triton has no TF32 for it, attention multiplies plain float32"
        out.append((f"gpu {index}", f"{gpu['name']}, {gpu['architecture']}: {native}{products}"))
    if not report["gpus"]:
        out.append(("gpu", "torch sees none"))
    out += [(name, value) for name, value in report["environment"].items()]
    if build:
        out.append(("build", f"{'built' if build['built'] else 'NOT built'}: {build['reason']}"))
        out.append(("build cuda", f"{'on' if build['cuda'] else 'off'}: {build['cuda_reason'] or build['reason']}"))
        out.append(("build openmp", "on" if build["openmp"] else "off"))
    else:
        out.append(("build", "no record: nothing was ever built here (type: pip install -e .)"))
    for row in report["ops"]:
        out.append((f"{row['op']} on {row['device']}", row["error"] or f"{row['chosen']}: {row['reason']}"))
        for name, finding in row["backends"].items():
            if name != row["chosen"] and finding["problem"] and finding["problem"] not in (row["reason"] or ""):
                out.append(("", f"not {name}: {finding['problem']}"))
    out.append(("verdict", "all self-tests passed" if report["healthy"] else "something is wrong, see above"))
    return out


@unfailing()
def main(arguments: list[str] | None = None) -> int:
    """Print the report; 0 if healthy."""
    parser = argparse.ArgumentParser(prog="python -m dndetr.doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one object")
    try:
        as_json = parser.parse_args(arguments).json
    except SystemExit as end:
        return end.code
    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, box=None)
        for heading, text in lines(report):
            table.add_row(Text(heading, style="bold"), Text(text))
        Console().print(table)
    else:
        for heading, text in lines(report):
            print(f"{heading:<28} {text}")
    return 0 if report["healthy"] else 1


if __name__ == "__main__":
    sys.exit(main())
