"""What a step of one of several processes asks of an H100, counted: ``python benchmarks/scale_counts.py``.

It writes ``scale_counts.json`` beside itself, in some minutes. For each preset: the buckets of gradients as
DistributedDataParallel makes them once it has seen in which order they come; for each number of images at once: seconds
on the device and kernels, up to the end of the forward pass, until each bucket is whole, and after the exchange. A
single process is counted too ("alone", seconds), whose step is captured and lowers all weights at once.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dndetr import _process  # noqa: F401 isort: skip  (before torch)
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dndetr.config import Config
from dndetr.counting.counter import Counted
from dndetr.counting.gpus import GAP, GPUS, LEAST
from dndetr.counting.step import count_step
from dndetr.files import write_json_atomic
from dndetr.models.build import build_model
from dndetr.presets import PRESETS

MODELS = ("dn-detr-r50", "dn-deformable-detr-r50", "dino-r50")
IMAGES = (1, 2, 4, 8, 16)  # at once; more are accumulated
FILE = Path(__file__).with_name("scale_counts.json")
CANVAS, OBJECTS, CLASSES = (800, 1333), 20, 91  # as the other counts of docs/gpu.md
_GPU = GPUS["h100"]
_CAP = 25 * 2**20  # bytes of a bucket; the first one's is torch's own


def buckets(arrived: Sequence[Tensor]) -> list[list[int]]:
    """Places in the order of arrival of the tensors of each of DistributedDataParallel's buckets."""
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, _CAP]
    return dist._compute_bucket_assignment_by_size(arrived, limits, [], list(range(len(arrived))))[0]


def counted(config: Config, canvas: tuple[int, int], objects: int, classes: int) -> tuple[dict, dict]:
    """A preset's gradients, and its step with as many images at once as it has."""
    arrived: list[tuple[nn.Parameter, int]] = []
    operations, _ = count_step(
        config, canvas, objects, classes, lambda parameter, before: arrived.append((parameter, before))
    )
    parameters = [parameter for parameter, _ in arrived]
    first = next(place for place, each in enumerate(operations) if "backward" in each.stage)
    places = buckets(parameters)
    whole = [max(arrived[place][1] for place in bucket) for bucket in places]
    gradients = {
        "trained": sum(parameter.numel() for parameter in parameters),
        "tensors": len(parameters),
        "buckets": [sum(4 * parameters[place].numel() for place in bucket) for bucket in places],
        # Each gradient is copied into its bucket when it comes, and out of it at the end.
        "copying": [sum(_copy(parameters[place]) for place in bucket) for bucket in places],
    }
    step = {
        "forward": _asked(operations[:first]),
        "whole": [_asked(operations[first:end]) for end in whole],
        "after": _asked(operations[whole[-1] :]),
    }
    return gradients, step


def _asked(operations: Sequence[Counted]) -> list[float]:
    """Seconds on the device, kernels."""
    return [sum(each.on(_GPU) for each in operations), sum(each.kernels for each in operations)]


def _copy(parameter: Tensor) -> float:
    """Seconds of a kernel that reads and writes a gradient in float32."""
    return GAP + max(LEAST, 8 * parameter.numel() / _GPU.bandwidth)


def main() -> None:
    """Count all, and write them."""
    found = {}
    for preset in MODELS:
        steps, alone, config = {}, {}, PRESETS[preset]()
        for images in IMAGES:
            config = replace(config, batch_size=images)
            gradients, steps[str(images)] = counted(config, CANVAS, OBJECTS, CLASSES)
            alone[str(images)] = _asked(count_step(config, CANVAS, OBJECTS, CLASSES)[0])[0]
        with torch.device("meta"):
            model = build_model(config.model, CLASSES)
        gradients |= {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "buffers": sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        }
        found[preset] = gradients | {"alone": alone, "steps": steps}
        print(preset, gradients, flush=True)
    write_json_atomic(FILE, found, indent=1)


if __name__ == "__main__":
    sys.exit(main())
