"""Golden data: where it is, and how a file becomes a model of ours with its inputs, targets and recorded noise."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dndetr.batch import Targets
from dndetr.denoising import Noise, NoisedQueries, noised_queries
from dndetr.model_config import BackboneConfig, ModelConfig
from dndetr.models.build import build_model
from dndetr.models.weights.head_sharing import fit_heads
from dndetr.models.weights.official import from_official, official_names

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("DNDETR_SHARED", ROOT.parent / "shared"))
GOLDEN = Path(os.environ.get("DNDETR_GOLDEN", SHARED / "golden"))

VARIANTS = {
    "dn_dab_detr": "dn-detr",
    "dn_dab_deformable_detr": "dn-deformable-detr",
    "dn_dab_deformable_detr_deformable_encoder_only": "dn-deformable-encoder",
    "dn_dab_dino_deformable_detr": "dn-deformable-detr",
    "dino": "dn-deformable-detr",
}


def _absent(name: str) -> str:
    return f"no golden data at {GOLDEN / name} (set DNDETR_GOLDEN or DNDETR_SHARED)"


def unit(name: str) -> dict:
    """A unit file's content; skips the test, or the module, where it is not there."""
    if not (GOLDEN / name).is_file():
        pytest.skip(_absent(name), allow_module_level=True)
    return torch.load(GOLDEN / name, weights_only=True)


def unit_cases(name: str, identify, keep=lambda case: True, of: str = "cases") -> list:
    """A unit file's cases as pytest parameters, or one that is skipped where the file is not there."""
    if not (GOLDEN / name).is_file():
        return [pytest.param(None, marks=pytest.mark.skip(reason=_absent(name)), id="absent")]
    cases = filter(keep, torch.load(GOLDEN / name, weights_only=True)[of])
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
    outputs = tuple(i + 1 for i in meta.get("return_interm_indices", (1, 2, 3))) if multi else (4,)
    return ModelConfig(
        variant=variant,
        backbone=_backbone(golden["state_dict"], "--dilation" in meta["flags"], outputs),
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
        activation="relu" if variant == "dn-deformable-detr" and meta["variant"] != "dino" else meta["activation"],
        temperature=tuple(float(t) for t in meta["pe_temperature"]),
        position_shift=0.0 if meta["variant"] == "dino" or variant != "dn-deformable-detr" else 0.5,
        **_two_stages(meta),
    )


def _two_stages(meta: dict) -> dict:
    """What makes the two DINOs: the official one, and the one in DN-DETR's repository."""
    if meta["variant"] == "dn_dab_dino_deformable_detr":
        return {"proposals": "objects", "proposal_padding": "official", "look_forward_twice": True}
    if meta["variant"] != "dino":
        return {}
    alike = meta["dec_pred_class_embed_share"] == meta["dec_pred_bbox_embed_share"]
    kept = ("two_stage_learn_wh", "two_stage_keep_all_tokens", "no_interm_box_loss")
    kept += ("two_stage_class_embed_share", "two_stage_bbox_embed_share")
    if not alike or any(meta[name] for name in kept) or meta["interm_loss_coef"] != 1:
        pytest.skip("options of the official DINO that no released model has")
    return {
        "proposals": "selected",
        "proposal_padding": "official",
        "content": "learned" if meta["embed_init_tgt"] else "selected",
        "look_forward_twice": not meta["use_detached_boxes_dec_out"],
        "shared_heads": meta["dec_pred_class_embed_share"],
        "decoder_norm": True,
        "query_scale": False,
        "label_indicator": False,
    }


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
    model = build_model(model_config(golden), golden["meta"]["num_classes"])
    table = golden["state_dict"]["label_enc.weight"]
    if len(table) > len(model.queries.label_enc.weight):  # rows of labels that never come
        model.queries.label_enc = torch.nn.Embedding(*table.shape)
    model.to(dtype)
    state = fit_heads(from_official(golden["state_dict"]), model.state_dict())
    model.load_state_dict({name: value.to(dtype) for name, value in state.items()})
    return model


def names(golden: dict, model) -> dict[str, str]:
    """Official parameter names -> ours, where a head of the model may be that of all layers."""
    own = model.state_dict()
    ours = official_names(golden["state_dict"])
    return {name: mine if mine in own else re.sub(r"_embed\.\d+\.", "_embed.", mine) for name, mine in ours.items()}


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


def recorded_noise(draws: dict, targets: Targets, groups: int, label_noise: float, contrastive: bool = False) -> Noise:
    """Recorded draws, in the official order (group, then image, then object), as our [B, G, S] tensors.

    Contrastive ones, of the official DINO, have all positives of a group before all its negatives.
    """
    batch, slots = targets.labels.shape
    image, slot = targets.valid.nonzero().unbind(1)  # image-major
    each = 2 if contrastive else 1
    group = torch.arange(groups).repeat_interleave(each * len(image))
    image = image.repeat(groups * each)
    slot = torch.cat([slot * each + kind for kind in range(each)]).repeat(groups)
    noise = Noise(
        torch.ones(batch, groups, each * slots, dtype=torch.float64),
        torch.zeros(batch, groups, each * slots, dtype=torch.int64),
        torch.full((batch, groups, each * slots, 4), 0.5, dtype=torch.float64),
    )
    if draws.get("label_p") is not None and len(draws["label_p"]):
        noise.flip[image, group, slot] = draws["label_p"]
        chosen = draws["label_p"] < label_noise
        noise.label[image[chosen], group[chosen], slot[chosen]] = draws["new_label"]
    if draws.get("box_rand") is not None and len(draws["box_rand"]):
        box = draws["box_rand"]
        if contrastive:  # one number has both sign and size; a size of 0 must not lose its sign
            box = 0.5 + (draws["box_sign"] - 0.5) * box.clamp(min=2**-52)
        noise.box[image, group, slot] = box
    return noise


def recorded_queries(golden: dict, case: dict, draws: dict, targets: Targets) -> NoisedQueries:
    """The noised queries of a training forward with recorded draws."""
    meta, groups = golden["meta"], case["dn"]["scalar"]
    noise = meta["label_noise_scale"], meta["box_noise_scale"]
    if meta["variant"] == "dn_dab_dino_deformable_detr":
        return _concatenated_queries(draws, targets, groups, *noise, meta["num_classes"])
    contrastive = meta["variant"] == "dino"
    drawn = recorded_noise(draws, targets, groups, noise[0], contrastive)
    return noised_queries(targets, drawn, *noise, batch_active=True, contrastive=contrastive)


def concatenated_entries(targets: Targets, groups: int) -> tuple[Tensor, ...]:
    """Entries in the order of contrastive denoising in DN-DETR's repository, group by group, images after each other.

    -> image, group, object, whether it is the object's second copy, and whether it is negative there: in the second
    half of the whole batch's entries, which is the second copy only where there is one image.
    """
    counts = targets.counts.tolist()
    image = torch.cat([torch.full((2 * count,), b) for b, count in enumerate(counts)])
    number = torch.cat([torch.arange(count).repeat(2) for count in counts])
    second = torch.cat([torch.arange(2 * count) >= count for count in counts])
    negative = torch.arange(len(image)) >= len(image) // 2
    group = torch.arange(groups).repeat_interleave(len(image))
    return image.repeat(groups), group, number.repeat(groups), second.repeat(groups), negative.repeat(groups)


def _concatenated_queries(draws, targets, groups, label_noise, box_noise, classes) -> NoisedQueries:
    """The noised queries of the DINO in DN-DETR's repository, which we do not make: its negatives are others'."""
    image, group, number, second, negative = concatenated_entries(targets, groups)
    labels = targets.labels[image, number].masked_fill(second, classes)
    chosen = draws["label_p"] < label_noise
    labels[chosen] = draws["new_label"]
    labels[negative] = classes
    centre, size = targets.boxes[image, number].double().split(2, dim=-1)
    moved = (draws["box_rand"] + negative[:, None]) * (2 * draws["box_sign"] - 1) * box_noise
    corners = torch.cat((centre - size / 2, centre + size / 2), dim=-1) + moved * size.repeat(1, 2) / 2
    low, high = corners.clamp(0, 1).split(2, dim=-1)
    batch, slots = targets.labels.shape
    all_labels = torch.zeros(batch, groups, 2 * slots, dtype=torch.int64)
    all_boxes = torch.zeros(batch, groups, 2 * slots, 4, dtype=targets.boxes.dtype)
    slot = 2 * number + second
    all_labels[image, group, slot] = labels
    all_boxes[image, group, slot] = torch.cat(((low + high) / 2, high - low), dim=-1).to(all_boxes.dtype)
    counts = 2 * targets.counts
    active = counts.amax().expand_as(counts).contiguous()
    return NoisedQueries(all_labels, all_boxes, targets.valid.repeat_interleave(2, dim=1), active, counts)


def rows_of(golden: dict, case: dict, targets: Targets) -> Tensor:
    """Our number of each of the official denoising rows: [B, D]."""
    groups, slots, largest = case["dn"]["scalar"], targets.labels.shape[1], int(targets.counts.max())
    variant, counts = golden["meta"]["variant"], targets.counts[:, None]
    if variant == "dino":
        within = torch.cat((torch.arange(largest) * 2, torch.arange(largest) * 2 + 1)).expand(len(counts), -1)
    elif variant == "dn_dab_dino_deformable_detr":
        row = torch.arange(2 * largest)
        within = torch.where(row < counts, 2 * row, torch.where(row < 2 * counts, 2 * (row - counts) + 1, row))
    else:
        return (torch.arange(groups)[:, None] * slots + torch.arange(largest)).flatten().expand(len(counts), -1)
    return (torch.arange(groups)[:, None] * 2 * slots + within[:, None]).flatten(1)
