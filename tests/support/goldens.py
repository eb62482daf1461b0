"""Golden data: where it is, and how a file becomes a model of ours with its inputs, targets and recorded noise."""

import os
from pathlib import Path

import pytest
import torch

from dndetr.batch import Targets
from dndetr.config import BackboneConfig, ModelConfig
from dndetr.denoising import Noise
from dndetr.models.build import build_model
from dndetr.models.official import from_official

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("DNDETR_SHARED", ROOT.parent / "shared"))
GOLDEN = Path(os.environ.get("DNDETR_GOLDEN", SHARED / "golden"))

VARIANTS = {
    "dn_dab_detr": "dn-detr",
    "dn_dab_deformable_detr": "dn-deformable-detr",
    "dn_dab_deformable_detr_deformable_encoder_only": "dn-deformable-encoder",
}


def _absent(name: str) -> str:
    return f"no golden data at {GOLDEN / name} (set DNDETR_GOLDEN or DNDETR_SHARED)"


def unit(name: str) -> dict:
    """A unit file's content; skips the test, or the module, where it is not there."""
    if not (GOLDEN / name).is_file():
        pytest.skip(_absent(name), allow_module_level=True)
    return torch.load(GOLDEN / name, weights_only=True)


def unit_cases(name: str, identify, keep=lambda case: True) -> list:
    """A unit file's cases as pytest parameters, or one that is skipped where the file is not there."""
    if not (GOLDEN / name).is_file():
        return [pytest.param(None, marks=pytest.mark.skip(reason=_absent(name)), id="absent")]
    cases = filter(keep, torch.load(GOLDEN / name, weights_only=True)["cases"])
    return [pytest.param(case, id=identify(case)) for case in cases]


def model_files() -> dict[str, dict]:
    """Every file of the golden directory that holds a model, by name."""
    found = {}
    for path in sorted(GOLDEN.glob("*.pt")):
        content = torch.load(path, weights_only=True)
        if isinstance(content, dict) and "variant" in content.get("meta", {}):
            found[path.stem] = content
    return found


def model_config(golden: dict) -> ModelConfig:
    """Our configuration of a golden file's model."""
    meta = golden["meta"]
    variant = VARIANTS[meta["variant"]]
    multi = variant != "dn-detr"
    return ModelConfig(
        variant=variant,
        backbone=_backbone(golden["state_dict"], "--dilation" in meta["flags"], (2, 3, 4) if multi else (4,)),
        width=meta["hidden_dim"],
        heads=meta["nheads"],
        hidden=meta["dim_feedforward"],
        encoder_layers=meta["enc_layers"],
        decoder_layers=meta["dec_layers"],
        queries=meta["num_queries"],
        patterns=meta["num_patterns"],
        levels=meta["num_feature_levels"] if multi else 1,
        encoder_points=meta["enc_n_points"],
        decoder_points=meta["dec_n_points"],
        # The official deformable decoder has its ReLU hard-coded, whatever its flag says.
        activation="relu" if variant == "dn-deformable-detr" else meta["activation"],
        temperature=tuple(float(t) for t in meta["pe_temperature"]),
        position_shift=0.5 if variant == "dn-deformable-detr" else 0.0,
    )


def _backbone(state: dict, dilation: bool, outputs: tuple[int, ...]) -> BackboneConfig:
    prefix = "backbone.0.body.layer"
    blocks, planes = [], []
    for stage in range(1, 5):
        names = [name for name in state if name.startswith(f"{prefix}{stage}.")]
        blocks.append(1 + max(int(name.split(".")[4]) for name in names))
        planes.append(state[f"{prefix}{stage}.0.conv1.weight"].shape[0])
    bottleneck = f"{prefix}1.0.conv3.weight" in state
    return BackboneConfig(
        blocks=tuple(blocks), planes=tuple(planes), bottleneck=bottleneck, dilation=dilation, outputs=outputs
    )


def load_model(golden: dict, dtype: torch.dtype):
    """The golden file's model with its weights, every key accounted for."""
    model = build_model(model_config(golden), golden["meta"]["num_classes"]).to(dtype)
    model.load_state_dict(from_official(golden["state_dict"]))
    return model


def images(golden: dict, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The padded canvas [B, 3, H, W] and the valid sizes [B, 2]."""
    files = golden["inputs"]["images"]
    mask = golden["inputs"]["mask"]
    canvas = torch.zeros(len(files), 3, *mask.shape[1:], dtype=dtype)
    sizes = torch.tensor([image.shape[1:] for image in files])
    for slot, image, (height, width) in zip(canvas, files, sizes.tolist(), strict=True):
        slot[:, :height, :width] = image
    return canvas, sizes


def pad_targets(labels: list, boxes: list, dtype: torch.dtype, slots: int | None = None) -> Targets:
    """Ragged labels and boxes -> Targets with ``slots`` per image (default: the largest count, at least 1)."""
    counts = [len(x) for x in labels]
    slots = max(1, *counts) if slots is None else slots
    padded = Targets(
        torch.zeros(len(labels), slots, dtype=torch.int64),
        torch.zeros(len(labels), slots, 4, dtype=dtype),
        torch.tensor(counts, dtype=torch.int32),
    )
    for image, count in enumerate(counts):
        padded.labels[image, :count] = labels[image]
        padded.boxes[image, :count] = boxes[image].to(dtype)
    return padded


def case_targets(case: dict, dtype: torch.dtype, slots: int | None = None) -> Targets:
    """The targets of a golden case."""
    targets = case["targets"]
    return pad_targets([t["labels"] for t in targets], [t["boxes"] for t in targets], dtype, slots)


def recorded_noise(draws: dict, targets: Targets, groups: int, label_noise: float) -> Noise:
    """Recorded draws, in the official order (group, then image, then object), as our [B, G, T] tensors."""
    batch, slots = targets.labels.shape
    where = targets.valid.nonzero()  # image-major
    image, slot = where[:, 0].repeat(groups), where[:, 1].repeat(groups)
    group = torch.arange(groups).repeat_interleave(len(where))
    noise = Noise(
        torch.ones(batch, groups, slots, dtype=torch.float64),
        torch.zeros(batch, groups, slots, dtype=torch.int64),
        torch.full((batch, groups, slots, 4), 0.5, dtype=torch.float64),
    )
    if draws.get("label_p") is not None and len(draws["label_p"]):
        noise.flip[image, group, slot] = draws["label_p"]
        chosen = draws["label_p"] < label_noise
        noise.label[image[chosen], group[chosen], slot[chosen]] = draws["new_label"]
    if draws.get("box_rand") is not None and len(draws["box_rand"]):
        noise.box[image, group, slot] = draws["box_rand"]
    return noise
