"""How the extension ``dndetr._C`` gets built: every decision is a function here, with its reason kept.

``setup.py`` loads this file by path, so it imports neither torch nor the rest of dndetr. The record of a build,
``_build_info.json`` beside the extension, is what ``python -m dndetr.doctor`` repeats.

``DNDETR_BUILD``: auto (what the machine can do; the default), cpu, cuda (both fail if they cannot), none.
``DNDETR_CUDA_ARCHS``: such as ``9.0`` or ``8.0;9.0+PTX``; else the visible GPUs; else a list ending in PTX.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

MODES = ("auto", "cpu", "cuda", "none")
# Binaries run on later GPUs of the same generation: 8.0 also serves 8.6 and 8.9. The kernels need 7.5, which is taken
# where such a GPU is visible: each architecture makes an install longer.
DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")
RECORD = "_build_info.json"
# CUDA's compiler on PyPI. One version for all of it; what it links runs with drivers of that major version and later.
TOOLKIT = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
TOOLKIT_VERSION, TOOLKIT_DRIVER, TOOLKIT_ARCH = "13.0.*", 580, 7.5


class BuildError(RuntimeError):
    """The build that was asked for is not possible here; the message says why."""


@dataclass
class Record:
    """What was decided and done, each with its reason."""

    mode: str
    built: bool = False
    cuda: bool = False
    reason: str = ""
    cuda_reason: str = ""
    compiler: str = ""
    nvcc: str = ""
    toolkit: bool = False  # nvcc came from PyPI
    archs: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    openmp: bool = False
    sources: list[str] = field(default_factory=list)
    python: str = platform.python_version()


def build_mode(env: Mapping[str, str]) -> str:
    """``DNDETR_BUILD``, checked."""
    mode = env.get("DNDETR_BUILD") or "auto"
    if mode not in MODES:
        raise BuildError(f"DNDETR_BUILD={mode!r} is not one of {', '.join(MODES)}")
    return mode


def find_compiler(env: Mapping[str, str]) -> str | None:
    """The C++ compiler: ``CXX`` if set, else g++, clang++ or c++ on the path."""
    names = [env["CXX"]] if env.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for name in names if (path := shutil.which(name, path=env.get("PATH")))), None)


def find_nvcc(env: Mapping[str, str]) -> str | None:
    """The CUDA compiler: below ``CUDA_HOME`` or ``CUDA_PATH`` if set, else on the path, else in /usr/local/cuda."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(variable):
            return shutil.which("nvcc", path=str(Path(env[variable], "bin")))
    return shutil.which("nvcc", path=env.get("PATH")) or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_toolkit(search: Sequence[str] | None = None) -> str | None:
    """The nvcc that PyPI's toolkit has installed in a folder of ``search``, by default where this Python looks."""
    places = (Path(folder, "nvidia", "cu13", "bin") for folder in (sys.path if search is None else search))
    return next((found for place in places if (found := shutil.which("nvcc", path=str(place)))), None)


def decide_toolkit(
    mode: str, nvcc: str | None, driver: str | None, archs: Sequence[str], compiler: str | None
) -> tuple[bool, str]:
    """Whether CUDA's compiler comes from PyPI -> (yes, reason).

    driver: the version of NVIDIA's, None without one; archs: of the visible GPUs.
    """
    if mode not in ("auto", "cuda"):
        return False, f"DNDETR_BUILD={mode}"
    if nvcc is not None:
        return False, f"nvcc is here: {nvcc}"
    if driver is None:
        return False, "there is no NVIDIA driver"
    if compiler is None:
        return False, "there is no C++ compiler"
    if platform.system() != "Linux":
        return False, f"{platform.system()} has no packages of it"
    if int(driver.partition(".")[0]) < TOOLKIT_DRIVER:
        return False, f"PyPI has it for drivers from {TOOLKIT_DRIVER} on, this is {driver}"
    if not any(float(arch) >= TOOLKIT_ARCH for arch in archs):
        return False, f"PyPI's compiles for GPUs from {TOOLKIT_ARCH} on, here are {' '.join(archs) or 'none'}"
    return True, f"from PyPI, since a driver ({driver}) is here and no nvcc"


def toolkit_decision(env: Mapping[str, str]) -> tuple[bool, str]:
    """``decide_toolkit`` for this machine."""
    return decide_toolkit(build_mode(env), find_nvcc(env), driver_version(), visible_archs(), find_compiler(env))


def requirements(env: Mapping[str, str]) -> list[str]:
    """What a build here needs beside pyproject.toml's list."""
    wanted, _ = toolkit_decision(env)
    return [f"{name}=={TOOLKIT_VERSION}" for name in TOOLKIT] if wanted else []


def driver_version() -> str | None:
    """Of NVIDIA's driver, as nvidia-smi tells it; None where there is none, or no GPU for it."""
    if shutil.which("nvidia-smi") is None:
        return None
    found = _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    versions = re.findall(r"^\d+\.[\d.]+$", found.stdout, re.M)
    return versions[0] if found.returncode == 0 and versions else None


def parse_archs(text: str) -> list[str]:
    """``8.0;9.0+PTX``, ``80,90`` or ``9.0a`` -> ["8.0", "9.0+PTX"], ..."""
    archs = []
    for word in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.?(\d[af]?)(\+PTX)?", word)
        if match is None:
            raise BuildError(f"DNDETR_CUDA_ARCHS={text!r}: {word!r} is not an architecture such as 9.0 or 9.0+PTX")
        archs.append(f"{match[1]}.{match[2]}{match[3] or ''}")
    return archs


def choose_archs(env: Mapping[str, str], visible: Sequence[str], supported: Sequence[str]) -> tuple[list[str], str]:
    """Architectures to compile for -> (archs, reason). ``visible`` GPUs and those the compiler has ``supported``."""
    if env.get("DNDETR_CUDA_ARCHS"):
        return parse_archs(env["DNDETR_CUDA_ARCHS"]), "DNDETR_CUDA_ARCHS"
    known = sorted({arch for arch in visible if arch in supported}, key=float)
    left_out = sorted(set(visible) - set(known), key=float)
    without = f"this nvcc does not compile for the visible GPU of {' and '.join(left_out)}" if left_out else ""
    if known:
        return known, "the visible GPU" + (f"; {without}" if without else "")
    archs = [arch for arch in DEFAULT_ARCHS if arch in supported]
    if not archs:
        raise BuildError(f"nvcc compiles for none of {', '.join(DEFAULT_ARCHS)}: set DNDETR_CUDA_ARCHS")
    return [*archs[:-1], f"{archs[-1]}+PTX"], f"the default list ({without or 'no GPU is visible'})"


def arch_flags(archs: Sequence[str]) -> list[str]:
    """nvcc flags of architectures as ``parse_archs`` gives them."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def compile_flags(openmp: bool) -> list[str]:
    """Flags of the C++ compiler. The instruction set is chosen at run time, so none is named here."""
    flags = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-ffp-contract=off"]
    flags.append("-fno-math-errno")  # nobody reads it, and a square root is one instruction without
    return [*flags, "-fopenmp"] if openmp else flags


def decide_cuda(mode: str, nvcc: str | None, cuda_sources: Sequence[str], toolkit: str) -> tuple[bool, str]:
    """Whether CUDA code is compiled -> (yes, reason). Raises BuildError where mode ``cuda`` cannot be had.

    toolkit: why PyPI's compiler was not taken, if there is none.
    """
    if mode == "cpu":
        return False, "DNDETR_BUILD=cpu"
    if not cuda_sources:
        obstacle = "csrc holds no .cu file"
    elif nvcc is None:
        obstacle = f"nvcc was not found (set CUDA_HOME, or put nvcc on PATH), nor taken from PyPI: {toolkit}"
    else:
        return True, f"compiled by {nvcc}"
    if mode == "cuda":
        raise BuildError(f"DNDETR_BUILD=cuda: {obstacle}")
    return False, obstacle


def ninja_file(record: Record, objects: Path, target: Path, includes: Sequence[str], csrc: Path) -> str:
    """The text of a build.ninja that compiles ``record.sources`` from ``csrc`` and links ``target``."""
    own = f"-I{_escape(csrc)}"  # an op's files name those of common/ from there
    includes = [own, *(f"-I{_escape(path)}" for path in includes)]
    flags = [*record.flags, *(["-DWITH_CUDA"] if record.cuda else []), *includes]
    link = ["-shared", *(["-fopenmp"] if record.openmp else [])]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    lines = [
        f"cxx = {_escape(record.compiler)}",
        f"flags = {' '.join(flags)}",
        "rule cxx\n  command = $cxx $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
    ]
    if record.cuda:
        host = f"-ccbin={_escape(record.compiler)}"
        cuda_flags = ["-O3", "-std=c++17", "-lineinfo", host, "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden", own]
        # nvcc links, since it knows where its runtime is; static, so that torch's CUDA version does not matter.
        # PyPI's has its libraries in lib, where it does not look itself.
        own_libraries = [f"-L{_escape(Path(record.nvcc).parents[1] / 'lib')}"] if record.toolkit else []
        link = ["-shared", "-cudart=static", *own_libraries, host, *(["-Xcompiler=-fopenmp"] if record.openmp else [])]
        lines += [
            f"nvcc = {_escape(record.nvcc)}",
            f"cuda_flags = {' '.join([*cuda_flags, *arch_flags(record.archs)])}",
            "rule nvcc\n  command = $nvcc $cuda_flags -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        ]
    lines.append(f"rule link\n  command = {'$nvcc' if record.cuda else '$cxx'} $in -o $out $link")
    built = []
    for source in record.sources:
        rule = "nvcc" if source.endswith(".cu") else "cxx"
        built.append(_escape(objects / f"{source}.o"))
        lines.append(f"build {built[-1]}: {rule} {_escape(csrc / source)}")
        if source == "bindings.cpp":  # which only hands arguments on: a third less to wait for
            lines.append(f"  flags = {' '.join(flags)} -O1")
    lines += [f"build {_escape(target)}: link {' '.join(built)}", f"  link = {' '.join(link)}", ""]
    return "\n".join(lines)


def _escape(path: str | Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def supports_openmp(compiler: str, folder: Path) -> bool:
    """Whether the compiler builds and links an OpenMP program."""
    source = folder / "openmp.cpp"
    source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    return _run([compiler, "-fopenmp", str(source), "-o", str(folder / "openmp")]).returncode == 0


def supported_archs(nvcc: str) -> list[str]:
    """Architectures that this nvcc compiles for."""
    listed = _run([nvcc, "--list-gpu-arch"]).stdout
    return [f"{major}.{minor}" for major, minor in re.findall(r"compute_(\d+)(\d)", listed)]


def visible_archs() -> list[str]:
    """Architectures of the GPUs that nvidia-smi lists; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    found = _run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    return re.findall(r"^\d+\.\d$", found.stdout, re.M) if found.returncode == 0 else []


def version(program: str) -> str:
    """First line with a number that ``program --version`` prints, after its path."""
    lines = [line for line in _run([program, "--version"]).stdout.splitlines() if re.search(r"\d+\.\d+", line)]
    return f"{program} ({lines[0].strip() if lines else 'unknown version'})"


def _run(command: Sequence[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def build(csrc: Path, target: Path, work: Path, env: Mapping[str, str] = os.environ) -> Record:
    """Compile ``csrc`` into ``target`` as far as the mode and the machine allow, and write the record beside it.

    Raises BuildError where ``DNDETR_BUILD`` names something that cannot be had; ``auto`` records why and goes on.
    """
    mode = build_mode(env)
    record = Record(mode)
    if mode == "none":
        record.reason = "DNDETR_BUILD=none"
    else:
        try:
            _plan(record, csrc, work, env)
            try:
                _compile(record, csrc, target, work)
            except BuildError as failure:
                if mode == "cuda" or not record.cuda:
                    raise
                record.cuda, record.cuda_reason = False, f"the CUDA build failed: {failure}"
                record.sources = [name for name in record.sources if not name.endswith(".cu")]
                _compile(record, csrc, target, work)
        except BuildError as failure:
            if mode != "auto":
                raise
            record.reason = str(failure)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not record.built:
        target.unlink(missing_ok=True)
    (target.parent / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n")
    return record


def _plan(record: Record, csrc: Path, work: Path, env: Mapping[str, str]) -> None:
    compiler, nvcc = find_compiler(env), find_nvcc(env)
    wanted, toolkit = toolkit_decision(env)
    # One that is there although it was not to be taken would make what this driver does not run.
    fetched = find_toolkit() if wanted else None
    if wanted and fetched is None:
        packages = " ".join(f"{name}=={TOOLKIT_VERSION}" for name in TOOLKIT)
        toolkit = f"this build has no environment of its own; type: pip install {packages}"
    if compiler is None:
        raise BuildError("no C++ compiler was found (install g++, or set CXX)")
    work.mkdir(parents=True, exist_ok=True)
    record.compiler = compiler
    record.openmp = supports_openmp(compiler, work)
    record.flags = compile_flags(record.openmp)
    record.sources = _sources(csrc, "*.cpp")
    cuda_sources = _sources(csrc, "*.cu")
    record.cuda, record.cuda_reason = decide_cuda(record.mode, nvcc or fetched, cuda_sources, toolkit)
    if record.cuda:
        nvcc = record.nvcc = nvcc or fetched
        record.toolkit = fetched is not None
        record.cuda_reason += f" ({toolkit})" if fetched else ""
        record.archs, why = choose_archs(env, visible_archs(), supported_archs(nvcc))
        record.cuda_reason += f" for {' '.join(record.archs)}: {why}"
        record.sources += cuda_sources


def _sources(csrc: Path, pattern: str) -> list[str]:
    """Files below ``csrc``, a folder per op, by their paths in it; what takes longest, the largest op, comes first."""

    def size(path: Path) -> int:
        parts = path.parent.iterdir() if path.parent != csrc else [path]
        return sum(part.stat().st_size for part in parts)

    found = sorted(csrc.rglob(pattern), key=lambda path: (-size(path), path))
    return [path.relative_to(csrc).as_posix() for path in found]


def _compile(record: Record, csrc: Path, target: Path, work: Path) -> None:
    import ninja
    import pybind11

    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        raise BuildError(f"Python.h is missing from {include} (install the Python development package)")
    target.parent.mkdir(parents=True, exist_ok=True)
    text = ninja_file(record, work.resolve(), target.resolve(), [pybind11.get_include(), include], csrc.resolve())
    (work / "build.ninja").write_text(text)
    done = _run([str(Path(ninja.BIN_DIR, "ninja")), "-C", str(work), "-j", str(min(os.cpu_count() or 1, 8))])
    if done.returncode != 0:
        raise BuildError(f"the compiler failed:\n{(done.stdout + done.stderr)[-4000:]}")
    record.built = True
    record.reason = f"compiled by {version(record.compiler)}"
