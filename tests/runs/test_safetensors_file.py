"""Safetensors files: others', and ours, which say whose weights they have."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dndetr import __version__
from dndetr.runs.checkpoint import load_checkpoint, save_checkpoint

CONFIG = {"data": "m\udcf6bel", "lr": 1e-4, "model": {"width": 8, "frozen": None}}  # a name of bytes that are no UTF-8


def checkpoint(**changes) -> dict:
    weights = {"weight": torch.arange(6.0), "steps": torch.tensor(3)}
    beside = {"config": CONFIG, "classes": [[1, "a"], [2**40, "猫"]], "step": 7, "epoch": 2, "metrics": {"AP": 0.5}}
    return {"model": weights, "ema": None, **beside, **changes}


def header(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewritten(path: Path, metadata: dict) -> Path:
    save_file(checkpoint()["model"], path, metadata)
    return path


def test_it_is_the_checkpoint_it_was_made_of(tmp_path):
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, checkpoint())
    read, saved = load_checkpoint(path), checkpoint()
    assert list(read) == list(saved) and read.keys() - {"model"} == saved.keys() - {"model"}
    assert {name: read[name] for name in read if name != "model"} == {n: saved[n] for n in saved if n != "model"}
    assert read["model"].keys() == saved["model"].keys()
    assert all(torch.equal(value, saved["model"][name]) for name, value in read["model"].items())
    assert json.loads(header(path)["dndetr"])["version"] == __version__ and os.listdir(tmp_path) == ["best.safetensors"]
    again = tmp_path / "again.safetensors"
    save_checkpoint(again, read)
    assert again.read_bytes() == path.read_bytes()


def test_the_average_is_what_it_has(tmp_path):
    average = {"weight": torch.ones(2), "steps": torch.tensor(1)}
    save_checkpoint(tmp_path / "a.safetensors", checkpoint(ema=average, optimizer={"state": torch.ones(1)}))
    read = load_checkpoint(tmp_path / "a.safetensors")
    assert torch.equal(read["model"]["weight"], torch.ones(2)) and read["ema"] is None and "optimizer" not in read


def test_tensors_of_every_form(tmp_path):
    base = torch.arange(24.0)
    weights = {
        "whole": base,
        "part of the same memory": base[3:9],
        "the same memory": base.view(4, 6),
        "transposed": base.view(4, 6).t(),
        "spread": base[::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.rand(2)),
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(5),
        **{str(kind): torch.ones(3, dtype=kind) for kind in (torch.bfloat16, torch.float16, torch.float64, torch.bool)},
    }
    save_checkpoint(tmp_path / "a.safetensors", checkpoint(model=weights))
    read = load_checkpoint(tmp_path / "a.safetensors")["model"]
    assert read.keys() == weights.keys()
    for name, value in weights.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value), name


def test_others_files_are_weights_alone(tmp_path):
    for metadata in (None, {"format": "pt"}, {"else": "{}"}):
        path = rewritten(tmp_path / "model.safetensors", metadata)
        assert load_checkpoint(path, needs=()).keys() == {"weight", "steps"}
        with pytest.raises(ValueError, match=r"is not a dndetr checkpoint: it has no 'model'.*--init FILE"):
            load_checkpoint(path)


def told(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_damaged_files_say_so_in_one_line(tmp_path):
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, checkpoint())
    whole = path.read_bytes()
    for size in (len(whole) - 4, len(whole) - 30):
        path.write_bytes(whole[:size])
        assert "is a damaged safetensors file" in told(path)
    for size in (0, 4, 8, 100):
        path.write_bytes(whole[:size])
        assert "it is cut short or of another kind: copy it again" in told(path)
    path.write_bytes(whole[:9] + b"!" * 20 + whole[29:])
    assert "is a damaged safetensors file" in told(path)
    path.write_bytes(whole[:8] + b"!" + whole[9:])
    assert "it is cut short or of another kind" in told(path)


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        '{"config": {}}',
        '{"classes": []}',
        '{"config": 3, "classes": []}',
        '{"config": {}, "classes": 3}',
        '{"config": {}, "classes": [3]}',
        '{"config": {}, "classes": [["a", 1]]}',
        '{"config": {}, "classes": [[1, "a", 2]]}',
    ],
)
def test_a_header_that_says_nothing_of_the_weights_is_refused(text, tmp_path):
    path = rewritten(tmp_path / "best.safetensors", {"dndetr": text})
    assert "its header should have under 'dndetr', as JSON, the configuration and classes" in told(path)


def test_a_header_brings_no_tensors_and_no_state(tmp_path):
    about = {"config": {}, "classes": [], "model": {}, "ema": {}, "optimizer": {}}
    read = load_checkpoint(rewritten(tmp_path / "best.safetensors", {"dndetr": json.dumps(about)}))
    assert read.keys() == {"model", "ema", "config", "classes"} and read["ema"] is None and len(read["model"]) == 2


def test_a_full_disk_keeps_the_last_one(tmp_path, full_disk):
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, checkpoint())
    large = checkpoint(model={"weight": torch.zeros(100_000)})
    with pytest.raises(OSError, match=r"cannot write .*best\.safetensors: File too large; the file .* unchanged$"):
        save_checkpoint(path, large)
    assert load_checkpoint(path)["step"] == 7 and os.listdir(tmp_path) == ["best.safetensors"]


def test_a_missing_file_names_what_is_there(tmp_path):
    save_checkpoint(tmp_path / "best.safetensors", checkpoint())
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*\.pt: that folder has best\.safetensors"):
        load_checkpoint(tmp_path)
