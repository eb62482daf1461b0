import importlib.util
import json
import shutil
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def build(root):
    """dndetr/_build.py the way setup.py loads it."""
    spec = importlib.util.spec_from_file_location("dndetr_build", root / "dndetr" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


def program(folder, name, text="#!/bin/sh\nexit 1\n"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    return str(folder / name)


def test_mode(build):
    assert build.build_mode({}) == build.build_mode({"DNDETR_BUILD": ""}) == "auto"
    assert build.build_mode({"DNDETR_BUILD": "none"}) == "none"
    with pytest.raises(build.BuildError, match="DNDETR_BUILD='gpu' is not one of auto, cpu, cuda, none"):
        build.build_mode({"DNDETR_BUILD": "gpu"})


def test_compilers_are_found_in_order(build, tmp_path):
    clang, nvcc = program(tmp_path / "bin", "clang++"), program(tmp_path / "cuda" / "bin", "nvcc")
    path = {"PATH": str(tmp_path / "bin")}
    assert build.find_compiler(path) == clang
    assert build.find_compiler({**path, "CXX": "absent"}) is None
    assert build.find_nvcc({**path, "CUDA_HOME": str(tmp_path / "cuda")}) == nvcc
    assert build.find_nvcc({**path, "CUDA_HOME": str(tmp_path)}) is None
    gcc = program(tmp_path / "bin", "g++")
    assert build.find_compiler(path) == gcc


@pytest.mark.parametrize(
    ("text", "archs"),
    [("8.0;9.0+PTX", ["8.0", "9.0+PTX"]), ("80, 90a", ["8.0", "9.0a"]), ("12.0", ["12.0"]), ("120", ["12.0"])],
)
def test_archs_are_read(build, text, archs):
    assert build.parse_archs(text) == archs


def test_wrong_arch_is_an_error(build):
    with pytest.raises(build.BuildError, match="'hopper' is not an architecture"):
        build.parse_archs("8.0;hopper")


def test_archs_are_chosen_with_a_reason(build):
    supported = ["7.5", "8.0", "9.0", "12.0"]
    assert build.choose_archs({"DNDETR_CUDA_ARCHS": "8.6"}, ["9.0"], supported) == (["8.6"], "DNDETR_CUDA_ARCHS")
    assert build.choose_archs({}, ["9.0", "9.0"], supported) == (["9.0"], "the visible GPU")
    assert build.choose_archs({}, [], supported) == (
        ["8.0", "9.0", "12.0+PTX"],
        "the default list (no GPU is visible)",
    )
    assert build.choose_archs({}, ["8.0", "7.5"], supported) == (["7.5", "8.0"], "the visible GPU")
    with pytest.raises(build.BuildError, match="DNDETR_CUDA_ARCHS"):
        build.choose_archs({}, [], ["5.0"])


def test_a_gpu_that_nvcc_does_not_know_is_left_out_and_named(build):
    supported = ["7.5", "8.0", "9.0", "12.0"]
    without = "this nvcc does not compile for the visible GPU of 7.0"
    assert build.choose_archs({}, ["7.0", "8.0"], supported) == (["8.0"], f"the visible GPU; {without}")
    archs, reason = build.choose_archs({}, ["7.0"], supported)
    assert archs[-1] == "12.0+PTX" and reason == f"the default list ({without})"
    assert build.choose_archs({}, ["7.0", "13.0"], supported)[1].endswith(" of 7.0 and 13.0)")


def test_arch_flags(build):
    assert build.arch_flags(["8.0", "9.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


@pytest.mark.parametrize(
    ("mode", "nvcc", "sources", "yes", "reason"),
    [
        ("auto", "/bin/nvcc", ["a.cu"], True, "/bin/nvcc"),
        ("cuda", "/bin/nvcc", ["a.cu"], True, "/bin/nvcc"),
        ("auto", None, ["a.cu"], False, "nvcc was not found"),
        ("auto", "/bin/nvcc", [], False, "no .cu file"),
        ("cpu", "/bin/nvcc", ["a.cu"], False, "DNDETR_BUILD=cpu"),
    ],
)
def test_cuda_decision(build, mode, nvcc, sources, yes, reason):
    decision, why = build.decide_cuda(mode, nvcc, sources, "there is no NVIDIA driver")
    assert decision is yes and reason in why


def test_cuda_asked_for_and_not_there_is_an_error(build):
    with pytest.raises(build.BuildError, match=r"DNDETR_BUILD=cuda: nvcc was not found .* from PyPI: no driver"):
        build.decide_cuda("cuda", None, ["a.cu"], "no driver")


@pytest.mark.parametrize(
    ("mode", "nvcc", "driver", "archs", "compiler", "yes", "reason"),
    [
        ("auto", None, "580.159.04", ["9.0"], "g++", True, "a driver (580.159.04) is here and no nvcc"),
        ("cuda", None, "610.2", ["9.0"], "g++", True, "610.2"),
        ("auto", "/bin/nvcc", "580.159.04", ["9.0"], "g++", False, "nvcc is here: /bin/nvcc"),
        ("auto", None, None, [], "g++", False, "no NVIDIA driver"),
        ("cuda", None, None, [], "g++", False, "no NVIDIA driver"),
        ("auto", None, "550.54.15", ["9.0"], "g++", False, "from 580 on, this is 550.54.15"),
        ("auto", None, "580.159.04", ["9.0"], None, False, "no C++ compiler"),
        ("auto", None, "580.159.04", ["7.0"], "g++", False, "for GPUs from 7.5 on, here are 7.0"),
        ("auto", None, "580.159.04", ["7.0", "8.6"], "g++", True, "from PyPI"),
        ("cpu", None, "580.159.04", ["9.0"], "g++", False, "DNDETR_BUILD=cpu"),
        ("none", None, "580.159.04", ["9.0"], "g++", False, "DNDETR_BUILD=none"),
    ],
)
def test_the_compiler_comes_from_pypi_only_where_a_driver_is_and_no_nvcc(
    build, mode, nvcc, driver, archs, compiler, yes, reason
):
    decision, why = build.decide_toolkit(mode, nvcc, driver, archs, compiler)
    assert decision is yes and reason in why


DRIVER = '#!/bin/sh\ncase "$*" in *driver_version*) echo 580.159.04 ;; *compute_cap*) echo 9.0 ;; esac\n'


@pytest.mark.parametrize("driver", [True, False])
def test_what_pip_is_told_that_a_build_needs(build, root, tmp_path, driver):
    """As pip asks: in a process of its own, for wheels and for editable installs."""
    gcc = program(tmp_path / "bin", "g++")
    if driver:
        program(tmp_path / "bin", "nvidia-smi", DRIVER)
    hooks = "b.get_requires_for_build_wheel(), b.get_requires_for_build_editable()"
    code = f"import build_backend as b\nfor needs in ({hooks}): print('needs', *needs)"
    env = {"PATH": str(tmp_path / "bin"), "CUDA_HOME": str(tmp_path), "PYTHONPATH": str(root), "CXX": gcc}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("needs")]  # setuptools tells what it does
    assert len(told) == 2
    for line in told:
        assert all((f"{name}==13.0.*" in line) == driver for name in build.TOOLKIT)


def test_a_fetched_compiler_is_found_and_its_libraries_are_named(build, tmp_path):
    nvcc = program(tmp_path / "nvidia" / "cu13" / "bin", "nvcc")
    assert build.find_toolkit([str(tmp_path / "elsewhere"), str(tmp_path)]) == nvcc
    assert build.find_toolkit([str(tmp_path / "elsewhere")]) is None
    record = build.Record("auto", cuda=True, compiler="/bin/g++", nvcc=nvcc, archs=["9.0"], sources=["a.cu"])
    for record.toolkit in (True, False):
        text = build.ninja_file(record, tmp_path, tmp_path / "_C.so", [], tmp_path)
        assert (f"-L{tmp_path / 'nvidia' / 'cu13' / 'lib'}" in text) == record.toolkit


@needs_compiler
def test_a_build_without_an_environment_says_what_to_install(build, tmp_path, monkeypatch):
    program(tmp_path / "bin", "nvidia-smi", DRIVER)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(build, "find_toolkit", lambda: None)
    env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "CUDA_HOME": str(tmp_path / "nowhere")}
    record = build.build(small_cuda_sources(tmp_path), tmp_path / "_C.so", tmp_path / "work", env)
    assert not record.cuda and "type: pip install nvidia-cuda-nvcc==13.0.* nvidia-nvvm==13.0.*" in record.cuda_reason
    # One that lies around is not taken where the driver is too old for what it makes.
    program(tmp_path / "bin", "nvidia-smi", DRIVER.replace("580.159.04", "550.54.15"))
    monkeypatch.setattr(build, "find_toolkit", lambda: "/nowhere/nvcc")
    record = build.build(tmp_path / "csrc", tmp_path / "_C.so", tmp_path / "work", env)
    assert not record.cuda and "drivers from 580 on, this is 550.54.15" in record.cuda_reason


@pytest.mark.slow
@needs_compiler
def test_cuda_files_compile_and_link_with_pypis_compiler(build, tmp_path, monkeypatch):
    packages = [f"{name}=={build.TOOLKIT_VERSION}" for name in build.TOOLKIT]
    fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), *packages]
    if subprocess.run(fetch, capture_output=True).returncode != 0:
        pytest.skip("pip has no CUDA compiler for this machine")
    program(tmp_path / "bin", "nvidia-smi", DRIVER)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "CUDA_HOME": str(tmp_path / "nowhere")}
    record = build.build(small_cuda_sources(tmp_path), tmp_path / "_C.so", tmp_path / "work", env)
    assert record.built and record.cuda and record.toolkit, record
    assert record.nvcc.startswith(str(tmp_path)) and "from PyPI" in record.cuda_reason and record.archs == ["9.0"]
    assert loaded(tmp_path / "_C.so").fill


def test_no_instruction_set_is_fixed_at_build_time(build):
    assert not any(flag.startswith("-m") for flag in build.compile_flags(True))
    assert "-fopenmp" not in build.compile_flags(False)


def test_without_a_compiler_auto_records_why_and_cpu_fails(build, root, tmp_path):
    target = tmp_path / "dndetr" / "_C.so"
    target.parent.mkdir()
    target.write_text("left from an older build")
    record = build.build(root / "csrc", target, tmp_path / "work", {"PATH": str(tmp_path)})
    assert not record.built and "no C++ compiler" in record.reason
    assert not target.exists()
    assert json.loads((tmp_path / "dndetr" / build.RECORD).read_text())["reason"] == record.reason
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.build(root / "csrc", target, tmp_path / "work", {"PATH": str(tmp_path), "DNDETR_BUILD": "cpu"})


@needs_compiler
def test_broken_source_is_recorded_with_the_compilers_words(build, tmp_path):
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "broken.cpp").write_text("#error broken on purpose\n")
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    record = build.build(csrc, tmp_path / "_C.so", tmp_path / "work", env)
    assert not record.built and "broken on purpose" in record.reason


@needs_compiler
def test_a_failing_cuda_build_leaves_the_cpu_part(build, tmp_path):
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "fine.cpp").write_text("int fine() { return 1; }\n")
    (csrc / "kernel.cu").write_text("")
    script = "#!/bin/sh\n[ $1 = --list-gpu-arch ] && echo compute_90 && exit\necho ptxas is unhappy >&2\nexit 1\n"
    nvcc = program(tmp_path / "cuda" / "bin", "nvcc", script)
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "CUDA_HOME": str(tmp_path / "cuda")}
    record = build.build(csrc, tmp_path / "_C.so", tmp_path / "work", env)
    assert record.built and not record.cuda and "ptxas is unhappy" in record.cuda_reason
    assert record.sources == ["fine.cpp"] and record.nvcc == nvcc and record.archs == ["9.0+PTX"]
    with pytest.raises(build.BuildError, match="ptxas is unhappy"):
        build.build(csrc, tmp_path / "_C.so", tmp_path / "work", {**env, "DNDETR_BUILD": "cuda"})


def small_cuda_sources(folder):
    """A kernel and its binding."""
    csrc = folder / "csrc"
    csrc.mkdir()
    (csrc / "fill.cu").write_text(
        "__global__ void fill(float* x) { x[threadIdx.x] = 1; }\n"
        "void launch(float* x, void* stream) { fill<<<1, 32, 0, (cudaStream_t)stream>>>(x); }\n"
    )
    (csrc / "bindings.cpp").write_text(
        "#include <pybind11/pybind11.h>\nvoid launch(float*, void*);\n"
        'PYBIND11_MODULE(_C, m) { m.def("fill", [](size_t x) { launch((float*)x, nullptr); }); }\n'
    )
    return csrc


def loaded(path):
    """The module, which loads without a GPU's driver: the runtime is inside."""
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_compiler
def test_cuda_files_compile_and_link_where_nvcc_is(build, tmp_path):
    if build.find_nvcc({"PATH": "/usr/local/bin:/usr/bin:/bin"}) is None:
        pytest.skip("no nvcc")
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "DNDETR_BUILD": "cuda", "DNDETR_CUDA_ARCHS": "9.0"}
    record = build.build(small_cuda_sources(tmp_path), tmp_path / "_C.so", tmp_path / "work", env)
    assert record.built and record.cuda and "DNDETR_CUDA_ARCHS" in record.cuda_reason
    assert not record.toolkit and loaded(tmp_path / "_C.so").fill
