import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dndetr import __main__ as cli
from dndetr import doctor
from dndetr.ops import _backend


def test_json_report_names_every_op(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"assign", "match_cost"} <= {row["op"] for row in report["ops"]}
    assert all(row["chosen"] and row["reason"] for row in report["ops"])
    assert report["versions"]["torch"] and report["healthy"]


def test_plain_report(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^assign on cpu +\w+: ", out, re.M)
    assert re.search(r"^build cuda? .+: .+", out, re.M) or "no record" in out
    assert out.rstrip().endswith("all self-tests passed")


V100, T4, A100, H200, RTX5090 = (
    SimpleNamespace(name=name, major=major, minor=minor)
    for name, major, minor in (
        ("Tesla V100", 7, 0), ("Tesla T4", 7, 5), ("NVIDIA A100", 8, 0), ("NVIDIA H200", 9, 0), ("RTX 5090", 12, 0)
    )
)  # fmt: skip
MI300 = SimpleNamespace(name="AMD Instinct MI300X", major=9, minor=4, gcnArchName="gfx942")


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        (V100, "Tesla V100, 7.0: no CUDA ops: compiled for 7.5 9.0a 9.0 10.0+PTX, of which a GPU of 7.0 runs none; "),
        (T4, "Tesla T4, 7.5: CUDA ops run on it; Triton has no TF32 for it, attention multiplies plain float32"),
        (A100, "NVIDIA A100, 8.0: no CUDA ops: compiled for 7.5 9.0a 9.0 10.0+PTX, of which a GPU of 8.0 runs none"),
        (H200, "NVIDIA H200, 9.0: CUDA ops run on it"),
        (RTX5090, "RTX 5090, 12.0: CUDA ops run on it"),
        (MI300, "AMD Instinct MI300X, gfx942: no CUDA ops: CUDA code does not run on AMD's GPUs; Triton has no TF32 "),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_each_gpu_is_named_with_what_it_takes(gpu, said, monkeypatch):
    report = doctor.examine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (gpu.major, gpu.minor))
    monkeypatch.setattr(torch.version, "hip", "7.0" if gpu is MI300 else None)
    monkeypatch.setattr(_backend, "extension_obstacle", lambda *functions: None)
    monkeypatch.setattr(_backend, "build_info", lambda: {"archs": ["7.5", "9.0a", "9.0", "10.0+PTX"]})
    report["gpus"] = [doctor._examine_gpu(_backend, 0)]
    assert dict(doctor.lines(report))["gpu 0"].startswith(said)


def test_a_wrong_backend_is_an_exit_status(fresh_backends, monkeypatch, capsys):
    monkeypatch.setitem(_backend._backends, "assign", (
        _backend.Backend("cpp", ("cpu",), lambda device: None, lambda device: 3.0, tolerance=0.0),
    ))  # fmt: skip
    with pytest.warns(UserWarning, match="assign cannot use its cpp backend"):
        assert doctor.main([]) == 1
    assert "self-test error 3.0e+00" in capsys.readouterr().out


def test_a_request_that_cannot_be_met_is_reported(fresh_backends, monkeypatch, capsys):
    monkeypatch.setenv("DNDETR_BACKEND_ASSIGN", "quick")
    assert doctor.main([]) == 1
    assert "DNDETR_BACKEND_ASSIGN" in capsys.readouterr().out


def test_settings_are_shown_on_a_terminal_as_they_are(monkeypatch, capsys):
    monkeypatch.setenv("DNDETR_GOLDEN", r"/a\[red]b[/x]")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    doctor.main([])
    assert r"/a\[red]b[/x]" in capsys.readouterr().out


def test_unknown_option_is_a_usage_error(capsys):
    assert doctor.main(["--jsno"]) == 2
    assert "usage" in capsys.readouterr().err


def test_commands_dispatch(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dndetr", "doctor", "--json"])
    assert cli.main() == 0
    assert json.loads(capsys.readouterr().out)["healthy"]


@pytest.mark.parametrize(
    ("arguments", "message"), [(["trian"], "did you mean train"), (["xyzzy"], "choose one of"), ([], "usage")]
)
def test_wrong_command_is_an_error_that_helps(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dndetr", *arguments])
    assert cli.main() == 2
    assert message in "".join(capsys.readouterr())


def test_every_command_has_its_file(root):
    for command in cli.COMMANDS:
        assert (root / "dndetr" / f"{command}.py").is_file(), command


def test_python_dash_m(root):
    out = subprocess.run([sys.executable, "-m", "dndetr", "--help"], cwd=root, capture_output=True, check=True).stdout
    assert b"doctor" in out


def test_environment_page_is_in_step_with_the_source(root):
    folders = ("dndetr", "kernels", "tests", "benchmarks")
    files = [root / "setup.py", *(file for folder in folders for file in (root / folder).rglob("*.py"))]
    used = {name for file in files for name in re.findall(r"DNDETR_[A-Z_]*[A-Z]", file.read_text())}
    used = {"DNDETR_BACKEND_<OP>" if name.startswith("DNDETR_BACKEND_") else name for name in used}
    listed = set(re.findall(r"^\| `(DNDETR_[A-Z_]+(?:<OP>)?)` \|", (root / "docs" / "env.md").read_text(), re.M))
    assert used == listed
