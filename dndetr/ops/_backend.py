"""Which implementation of an op runs, and why: every op asks here, and ``python -m dndetr.doctor`` repeats the answers.

An op registers its fast backends in order of preference; ``reference`` (the specification in plain torch, or scipy) is
always there. What is asked for explicitly (argument, ``DNDETR_BACKEND_<OP>``, ``DNDETR_BACKEND``) runs or raises; only
``auto`` falls back.
The first use of a fast backend compares it with the reference on a tiny case. Answers are kept for the process.
"""

import contextlib
import importlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..context import float32_by_default

NAMES = ("auto", "reference", "cpp", "cuda", "triton")


@dataclass(frozen=True)
class Backend:
    """One fast implementation of an op.

    ``devices`` are the device types ``auto`` takes it for (none named: all); ``obstacle(device_type)`` says why it
    cannot run there, or gives None; ``self_test(device_type)`` returns its largest error against the reference, sound
    up to ``tolerance``.
    """

    name: str
    devices: tuple[str, ...]
    obstacle: Callable[[str], str | None]
    self_test: Callable[[str], float]
    tolerance: float


@dataclass(frozen=True)
class Finding:
    """What is known of one backend on one device type: usable when ``problem`` is None."""

    backend: str
    problem: str | None
    error: float | None = None


_backends: dict[str, tuple[Backend, ...]] = {}
_findings: dict[tuple[str, str, str], Finding] = {}
_decisions: dict[tuple[str, str | None, str], tuple[str, str]] = {}


def register(op: str, *backends: Backend) -> None:
    """Declare the fast backends of an op, the preferred one first."""
    _backends[op] = backends


def operations() -> tuple[str, ...]:
    """Names of the registered ops."""
    return tuple(_backends)


# Dynamo takes the answer as a constant of the trace, so the self-test never becomes part of a graph. Nor is it traced
# whether this is an export, which torch 2.11 and 2.12 would answer with yes under torch.compile.
@torch.compiler.assume_constant_result
def choose(op: str, requested: str | None = None, device_type: str = "cpu") -> tuple[str, str]:
    """The backend that ``op`` runs on tensors of ``device_type`` -> (backend, reason).

    Raises ValueError for a name the op does not know, RuntimeError if an explicitly requested backend cannot run.
    The environment is read once per op; ``forget()`` makes it be read again.
    """
    if plain_torch_only():
        return "reference", "exports, traces and transforms keep to plain torch"
    key = (op, requested, device_type)
    if key not in _decisions:
        _decisions[key] = _resolve(op, requested, device_type)
    return _decisions[key]


def plain_torch_only() -> bool:
    """Whether torch exports, traces or transforms what runs now, and can do so with plain operations alone.

    torch.export and torch.jit.trace, and ONNX by either; torch.fx; vmap, grad and the rest of torch.func; derivatives
    forwards.
    """
    return (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def forget() -> None:
    """Drop every kept answer and self-test (for tests that change the environment)."""
    _decisions.clear()
    _findings.clear()


@contextlib.contextmanager
def assumed(device_type: str):
    """Within, every op takes its best backend for such devices, or what the environment asks for, untested.

    For tensors without values, of which nothing is computed.
    """
    kept = dict(_decisions)
    _decisions.clear()
    for op, backends in _backends.items():
        best = next((backend.name for backend in backends if device_type in backend.devices), "reference")
        asked, source = _request(op, None)
        _decisions[op, None, device_type] = (best, "assumed") if asked == "auto" else (asked, f"asked for by {source}")
    try:
        yield
    finally:
        _decisions.clear()
        _decisions.update(kept)


def check_environment() -> None:
    """ValueError for a ``DNDETR_BACKEND...`` variable that names no op, or no backend of it."""
    for variable in os.environ:
        op = variable.removeprefix("DNDETR_BACKEND_")
        if op != variable and op.lower() not in _backends:
            raise ValueError(f"{variable}: there is no such op, only {', '.join(_backends).upper()}")
    for op in _backends:
        _request(op, None)


def _resolve(op: str, requested: str | None, device_type: str) -> tuple[str, str]:
    name, source = _request(op, requested)
    if name == "reference":
        return "reference", f"asked for by {source}"
    if name != "auto":
        finding = _examine(op, next(b for b in _backends[op] if b.name == name), device_type)
        if finding.problem:
            raise RuntimeError(
                f"{op}: backend {name!r} (asked for by {source}) cannot run on {device_type} tensors: {finding.problem}"
            )
        return name, f"asked for by {source}"
    problems = []
    for backend in _backends[op]:
        if backend.devices and device_type not in backend.devices:
            continue
        finding = _examine(op, backend, device_type)
        if finding.problem is None:
            return backend.name, "; ".join([*problems, f"fastest that runs here, self-test error {finding.error:.1e}"])
        problems.append(f"{backend.name}: {finding.problem}")
    return "reference", "; ".join(problems) or f"{op} has no faster backend for {device_type} tensors"


def _request(op: str, requested: str | None) -> tuple[str, str]:
    """The backend that is asked for, and by whom; ValueError for one that the op does not have."""
    variables = (f"DNDETR_BACKEND_{op.upper()}", "DNDETR_BACKEND")
    asked = [(requested, "the backend argument"), *((os.environ.get(name), name) for name in variables)]
    name, source = next(((name, source) for name, source in asked if name), ("auto", "default"))
    known = ("auto", "reference", *(backend.name for backend in _backends[op]))
    if name in known:
        return name, source
    if name not in NAMES or source != "DNDETR_BACKEND":
        raise ValueError(f"{source}: {op} has no backend {name!r}, choose one of {', '.join(known)}")
    # One variable for all ops cannot name a backend that every op has: it binds those that have it.
    return "auto", f"DNDETR_BACKEND={name} does not concern {op}"


def examine(op: str, device_type: str) -> list[Finding]:
    """What is known of every fast backend of ``op`` on ``device_type``, self-tests run."""
    return [_examine(op, backend, device_type) for backend in _backends[op]]


def _examine(op: str, backend: Backend, device_type: str) -> Finding:
    key = (op, backend.name, device_type)
    if key not in _findings:
        _findings[key] = _test(op, backend, device_type)
    return _findings[key]


def _test(op: str, backend: Backend, device_type: str) -> Finding:
    problem = backend.obstacle(device_type)
    if problem is not None:
        return Finding(backend.name, problem)
    try:
        error = _apart(backend.self_test, device_type)
    except Exception as failure:
        error, problem = float("nan"), f"self-test failed: {type(failure).__name__}: {failure}"
    else:
        if not error <= backend.tolerance:
            problem = f"self-test error {error:.1e} exceeds {backend.tolerance:.1e}"
    if problem:
        warnings.warn(f"dndetr: {op} cannot use its {backend.name} backend on {device_type}: {problem}", stacklevel=2)
    return Finding(backend.name, problem, error)


def _apart(self_test: Callable[[str], float], device_type: str) -> float:
    """What the self-test returns, whatever the caller of its op is in the middle of.

    A thread of its own has none of the caller's modes (inference, autocast, fake tensors, traces and transforms, hooks
    of saved tensors, a default device). What all threads share is set aside: the default dtype, and deterministic mode,
    in which torch refuses what references may do.
    """
    current = torch.cuda.current_device() if device_type == "cuda" and torch.cuda.is_available() else None

    def run() -> float:
        if current is not None:
            torch.cuda.set_device(current)
        with torch.no_grad():
            return float(self_test(device_type))

    with float32_by_default(), _not_deterministic(), ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def differentiable_once(op: str) -> None:
    """Second derivatives of ``dndetr::<op>``, which has no formula for them, are an error that names the way out."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"{op} can be differentiated once; with backend='reference' as often as you like")

    torch.library.register_autograd(f"dndetr::{op}_backward", refuse)


def worst(errors: Iterable[float]) -> float:
    """The largest of them, NaN if one is: Python's max loses a NaN that does not come first."""
    return torch.tensor(list(errors), dtype=torch.float64).max().item()


def largest_error(found: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor]) -> float:
    """The largest difference of results from what they should be, NaN if one is; the same infinities do not differ."""
    errors = [
        torch.where(result == exact, 0, (result.double() - exact.double()).abs()).max()
        for result, exact in zip(found, wanted, strict=True)
    ]
    return torch.stack(errors).max().item()


def error_beyond_rounding(found: Iterable[torch.Tensor], exact: Iterable[torch.Tensor]) -> float:
    """The largest error of results, each relative to the largest number of the float64 ones that they should be.

    What rounding to the result's dtype explains is left out, so that one tolerance serves all dtypes. NaN if one is.
    """
    errors = []
    for result, wanted in zip(found, exact, strict=True):
        size = wanted.abs()
        beyond = (result.double() - wanted).abs() - torch.finfo(result.dtype).eps * size
        errors.append(beyond.clamp_min(0).max() / size.max())
    return torch.stack(errors).max().item()


@contextlib.contextmanager
def _not_deterministic():
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def build_info() -> dict:
    """The record that the build left beside the extension; empty if nothing was ever built here."""
    path = Path(__file__).parents[1] / "_build_info.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def compiled():
    """The compiled module ``dndetr._C``; ImportError if it was not built."""
    return importlib.import_module("dndetr._C")


def extension_obstacle(*functions: str) -> str | None:
    """Why ``dndetr._C`` cannot serve these functions, or None."""
    try:
        module = compiled()
    except ImportError as failure:
        record = build_info()
        if not record:
            return "dndetr._C was not built (type: pip install -e .)"
        if record["built"]:
            return f"dndetr._C does not load: {failure}"
        return f"dndetr._C was not built: {record['reason']}"
    missing = [name for name in functions if not hasattr(module, name)]
    if missing:
        return f"dndetr._C was built without {', '.join(missing)}: {build_info().get('cuda_reason', 'an older build')}"
    return None


def triton_obstacle(device_type: str) -> str | None:
    """Why Triton kernels cannot run on tensors of this device type, or None."""
    try:
        import triton
    except ImportError as failure:
        return f"triton does not import: {failure}"
    if triton.knobs.runtime.interpret:
        return None
    if device_type != "cuda":
        return "Triton kernels need a GPU (TRITON_INTERPRET=1, set before start, runs them on the CPU, slowly)"
    return None if torch.cuda.is_available() else "torch sees no GPU"


def cuda_obstacle(*functions: str, index: int | None = None) -> str | None:
    """Why compiled CUDA code cannot serve these functions, on the current GPU if none is named, or None."""
    if obstacle := extension_obstacle(*functions):
        return obstacle
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip:
        return "CUDA code does not run on AMD's GPUs"
    capability, archs = torch.cuda.get_device_capability(index), build_info()["archs"]
    if any(_runs(arch, capability) for arch in archs):
        return None
    return f"compiled for {' '.join(archs)}, of which a GPU of {'.'.join(map(str, capability))} runs none"


def _runs(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code compiled for an architecture such as 8.0, 9.0a or 12.0+PTX runs on a GPU of this capability."""
    number, ptx, _ = arch.partition("+PTX")
    major, minor = (int(part.rstrip("af")) for part in number.split("."))
    if number.endswith("a"):
        return (major, minor) == capability
    later = ptx and not number.endswith("f")
    return (major, minor) <= capability if later else major == capability[0] and minor <= capability[1]


DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def pointer(tensor: torch.Tensor) -> tuple[int, int]:
    """A tensor's memory, as compiled code takes it: its address and the number of its dtype."""
    return tensor.data_ptr(), DTYPES[tensor.dtype]


def addresses(*tensors: torch.Tensor | None) -> list[int]:
    """Where each tensor begins, 0 for none."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def cuda_stream(tensor: torch.Tensor) -> tuple[int, int]:
    """Where compiled CUDA code is to run, as it takes it: device index and handle of that device's current stream."""
    index = tensor.get_device()
    return index, torch.cuda.current_stream(index).cuda_stream
