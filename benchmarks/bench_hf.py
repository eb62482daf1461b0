"""A training step of Hugging Face's detectors on the CPU before and after ``dndetr.accelerate``, alternately.

``pytest benchmarks/bench_hf.py -s --results FILE``. Deformable DETR with a ResNet-50 and their default configuration
(6 + 6 layers, 4 levels, 300 queries) and losses of every layer; RF-DETR as its small model is (DINOv2-small in windows,
3 layers, 13 groups of 300 queries). Random weights and images. Also compares the two losses; and the losses of RF-DETR
by themselves, forward and backward.
"""

import statistics
import time

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='transformers is not installed (pip install -e ".[hf]")')

from transformers.loss import loss_lw_detr  # noqa: E402

import dndetr  # noqa: E402
from dndetr.hf.matching import MatchedLoss  # noqa: E402

BATCH = 2


def deformable_detr(height: int, width: int):
    """Deformable DETR with a ResNet-50, as transformers configures it."""
    backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_labels=91,
        dropout=0.0,
        auxiliary_loss=True,
    )
    return transformers.DeformableDetrForObjectDetection(config)


def rf_detr(height: int, width: int):
    """RF-DETR with the numbers of its small model."""
    backbone = transformers.RfDetrDinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        patch_size=16,
        num_windows=2,
        image_size=height,
        out_features=["stage3", "stage6", "stage9", "stage12"],
    )
    config = transformers.RfDetrConfig(backbone_config=backbone, num_labels=91, decoder_n_points=2, dropout=0.0)
    return transformers.RfDetrForObjectDetection(config)


# name: (model, height, width, repetitions)
CASES = {
    "DeformableDetr-480x640": (deformable_detr, 480, 640, 2),
    "DeformableDetr-256x320": (deformable_detr, 256, 320, 4),
    "RfDetr-384x384": (rf_detr, 384, 384, 3),
}


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


@pytest.mark.parametrize("case", CASES)
def bench_hf_step(record, case):
    build, height, width, repetitions = CASES[case]
    torch.manual_seed(0)
    model = build(height, width).train()
    images, labels = torch.randn(BATCH, 3, height, width), make_labels((7, 12))

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
    name, size = case.split("-")
    about = {"transformers": transformers.__version__, "processor_seconds": processor, "losses": losses}
    record(f"step of HF {name}, accelerated, {BATCH} images of {size}", {"ours": after, f"HF {name}": before}, **about)
    shown = ", ".join(f"{name} {value:.2f}" for name, value in ratios.items())
    print(f"\n{name} step {size}, batch {BATCH}: {before:.2f} s, accelerated {after:.2f} s; {shown}")
    print(f"losses {losses['before']:.6f} and {losses['after']:.6f}; least processor seconds {processor}")


def bench_hf_losses(record):
    config = transformers.RfDetrConfig(num_labels=91)
    layers, queries = config.decoder_layers, config.num_queries * config.group_detr
    draw = torch.Generator().manual_seed(2)
    predictions = []
    for size in ((), (layers,), ()):  # of the last layer, of all layers, of the encoder
        predictions.append(torch.randn(*size, BATCH, queries, 91, generator=draw) - 4)
        predictions.append(0.2 + 0.4 * torch.rand(*size, BATCH, queries, 4, generator=draw))
    logits, boxes, *others = [x.requires_grad_() for x in predictions]
    labels, own_loss = make_labels((7, 12)), loss_lw_detr.LwDetrForObjectDetectionLoss
    losses = {"HF RfDetr": own_loss, "ours": MatchedLoss(own_loss)}
    seconds, values = {name: [] for name in losses}, {}
    for _ in range(12):
        for name, loss in losses.items():
            used = time.process_time()
            total, *_ = loss(logits, labels, logits.device, boxes, config, *others)
            torch.autograd.grad(total, [logits, boxes, *others])
            seconds[name].append(time.process_time() - used)
            values[name] = total.item()
    assert values["ours"] == pytest.approx(values["HF RfDetr"], rel=1e-5)
    least = {name: min(times) for name, times in seconds.items()}
    record(f"losses of HF RfDetr, {BATCH} images, {layers + 1} layers of {queries} queries", least)
    print(f"\nlosses of RF-DETR, least processor seconds {least}: {least['HF RfDetr'] / least['ours']:.2f} times")
