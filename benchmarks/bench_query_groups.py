"""LW-DETR and RF-DETR with thirteen query groups, with denoising beside them, and with denoising in place of most.

``pytest benchmarks/bench_query_groups.py -s --results FILE``. Small models with random weights. ``bench_groups_step``
times steps in turn, by wall and processor time, and measures how much memory a step needs at most beyond what the
process held before. ``bench_groups_training`` trains a small RF-DETR on the built-in shapes, equally many steps each,
three seeds, and scores the first group, which is all that is there at test time.
"""

import statistics
import time

import pytest
import torch
from bench_step import peak_memory

transformers = pytest.importorskip("transformers", reason='transformers is not installed (pip install -e ".[hf]")')

import dndetr  # noqa: E402
from dndetr.boxes import xyxy_to_cxcywh  # noqa: E402
from dndetr.data.shapes import CLASSES, ShapesDataset  # noqa: E402
from dndetr.scoring.coco import coco_evaluate, coco_results, postprocess  # noqa: E402

# query groups that are trained, of thirteen, and denoising groups
SETTINGS = {"13": (13, 0), "13 + 5": (13, 5), "3 + 5": (3, 5), "1 + 5": (1, 5), "1": (1, 0)}
SIDE, BATCH, ROUNDS, SEEDS, VALIDATION, STEPS = 128, 4, 7, (0, 1, 2), 200, 400


def build(kind: str, setting: str, queries: int, width: int, patch: int, seed: int = 0):
    """A small model of 3 decoder layers, the same weights for every setting."""
    torch.manual_seed(seed)
    backbone = {
        "hidden_size": width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
        "image_size": SIDE,
        "patch_size": patch,
        "out_indices": [2, 4],
    }
    settings = {
        "d_model": width,
        "decoder_ffn_dim": 4 * width,
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 4,
        "c2f_num_blocks": 1,
        "num_queries": queries,
        "num_labels": len(CLASSES),
        "dropout": 0.0,
    }
    if kind == "LW-DETR":
        vit = transformers.LwDetrViTConfig(**backbone, pretrain_image_size=SIDE, window_block_indices=[0, 2])
        config = transformers.LwDetrConfig(backbone_config=vit, projector_scale_factors=[1.0], **settings)
        model = transformers.LwDetrForObjectDetection(config)
    else:
        vit = transformers.RfDetrDinov2Config(**backbone, num_windows=2)
        model = transformers.RfDetrForObjectDetection(transformers.RfDetrConfig(backbone_config=vit, **settings))
    kept, groups = SETTINGS[setting]
    if (kept, groups) != (model.config.group_detr, 0):
        dndetr.denoise(model, keep_groups=kept)
        model.denoising.groups = groups
    return model.train()


def load(data: ShapesDataset, indices, epoch: int = 0) -> tuple[torch.Tensor, list[dict]]:
    """Images [B, 3, SIDE, SIDE] as a detector is shown them, and labels as transformers takes them."""
    samples = [data.sample(index, epoch) for index in indices]
    images = torch.stack(
        [torch.from_numpy(s.pixels).float() @ s.colours[:, :3].T + s.colours[:, 3] for s in samples]
    ).permute(0, 3, 1, 2)
    labels = [{"class_labels": s.labels, "boxes": xyxy_to_cxcywh(s.boxes_xyxy) / SIDE} for s in samples]
    return images.contiguous(), labels


def train_step(model, images, labels) -> None:
    model.zero_grad(set_to_none=True)
    model(images, labels=labels).loss.backward()


@pytest.mark.parametrize("kind", ["LW-DETR", "RF-DETR"])
def bench_groups_step(record, kind):
    settings = [name for name in SETTINGS if name != "1"]
    models = {name: build(kind, name, queries=100, width=128, patch=8) for name in settings}
    batch = load(ShapesDataset("train", BATCH), range(BATCH))
    wall, processor = ({name: [] for name in settings} for _ in range(2))
    for turn in range(ROUNDS + 1):
        for name, model in models.items():
            start, used = time.perf_counter(), time.process_time()
            train_step(model, *batch)
            if turn:  # the first warms up
                wall[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - used)
    memory = {}
    for name, model in models.items():
        peaks = []
        for _ in range(3):  # of a heap with other holes each
            model.zero_grad(set_to_none=True)
            peaks.append((peak_memory(lambda model=model: train_step(model, *batch)) or float("nan")) / 2**20)
        model.zero_grad(set_to_none=True)
        memory[name] = statistics.median(peaks)
    seconds = {name: statistics.median(times) for name, times in wall.items()}
    record(f"step of a small HF {kind} by groups", seconds, processor_seconds=processor, peak_mib=memory)
    for name in settings:
        ratios = [statistics.median(x / y for x, y in zip(t[name], t["13"], strict=True)) for t in (wall, processor)]
        print(
            f"\n{kind} {name}: {seconds[name]:.3f} s, {ratios[0]:.2f} of that of 13 groups "
            f"(processor {ratios[1]:.2f}), peak {memory[name]:.0f} MiB",
            end="",
        )


def trained(setting: str, seed: int) -> dict:
    """Metrics of a small RF-DETR after STEPS steps on the built-in shapes."""
    model = build("RF-DETR", setting, queries=12, width=64, patch=16, seed=seed)
    data, validation = ShapesDataset("train", STEPS * BATCH, seed=seed), ShapesDataset("val", VALIDATION)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, STEPS, pct_start=0.1)
    for number in range(STEPS):
        train_step(model, *load(data, range(number * BATCH, (number + 1) * BATCH)))
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        schedule.step()
    results = []
    model.eval()
    for first in range(0, VALIDATION, 50):
        ids = range(first, first + 50)
        with torch.no_grad():
            output = model(load(validation, ids)[0])
        sizes = torch.full((len(ids), 2), SIDE)
        results += coco_results(postprocess(output.logits, output.pred_boxes, sizes), ids, validation.classes)
    return coco_evaluate(validation.coco_dict(), results)


def bench_groups_training(record):
    for setting in SETTINGS:
        start = time.process_time()
        found = [trained(setting, seed) for seed in SEEDS]
        used = (time.process_time() - start) / len(SEEDS)
        scores = {name: [metrics[name] for metrics in found] for name in ("AP", "AP50", "AR100")}
        record(f"RF-DETR, {setting} groups, {STEPS} steps on shapes", {"processor": used}, **scores)
        shown = ", ".join(
            f"{name} {statistics.mean(x):.4f} ({' '.join(f'{v:.4f}' for v in x)})" for name, x in scores.items()
        )
        print(f"\nRF-DETR, {setting} groups, {STEPS} steps: {shown}; {used:.0f} processor seconds a run", end="")
