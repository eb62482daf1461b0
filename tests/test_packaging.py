"""What an install consists of: the wheel, the source distribution, and the folder names that must not leak."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

pytest.importorskip("pybind11")
pytest.importorskip("ninja")
COMPILES = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


def run(command, cwd, **env):
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree(root, tmp_path_factory):
    """A clean copy of the repository's sources, symlinks kept."""
    copy = tmp_path_factory.mktemp("tree") / "repository"
    copy.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json", "*.egg-info")
    for name in ("dndetr", "kernels", "csrc", "tests", "benchmarks", "docs"):
        shutil.copytree(root / name, copy / name, symlinks=True, ignore=ignore)
    for file in root.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    return copy


def build_distribution(tree, hook, mode):
    code = f"from setuptools import build_meta; print(build_meta.{hook}('dist'))"
    (tree / "dist").mkdir(exist_ok=True)
    return tree / "dist" / run([sys.executable, "-c", code], tree, DNDETR_BUILD=mode).splitlines()[-1]


@pytest.fixture(scope="module", params=["none", pytest.param("cpu", marks=[pytest.mark.slow, COMPILES])])
def mode(request):
    """What is compiled."""
    return request.param


@pytest.fixture(scope="module")
def wheel(tree, mode):
    return build_distribution(tree, "build_wheel", mode)


def test_wheel_holds_the_package_and_nothing_else(root, wheel, mode):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"dndetr"}
    folders = {path.parent.relative_to(root).as_posix() for path in (root / "dndetr").glob("*/*.py")} | {"dndetr"}
    assert {"dndetr/ops", "dndetr/models", "dndetr/training", "dndetr/kernels"} < folders
    for folder in folders:
        for file in (root / folder).glob("*.py"):
            assert f"{folder}/{file.name}" in names
    assert "dndetr/_build_info.json" in names
    assert any(name.startswith("dndetr/_C.") for name in names) == (mode == "cpu")


def test_every_module_of_the_wheel_can_be_imported(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import importlib, pkgutil, dndetr\n"
        "assert dndetr.__file__.startswith({site!r})\n"
        "found = [m.name for m in pkgutil.walk_packages(dndetr.__path__, 'dndetr.')]\n"
        "found += ['dndetr.kernels.' + m.name for m in pkgutil.iter_modules([dndetr.__path__[0] + '/kernels'])]\n"
        "for name in found:\n"
        "    if name not in ('dndetr.__main__', 'dndetr.hf.trainer', 'dndetr._C'): importlib.import_module(name)\n"
        "print(len(found))"
    )
    site = str(tmp_path / "site")
    out = run([sys.executable, "-c", code.format(site=site)], tmp_path, PYTHONPATH=site)
    assert int(out.split()[-1]) > 100


@pytest.mark.slow
@COMPILES
@pytest.mark.parametrize("mode", ["cpu"], indirect=True, scope="module")
def test_installed_wheel_runs_its_compiled_op(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import torch, dndetr; from dndetr.ops import assign; import dndetr.kernels.match_cost; print(dndetr.__file__);"
        "print(assign(1 - torch.eye(3)[None], torch.tensor([3], dtype=torch.int32), backend='cpp').tolist())"
    )
    where, query = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines()
    assert where.startswith(str(tmp_path)) and query == "[[0, 1, 2]]"


def test_wheel_without_compiled_code_still_builds_and_says_why(tree, tmp_path):
    wheel = build_distribution(tree, "build_wheel", "none")
    archive = zipfile.ZipFile(wheel)
    assert not any(name.startswith("dndetr/_C.") for name in archive.namelist())
    assert "DNDETR_BUILD=none" in archive.read("dndetr/_build_info.json").decode()


def test_source_distribution_can_be_built_from(root, tree, tmp_path):
    archive = build_distribution(tree, "build_sdist", "none")
    shutil.unpack_archive(archive, tmp_path)
    (source,) = tmp_path.iterdir()
    assert {path.name for path in (source / "csrc").iterdir()} == {path.name for path in (root / "csrc").iterdir()}
    for folder in ("csrc", "csrc/match", "kernels", "dndetr/kernels", "dndetr/ops"):
        ours = {file.name for file in (root / folder).glob("*.*") if file.is_file()}
        assert ours and ours <= {file.name for file in (source / folder).iterdir()}
    assert (source / "LICENSE").is_file() and not (source / "tests").exists()
    assert build_distribution(source, "build_wheel", "none").is_file()


def test_the_build_needs_no_torch(tree, tmp_path):
    blocker = tmp_path / "torch.py"
    blocker.write_text("raise ImportError('the build must not import torch')\n")
    code = "from setuptools import build_meta; build_meta.get_requires_for_build_wheel()"
    run([sys.executable, "-c", code], tree, PYTHONPATH=str(tmp_path), DNDETR_BUILD="none")


def test_an_installed_package_named_kernels_is_not_shadowed(root, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'the installed one'\n")
    # As with `python -m` or an interactive session: the current folder, the repository, comes first on the path.
    out = run([sys.executable, "-c", "import kernels; print(kernels.name)"], root, PYTHONPATH=str(tmp_path))
    assert out.strip() == "the installed one"
    assert not (root / "kernels" / "__init__.py").exists()
    assert (root / "dndetr" / "kernels").is_symlink()
