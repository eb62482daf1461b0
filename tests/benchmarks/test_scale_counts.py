"""What is counted of a step of many processes: parameters, DistributedDataParallel's buckets, and the file of both."""

import json
from dataclasses import replace

import numpy as np
import pytest
import scale_counts
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dndetr import train
from dndetr.counting.step import count_step
from dndetr.models.build import build_model
from dndetr.presets import PRESETS

TINY = ("--preset", "tiny", "--batch-size", "2", "--optimizer.ema", "0")
COUNTS = json.loads(scale_counts.FILE.read_text())


@pytest.mark.parametrize("preset", scale_counts.MODELS)
def test_gradients_are_those_of_the_parameters(preset):
    with torch.device("meta"):
        model = build_model(PRESETS[preset]().model, scale_counts.CLASSES)
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    counts = COUNTS[preset]
    assert counts["parameters"] == sum(parameter.numel() for parameter in parameters)
    assert (counts["trained"], counts["tensors"]) == (sum(p.numel() for p in trained), len(trained))
    assert sum(counts["buckets"]) == 4 * counts["trained"]
    assert counts["buffers"] == sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert {len(counts["buckets"])} == {len(counts["copying"]), *(len(s["whole"]) for s in counts["steps"].values())}
    # Every bucket but the last is full: its last tensor went over the limit.
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES] + [25 * 2**20] * len(counts["buckets"])
    assert all(size >= limit for size, limit in zip(counts["buckets"][:-1], limits, strict=False))


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_buckets_are_those_of_distributed_data_parallel(alone):
    """Which it makes anew when it has seen in which order gradients come."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(1500, 1500) for _ in range(8)))
    shared, arrived = DistributedDataParallel(layers), []
    for parameter in layers.parameters():
        parameter.register_post_accumulate_grad_hook(arrived.append)
    for _ in range(4):
        arrived.clear()
        shared(torch.zeros(1, 1500)).sum().backward()
    told = shared._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    found = [sum(4 * arrived[place].numel() for place in bucket) for bucket in scale_counts.buckets(arrived)]
    assert found == [int(size) for size in told.split(", ")] and len(found) == 4


def test_view_saves_the_copy_out_of_the_bucket_and_a_static_graph_none(alone):
    def copies(**options) -> int:
        layers = torch.nn.Sequential(*(torch.nn.Linear(20, 20) for _ in range(5)))
        shared = DistributedDataParallel(layers, **options)
        for _ in range(3):
            layers.zero_grad(set_to_none=True)
            shared(torch.zeros(1, 20)).sum().backward()
        layers.zero_grad(set_to_none=True)
        with torch.profiler.profile() as profiler:
            shared(torch.zeros(1, 20)).sum().backward()
        named = {event.key: event.count for event in profiler.key_averages()}
        assert named["torch::distributed::reducer::mul_out"] == 10  # into the buckets
        return named.get("torch.distributed.ddp.reducer::copy_bucket_to_grad", 0)

    assert (copies(), copies(gradient_as_bucket_view=True), copies(static_graph=True)) == (10, 0, 10)


def test_a_step_is_counted_up_to_each_bucket(monkeypatch):
    operations = []

    def kept(*arguments):
        found = count_step(*arguments)
        operations.extend(found[0])
        return found

    monkeypatch.setattr(scale_counts, "count_step", kept)
    gradients, step = scale_counts.counted(train.parse(TINY), (128, 128), 8, 3)
    kernels, seconds = sum(each.kernels for each in operations), sum(each.on(scale_counts._GPU) for each in operations)
    parts = [step["forward"], step["whole"][-1], step["after"]]
    assert sum(part[1] for part in parts) == kernels
    assert sum(part[0] for part in parts) == pytest.approx(seconds)
    assert step["whole"] == sorted(step["whole"])
    assert len(gradients["copying"]) == len(gradients["buckets"]) == len(step["whole"]) > 1


@pytest.mark.slow
@pytest.mark.parametrize("preset", scale_counts.MODELS)
def test_the_file_is_what_is_counted(preset):
    config = replace(PRESETS[preset](), batch_size=2)
    case = (scale_counts.CANVAS, scale_counts.OBJECTS, scale_counts.CLASSES)
    gradients, step = scale_counts.counted(config, *case)
    counts = COUNTS[preset]
    assert gradients["buckets"] == counts["buckets"]
    assert gradients["copying"] == pytest.approx(counts["copying"])
    for name, marks in step.items():
        assert np.ravel(marks) == pytest.approx(np.ravel(counts["steps"]["2"][name]))
