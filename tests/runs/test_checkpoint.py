"""Atomic files and checkpoints: the last good file survives whatever happens to the next one."""

import argparse
import json
import os
import pickle
import zipfile
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch

from dndetr.files import write_atomic, write_json_atomic
from dndetr.runs.checkpoint import load_checkpoint, save_checkpoint


def checkpoint(fill: float, numbers: int = 10) -> dict:
    return {"model": {"weight": torch.full((numbers,), fill)}, "step": 3, "config": {"lr": 1e-4}, "classes": [[1, "a"]]}


def test_bytes_and_writers_replace_the_file(tmp_path: Path):
    path = tmp_path / "file"
    write_atomic(path, b"one")
    write_atomic(path, lambda file: file.write(b"two"))
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["file"]


def test_new_files_have_the_usual_permissions(tmp_path: Path):
    (tmp_path / "plain").write_bytes(b"")
    write_atomic(tmp_path / "atomic", b"")
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "atomic").stat().st_mode


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_failing_writer_leaves_the_old_file(tmp_path: Path, error: BaseException):
    path = tmp_path / "file"
    write_atomic(path, b"good")

    def fail(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        write_atomic(path, fail)
    assert path.read_bytes() == b"good"
    assert os.listdir(tmp_path) == ["file"]


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path, full_disk):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, checkpoint(1.0))
    with pytest.raises(OSError, match=r"cannot write .*checkpoint\.pt: File too large.*unchanged"):
        save_checkpoint(path, checkpoint(2.0, numbers=100_000))
    assert load_checkpoint(path)["model"]["weight"].unique().item() == 1.0
    with pytest.raises(OSError, match=r"cannot write .*best\.pt: File too large$"):
        save_checkpoint(tmp_path / "best.pt", checkpoint(2.0, numbers=100_000))
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_missing_output_folder_is_an_error(tmp_path: Path):
    with pytest.raises(OSError, match="No such file or directory"):
        save_checkpoint(tmp_path / "nowhere" / "checkpoint.pt", checkpoint(1.0))


def test_round_trip_by_file_and_by_run_folder(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    saved = checkpoint(1.0) | {"rng": generator.get_state(), "ema": None, "epoch": 2}
    save_checkpoint(tmp_path / "checkpoint.pt", saved)
    for path in (tmp_path, str(tmp_path / "checkpoint.pt")):
        loaded = load_checkpoint(path, needs=("model", "rng", "classes"))
        assert loaded.keys() == saved.keys()
        assert torch.equal(loaded["rng"], saved["rng"]) and loaded["classes"] == [[1, "a"]]


def test_missing_file_names_what_is_there(tmp_path: Path):
    save_checkpoint(tmp_path / "best.pt", checkpoint(1.0))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*checkpoint\.pt: that folder has best\.pt"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="check the path"):
        load_checkpoint(tmp_path / "nowhere" / "x.pt")


def damaged(kind: str, path: Path) -> None:
    if kind == "zip of something else":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("hello.txt", "hello")
    elif kind == "code":
        torch.save({"model": os.system}, path)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint")
    else:
        torch.save(checkpoint(1.0, numbers=10_000), path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "zip of something else", "code"])
def test_damaged_and_foreign_files_say_so_in_one_line(tmp_path: Path, kind: str):
    path = tmp_path / "checkpoint.pt"
    damaged(kind, path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read as a checkpoint") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value) and "PyTorch 2.6" not in str(caught.value)


def test_dicts_without_the_needed_keys_are_refused(tmp_path: Path):
    path = tmp_path / "resnet.pt"
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"has no 'model' \(it starts with conv1\.weight\).*--init FILE"):
        load_checkpoint(path)
    assert "conv1.weight" in load_checkpoint(path, needs=())
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list"):
        load_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "beside",
    [np.float64(0.7), np.arange(3), Path("a/b"), PureWindowsPath("c:/b"), argparse.Namespace(at=Path("a"))],
    ids=["number", "array", "path", "windows path", "namespace"],
)
def test_harmless_values_beside_the_weights_are_read(tmp_path: Path, beside, zipped: bool):
    torch.save({"model": {"w": torch.ones(2)}, "x": beside}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    read = load_checkpoint(tmp_path / "w.pth")
    assert str(read["x"]) == str(beside).replace("PosixPath", "PurePosixPath") and read["model"]["w"].sum() == 2


class Foreign:
    pass


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("content", [torch.nn.Linear(2, 2), {"model": {}, "x": [Foreign()]}], ids=["module", "value"])
def test_values_that_would_run_code_are_named(tmp_path: Path, content, zipped: bool):
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    kind = type(content["x"][0] if isinstance(content, dict) else content)
    name = f"{kind.__module__}.{kind.__name__}"
    with pytest.raises(
        ValueError, match=r"w\.pth .*holds more than .*torch\.save\(model\.state_dict\(\), FILE\)"
    ) as told:
        load_checkpoint(tmp_path / "w.pth")
    assert f"plain values, {name};" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_pickles_and_programs_are_called_what_they_are(tmp_path: Path, protocol: int):
    path = tmp_path / "w.pkl"
    for content, made in (({"a": 1}, "plain values"), (Foreign(), f"{Foreign.__module__}.Foreign")):
        path.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(ValueError, match="save the weights alone") as told:
            load_checkpoint(path)
        refused = protocol == 2 and made != "plain values"  # by torch, which reads this protocol
        what = (
            "it holds more than tensors and plain values,"
            if refused
            else "it is a pickle that torch.save did not write, of"
        )
        assert f"{what} {made};" in str(told.value)
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(2)), path)
    with pytest.raises(ValueError, match="it is a TorchScript program; save the weights alone"):
        load_checkpoint(path)


def test_half_a_file_of_the_older_format_is_cut_short(tmp_path: Path):
    torch.save(checkpoint(1.0, numbers=10_000), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:20_000])
    with pytest.raises(ValueError, match="it is cut short"):
        load_checkpoint(tmp_path / "w.pth")


def test_json_stays_valid(tmp_path: Path):
    write_json_atomic(tmp_path / "a.json", [{"x": 1.5, "name": "é"}])
    assert json.loads((tmp_path / "a.json").read_text()) == [{"x": 1.5, "name": "é"}]
    with pytest.raises(ValueError):
        write_json_atomic(tmp_path / "a.json", [float("nan")])
    assert json.loads((tmp_path / "a.json").read_text())
