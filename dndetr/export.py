"""``python -m dndetr.export RUN_OR_CHECKPOINT``: a detector as one ONNX or torch.export file, or for transformers."""

import importlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro

from . import __version__, _process  # noqa: F401
from .commandline import ModelPath, PresetName, program
from .demands import demand
from .files import demand_file, demand_new_folder, making, new_folder, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from .batch import Batch
    from .detector import Detector

INPUTS, OUTPUTS = ("images", "sizes"), ("scores", "labels", "boxes_xyxy")
_TOLERANCE = 1e-3  # of scores and of boxes in shares of the image; float32 programs were seen to differ by 1e-6
_SUFFIXES = {".onnx": "onnx", ".pt2": "torch"}


@dataclass(frozen=True)
class Arguments:
    """One export."""

    model: ModelPath
    output: Path | None = None
    """New file to write, such as model.onnx or model.pt2."""
    to: Annotated[tuple[Literal["transformers"], Path] | None, tyro.conf.arg(metavar="transformers DIR")] = None
    """Instead: a new folder that transformers reads without dndetr, as DAB-DETR or Deformable DETR."""
    format: Literal["onnx", "torch"] | None = None
    """ONNX or torch.export (default: as the file's name ends)."""
    image: Path | None = None
    """Image on which the file is compared with the model (default: the first validation image of the run's data)."""
    canvas: tuple[int, int] | None = None
    """Height and width of the input (default: the run's canvas, or what the image needs)."""
    preset: PresetName = None


def run(arguments: Arguments) -> None:
    """Export as the arguments say; the file or folder is there, whole and compared with the model, or not at all."""
    output = arguments.output
    if (output is None) == (arguments.to is None):
        raise ValueError("give a new file, --output model.onnx or model.pt2, or a new folder, --to transformers DIR")
    if arguments.to is not None:
        _to_transformers(arguments, arguments.to[1])
        return
    kind = arguments.format or _SUFFIXES.get(output.suffix)
    if kind is None:
        raise ValueError(f"--output {output}: end the name in .onnx or .pt2, or add --format onnx or --format torch")
    with making(output, "give another --output"):
        if output.exists():
            raise FileExistsError(f"--output {output} is already there: give a new file")
    if not output.parent.exists():
        raise FileNotFoundError(f"--output {output}: there is no folder {output.parent}")
    demand_file(output, "give another --output")
    if kind == "onnx":
        _demand_onnx()
    # Imported here so that --help and mistakes in the flags answer at once.
    from .detector import load

    detector = load(arguments.model, "cpu", preset=arguments.preset)
    batch = prepare(detector, arguments.image, arguments.canvas)
    about = describe(detector, batch.canvas)
    program = exported_program(detector, batch)
    content, call = (to_onnx if kind == "onnx" else to_torch)(program, about)
    print(f"the same as the model: {verify(detector, call, batch)}")
    write_atomic(output, content)
    height, width = about["canvas"]
    print(f"{output}: {len(content) / 1e6:.1f} MB, images [batch, 3, {height}, {width}], any batch")


def _to_transformers(arguments: Arguments, folder: Path) -> None:
    from .transformers_installed import require_transformers

    demand(arguments.format is None, "format", arguments.format, "no format with --to transformers")
    demand_new_folder(folder)
    require_transformers("--to transformers")
    from .detector import load
    from .hf.written_config import to_transformers
    from .hub import DETECTORS
    from .runs.model_card import model_card
    from .runs.scores import scores_of
    from .runs.written_detector import in_transformers, write_detector

    detector = load(arguments.model, "cpu", preset=arguments.preset)
    config, classes, model = detector.config, detector.classes, detector.model
    to_transformers(config, classes)  # what cannot be written is told before anything is computed
    batch = prepare(detector, arguments.image, arguments.canvas)
    with new_folder(folder) as unfinished:
        kind = write_detector(unfinished, model.state_dict(), config, classes)["model_type"]
        card = model_card(folder.resolve().name, kind, DETECTORS[kind], config, classes, scores_of(arguments.model))
        write_atomic(unfinished / "README.md", card.encode())
        call = in_transformers(unfinished, config.detections)
        own = compare(detector, call, batch)
        eps, model.decoder.eps = model.decoder.eps, 1e-5
        print(f"the same as the model in transformers: {verify(detector, call, batch, 1e-4)}")
        model.decoder.eps = eps
    if eps != 1e-5:
        print(f"the run's own --model.box-eps {eps:g}, which transformers has not: {own}")
    print(f"{folder}: {DETECTORS[kind]} for transformers, {len(classes)} classes")


def _demand_onnx() -> None:
    missing = []
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ModuleNotFoundError(f'ONNX needs {", ".join(missing)}: pip install -e ".[onnx]"')


def prepare(detector: "Detector", image: Path | None, canvas: tuple[int, int] | None) -> "Batch":
    """The image, by default the first validation image of the run's data, and its mirror image, on one canvas."""
    from .data.collate import collate
    from .data.training import evaluation_transform
    from .data.user_images import UserImages

    config = detector.config
    data = UserImages([_validation_image(config) if image is None else image], evaluation_transform(config))
    sample = data.sample(0)
    if canvas is not None:
        if data.canvas not in (None, canvas):
            raise ValueError(f"--canvas {canvas}: the run resizes every image to {data.canvas}; leave out --canvas")
        if any(side > most for side, most in zip(sample.size, canvas, strict=True)):
            raise ValueError(f"--canvas {canvas}: the image becomes {sample.size}; give that much or another --image")
    multiple = detector.model.backbone.multiple
    if canvas is not None and any(side % multiple for side in canvas):
        raise ValueError(f"--canvas {canvas}: give multiples of {multiple}, which the backbone needs")
    mirrored = replace(sample, pixels=sample.pixels[:, ::-1])
    return collate([sample, mirrored], config.images.multiple, canvas or data.canvas)


def _validation_image(config):
    """The first validation image of the run's data that can be read: its file, or its pixels if it is built in."""
    from .data.errors import UnreadableImage
    from .data.image import read_image
    from .data.shapes import MIN_SIZE, render
    from .data.training import source_of

    if config.data == "shapes":
        return render("val", 0, MIN_SIZE)[0].transpose(1, 2, 0)
    if config.data is None:
        raise ValueError("there is no data to take an image to compare on from: --image FILE")
    try:
        records = source_of(config).read("val")
        unreadable = []
        for path in map(records.path, range(len(records))):
            try:
                read_image(path)
            except UnreadableImage as error:
                unreadable.append(error)
            else:
                return path
        raise unreadable[0]
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; give another image to compare on: --image FILE") from error


def describe(detector: "Detector", canvas: tuple[int, int]) -> dict:
    """What whoever runs the file has to know, in JSON's types; it travels in the file."""
    images = detector.config.images
    if detector.config.data == "shapes" or images.recipe == "fixed":
        resize = "stretch to the canvas"
    elif images.recipe == "official":
        sides = f"short side to {images.eval_size}, long side at most {images.max_size}"
        resize = f"{sides}; top left on the canvas, then 0"
    else:
        resize = "none; top left on the canvas, then 0"
    return {
        "dndetr": __version__,
        "variant": detector.config.model.variant,
        "classes": detector.named_classes,
        "canvas": list(canvas),
        "resize": f"{resize} (bilinear, antialiased)",
        "colours": "RGB in [0, 1], minus mean, over std",
        "mean": list(images.mean),
        "std": list(images.std),
        "inputs": {
            "images": "float32 [batch, 3, height, width]",
            "sizes": "int64 [batch, 2] height and width of each image on the canvas",
        },
        "outputs": {
            "scores": "float32 [batch, k] in [0, 1], descending",
            "labels": "int64 [batch, k] places in classes",
            "boxes_xyxy": "float32 [batch, k, 4] in shares of the image's width and height",
        },
    }


def exported_program(detector: "Detector", batch: "Batch"):
    """The detector with its post-processing as a ``torch.export.ExportedProgram``, ops in plain torch, any batch size.

    (images [B, 3, H, W] float32, sizes [B, 2] int64) -> scores [B, k], labels [B, k], boxes_xyxy [B, k, 4] in [0, 1].
    """
    import torch

    from .ops import images_of
    from .scoring.coco import postprocess

    class Deployed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = detector.model

        def forward(self, images, sizes):
            logits, boxes = self.model.predict(images, sizes)
            return tuple(postprocess(logits, boxes, torch.ones_like(sizes), detector.config.detections))

    any_batch = {0: torch.export.Dim("batch", min=1)}
    with torch.no_grad():
        inputs = (images_of(batch).contiguous(), batch.sizes)  # in the layout that callers have
        return torch.export.export(Deployed().eval(), inputs, dynamic_shapes=(any_batch, any_batch))


def to_torch(program, about: dict) -> tuple[bytes, Callable]:
    """A .pt2 file's content, with ``about`` as its extra file dndetr.json, and a function that runs it."""
    import torch

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that share memory, none of which are on a GPU
        torch.export.save(program, file, extra_files={"dndetr.json": json.dumps(about)})
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


def to_onnx(program, about: dict) -> tuple[bytes, Callable]:
    """An ONNX file's content, with ``about`` as its metadata "dndetr", and a function that runs it by onnxruntime."""
    import onnxruntime
    import torch

    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    try:
        registration.setLevel(logging.ERROR)  # it would warn of operators of packages that are not used
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Not optimised: the rewriter names two constants alike where clamps follow each other (onnxscript 0.7),
            # and runtimes optimise for themselves.
            exported = torch.onnx.export(
                program, input_names=INPUTS, output_names=OUTPUTS, dynamo=True, optimize=False, verbose=False
            )
    finally:
        registration.setLevel(level)
    model = exported.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = "dndetr", json.dumps(about)
    content = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns of casts that it could fold on other devices
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def call(*inputs):
        given = {name: tensor.numpy() for name, tensor in zip(INPUTS, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(list(OUTPUTS), given)]

    return content, call


class Compared(NamedTuple):
    """How far an exported program is from the model: largest differences of scores and of boxes [2], over so many."""

    errors: "Tensor"
    detections: int

    def __str__(self) -> str:
        scores, boxes = self.errors
        return f"{self.detections} detections on 3 images, scores within {scores:.1e}, boxes within {boxes:.1e}"


def compare(detector: "Detector", call: Callable, batch: "Batch") -> Compared:
    """An exported program and the model on the batch and on its first image alone."""
    import torch

    from .ops import images_of
    from .scoring.coco import Detections, postprocess

    errors, compared = torch.zeros(2), 0
    both = images_of(batch).contiguous()
    for count in (1, 2):
        images, sizes = both[:count], batch.sizes[:count]
        logits, boxes = detector.model.predict(images, sizes)
        expected = postprocess(logits, boxes, torch.ones_like(sizes), detector.config.detections)
        found = Detections(*call(images, sizes))
        for one, other in zip(zip(*expected, strict=True), zip(*found, strict=True), strict=True):
            differences, pairs = difference(Detections(*one), Detections(*other))
            errors, compared = torch.maximum(errors, differences), compared + pairs
    return Compared(errors, compared)


def verify(detector: "Detector", call: Callable, batch: "Batch", tolerance: float = _TOLERANCE) -> str:
    """What ``compare`` finds, in words; RuntimeError where the two differ."""
    found = compare(detector, call, batch)
    if not (found.errors <= tolerance).all() or found.detections == 0:
        raise RuntimeError(f"what is exported does not do what the model does ({found}); nothing was written")
    return str(found)


def difference(expected, found) -> tuple:
    """Largest differences of scores and of boxes between two results for one image [2], and the detections compared.

    Each detection is looked for among those of its class. Equal scores may come in any order, and which of them the
    limit of k detections cuts off is chance: those near the lowest score are left out.
    """
    import torch

    score_error = (expected.scores - found.scores).abs().max()
    margin = 2 * score_error + 1e-6
    scores, labels, boxes = (field[expected.scores > expected.scores.min() + margin] for field in expected)
    near = (scores[:, None] - found.scores).abs() <= margin
    candidates = near & (labels[:, None] == found.labels)
    distance = (boxes[:, None] - found.boxes_xyxy).abs().amax(-1)
    distance = distance.masked_fill(~candidates, float("inf")).amin(1)
    box_error = distance.max() if len(distance) else score_error
    return torch.stack((score_error, box_error)), len(distance)


main = program(Arguments, run, "export", __doc__)


if __name__ == "__main__":
    sys.exit(main())
