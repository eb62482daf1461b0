import importlib.util
import json
import shutil
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
        ["7.5", "8.0", "9.0", "12.0+PTX"],
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
    decision, why = build.decide_cuda(mode, nvcc, sources)
    assert decision is yes and reason in why


def test_cuda_asked_for_and_not_there_is_an_error(build):
    with pytest.raises(build.BuildError, match="DNDETR_BUILD=cuda: nvcc was not found"):
        build.decide_cuda("cuda", None, ["a.cu"])


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


@needs_compiler
def test_cuda_files_compile_and_link_where_nvcc_is(build, tmp_path):
    if build.find_nvcc({"PATH": "/usr/local/bin:/usr/bin:/bin"}) is None:
        pytest.skip("no nvcc")
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "fill.cu").write_text(
        "__global__ void fill(float* x) { x[threadIdx.x] = 1; }\n"
        "void launch(float* x, void* stream) { fill<<<1, 32, 0, (cudaStream_t)stream>>>(x); }\n"
    )
    (csrc / "bindings.cpp").write_text(
        "#include <pybind11/pybind11.h>\nvoid launch(float*, void*);\n"
        'PYBIND11_MODULE(_C, m) { m.def("fill", [](size_t x) { launch((float*)x, nullptr); }); }\n'
    )
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "DNDETR_BUILD": "cuda", "DNDETR_CUDA_ARCHS": "9.0"}
    record = build.build(csrc, tmp_path / "_C.so", tmp_path / "work", env)
    assert record.built and record.cuda and "DNDETR_CUDA_ARCHS" in record.cuda_reason
    spec = importlib.util.spec_from_file_location("_C", tmp_path / "_C.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # loads without a GPU driver: the runtime is inside
    assert module.fill
