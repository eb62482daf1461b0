"""A training step of Hugging Face's Deformable DETR on the CPU before and after ``dndetr.accelerate``, alternately.

``pytest benchmarks/bench_hf.py -s --results FILE``. ResNet-50 and their default configuration (6 + 6 layers, 4 levels,
300 queries) with losses of every layer; random weights and images. Also compares the two losses.
"""

import statistics
import time

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='transformers is not installed (pip install -e ".[hf]")')

import dndetr  # noqa: E402

# height, width, repetitions
SIZES = {"480x640": (480, 640, 2), "256x320": (256, 320, 4)}
BATCH = 2


def build():
    """Deformable DETR with a ResNet-50, as transformers configures it."""
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_labels=91,
        dropout=0.0,
        auxiliary_loss=True,
    )
    return transformers.DeformableDetrForObjectDetection(config).train()


def make_labels(counts: tuple[int, ...]) -> list[dict]:
    """Random objects."""
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "class_labels": torch.randint(91, (count,), generator=draw),
            "boxes": torch.cat(
                (0.2 + 0.6 * torch.rand(count, 2, generator=draw), 0.05 + 0.3 * torch.rand(count, 2, generator=draw)), 1
            ),
        }
        for count in counts
    ]


@pytest.mark.parametrize("size", SIZES)
def bench_hf_step(record, size):
    height, width, repetitions = SIZES[size]
    model, images, labels = build(), torch.randn(BATCH, 3, height, width), make_labels((7, 12))

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(images, labels=labels).loss
        loss.backward()
        return loss.item()

    # Wall time, and the processor time of all threads, which says more on a machine that others use too.
    seconds, processor, losses = {"before": [], "after": []}, {"before": [], "after": []}, {}
    for repetition in range(repetitions + 1):
        for state in seconds:
            done = dndetr.accelerate(model) if state == "after" else None
            start, used = time.perf_counter(), time.process_time()
            losses[state] = step()
            if repetition:  # the first of each warms up
                seconds[state].append(time.perf_counter() - start)
                processor[state].append(time.process_time() - used)
            if done:
                done.undo()
    assert losses["after"] == pytest.approx(losses["before"], rel=1e-4)
    before, after = (statistics.median(seconds[state]) for state in ("before", "after"))
    ratios = {
        "ratio": before / after,
        "ratio_of_fastest": min(seconds["before"]) / min(seconds["after"]),
        "ratio_of_processor_time": min(processor["before"]) / min(processor["after"]),
    }
    name = f"step of HF DeformableDetr, accelerated, {BATCH} images of {size}"
    about = {"transformers": transformers.__version__, "processor_seconds": processor, "losses": losses}
    record(name, {"ours": after, "HF DeformableDetr": before}, **about)
    shown = ", ".join(f"{name} {value:.2f}" for name, value in ratios.items())
    print(f"\nDeformable DETR step {size}, batch {BATCH}: {before:.2f} s, accelerated {after:.2f} s; {shown}")
    print(f"losses {losses['before']:.6f} and {losses['after']:.6f}; least processor seconds {processor}")
