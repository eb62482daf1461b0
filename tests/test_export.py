"""The export command: every variant as ONNX and torch.export, compared with the model, whole or not at all."""

import errno
import importlib.util
import json
import logging
import os
import re
import shutil
from dataclasses import replace

import detectors
import pytest
import torch
from PIL import Image
from short_runs import short_run, write_pictures

from dndetr import export
from dndetr.config import Config, ImagesConfig
from dndetr.detector import Detector
from dndetr.model_config import BackboneConfig
from dndetr.models.build import build_model
from dndetr.ops import _backend, images_of
from dndetr.scoring.coco import Detections

_BACKBONE = BackboneConfig(blocks=(1, 1), planes=(8, 8), bottleneck=False, outputs=(2,))
_ONE = replace(detectors.CONFIGS["dn-detr"], encoder_layers=1, decoder_layers=2, queries=6, backbone=_BACKBONE)
_TWO = replace(_ONE, variant="dn-deformable-detr", levels=2, backbone=replace(_BACKBONE, outputs=(1, 2)))
VARIANTS = {
    "dn-detr": _ONE,
    "dn-deformable-detr": _TWO,
    "dn-deformable-encoder": replace(_TWO, variant="dn-deformable-encoder", patterns=2, decoder_layers=1),
}
CLASSES = [(number, f"class {number}") for number in (2, 3, 5, 7, 11)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread_and_no_trace():
    torch.set_num_threads(1)
    trace = logging.getLogger("torch.__trace")  # pytest would keep it, which doubles the time
    trace.disabled = True
    yield
    trace.disabled = False


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    pictures = write_pictures(folder / "pictures")
    small = ["--model.encoder-layers", "0", "--model.decoder-layers", "1", "--model.queries", "5"]
    return short_run(folder / "run", "--data", str(pictures), "--images.canvas", "64", "96", *small)


def built(variant: str, seed: int = 0) -> Detector:
    torch.manual_seed(seed)
    config = Config(model=VARIANTS[variant], images=ImagesConfig(recipe="original"), detections=8)
    model = build_model(config.model, len(CLASSES))
    for parameter in model.parameters():  # heads that start at zero corrections would hide much
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else None
    return Detector(model, config, CLASSES, "cpu", "float32")


@pytest.mark.parametrize(
    "variant", ["dn-detr", *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name != "dn-detr")]
)
def test_every_variant_does_what_the_model_does(variant, extension):
    detector = built(variant)
    batch = detectors.make_batch([1, 1], 8, canvas=(32, 48))
    assert _backend.choose("ms_deform_attn")[0] != "reference", "the comparison would be with itself"
    program = export.exported_program(detector, batch)
    assert not any("dndetr" in str(node.target) for node in program.graph.nodes)
    calls = [program.module()]
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        calls.append(export.to_onnx(program, {})[1])
    wider = detectors.make_batch([1] * 5, 8, canvas=(32, 48))
    for call in calls:
        assert "on 3 images" in export.verify(detector, call, batch)
        assert [output.shape for output in call(images_of(wider), wider.sizes)] == [(5, 8), (5, 8), (5, 8, 4)]
    other = built(variant, seed=1)
    for call in calls:
        with pytest.raises(RuntimeError, match="does not do what the model does"):
            export.verify(other, call, batch)


def test_differences_of_every_kind_are_seen_and_ties_are_not():
    scores, labels = torch.tensor([0.9, 0.5, 0.5, 0.1, 0.1]), torch.tensor([0, 1, 2, 0, 1])
    boxes = torch.arange(20.0).view(5, 4) / 20
    given = Detections(scores, labels, boxes)

    def errors(**changed):
        values, compared = export.difference(given, given._replace(**changed))
        assert compared == 3
        return values.tolist()

    assert errors() == [0, 0]
    swapped = [0, 2, 1, 3, 4]
    assert errors(labels=labels[swapped], boxes_xyxy=boxes[swapped]) == [0, 0]
    lowest_moved = boxes * torch.tensor([1, 1, 1, 9, 9])[:, None]
    assert errors(labels=torch.tensor([0, 1, 2, 4, 4]), boxes_xyxy=lowest_moved)[1] == 0
    assert errors(labels=torch.tensor([1, 1, 2, 0, 1]))[1] == float("inf")
    assert errors(boxes_xyxy=boxes + 0.01)[1] == pytest.approx(0.01, rel=1e-4)
    assert errors(scores=scores + torch.tensor([0.01, 0, 0, 0, 0]))[0] == pytest.approx(0.01, rel=1e-4)
    assert export.difference(given, given._replace(scores=scores * float("nan")))[0].isnan().any()


def test_torch_file_from_the_command_line(run, tmp_path, capsys):
    file = tmp_path / "model.pt2"
    assert export.main([str(run), "--output", str(file)]) == 0
    out = capsys.readouterr().out
    assert "the same as the model" in out and "[batch, 3, 64, 96], any batch" in out
    extra = {"dndetr.json": ""}
    program = torch.export.load(file, extra_files=extra).module()
    about = json.loads(extra["dndetr.json"])
    assert [entry["name"] for entry in about["classes"]] == ["cell", "dust", "hair"] and about["canvas"] == [64, 96]
    scores, labels, boxes = program(torch.zeros(4, 3, 64, 96), torch.tensor([[64, 96]] * 4))
    assert scores.shape == labels.shape == (4, 15) and boxes.shape == (4, 15, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt2"]


@pytest.mark.slow
def test_the_snippet_of_the_documentation_runs(root, run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    photo = run.parent / "pictures" / "val" / "4.jpg"
    assert export.main([str(run), "--output", "model.onnx", "--image", str(photo)]) == 0
    # Of the canvas's size: the data pipeline decodes large files at less than full size, the snippet does not.
    Image.open(photo).convert("RGB").resize((96, 64)).save("photo.jpg")
    (snippet,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "export.md").read_text(), flags=re.S)
    capsys.readouterr()
    exec(snippet.replace("> 0.5", "> 0.0"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15 and {line.split()[0] for line in lines} == {"cell", "dust", "hair"}
    from dndetr import load

    detector = load(run, "cpu")
    detector.precision = torch.float32  # that of the exported file
    (expected,) = detector.predict("photo.jpg", threshold=0.0)
    assert float(lines[0].split()[1]) == pytest.approx(expected.scores[0].item(), abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "a.bin"], "end the name in .onnx or .pt2"),
        (["--output", "there.pt2"], "already there"),
        (["--output", "nowhere/a.pt2"], "no folder nowhere"),
        (["--output", "a.pt2", "--canvas", "32", "32"], "resizes every image to (64, 96)"),
        (["--output", "a.pt2", "--image", "none.jpg"], "no such image"),
        (["--output", "a.pt2", "--format", "tflite"], "--format"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(run, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.pt2").touch()
    assert export.main([str(run), *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt2"]


def test_a_file_that_differs_or_a_missing_package_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    original = export.to_torch

    def wrong(*arguments):
        content, call = original(*arguments)
        return content, lambda images, sizes: call(images + 1, sizes)

    monkeypatch.setattr(export, "to_torch", wrong)
    assert export.main([str(run), "--output", str(tmp_path / "a.pt2")]) == 1
    assert "does not do what the model does" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    assert export.main([str(run), "--output", str(tmp_path / "a.onnx")]) == 1
    assert capsys.readouterr().err == 'error: ONNX needs onnxscript: pip install -e ".[onnx]"\n'
    assert not any(tmp_path.iterdir())


def test_data_that_is_gone_asks_for_an_image(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    checkpoint["config"]["data"] = "gone"
    torch.save(checkpoint, tmp_path / "run" / "checkpoint.pt")
    assert export.main([str(tmp_path / "run"), "--output", str(tmp_path / "a.pt2")]) == 1
    assert "--image FILE" in capsys.readouterr().err


def test_the_first_image_that_can_be_read_is_compared_on(run, tmp_path):
    data = shutil.copytree(run.parent / "pictures", tmp_path / "data")
    (data / "val" / "0.jpg").write_bytes((data / "val" / "0.jpg").read_bytes()[:300])
    config = Config(data=str(data))
    assert export._validation_image(config) == data / "val" / "1.jpg"
    for image in (data / "val").iterdir():
        image.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"0\.jpg: .*; give another image to compare on: --image FILE"):
        export._validation_image(config)


def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dndetr.files.os.fsync", full)
    file = tmp_path / "a.pt2"
    assert export.main([str(run), "--output", str(file)]) == 1
    assert capsys.readouterr().err == f"error: cannot write {file}: No space left on device\n"
    assert not any(tmp_path.iterdir())
