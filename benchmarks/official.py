"""A training step of the official implementation, from a copy of it that ``DNDETR_OFFICIAL`` names.

Model, criterion and loop are its own (its ``engine.py``), with its defaults. Left out: pretrained weights, logging, and
what imports packages that its detectors do not need. Where its extension cannot be imported, our writing of the same
mapping takes its place (``deform_attn_peers``).
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import deform_attn_peers
import torch
from torch import nn

from dndetr.batch import Batch
from dndetr.ops import images_of

# Its package and the function that builds model, criterion and post-processing.
DETECTORS = {
    "dn-detr-r50": ("DN_DAB_DETR", "build_DABDETR"),
    "dn-deformable-detr-r50": ("dn_dab_deformable_detr", "build_dab_deformable_detr"),
}
# The defaults of its main.py, as far as they are read.
DEFAULTS = dict(
    dataset_file="coco",
    backbone="resnet50",
    dilation=False,
    return_interm_layers=False,
    position_embedding="sine",
    pe_temperatureH=20,
    pe_temperatureW=20,
    enc_layers=6,
    dec_layers=6,
    dim_feedforward=2048,
    hidden_dim=256,
    dropout=0.0,
    nheads=8,
    pre_norm=False,
    transformer_activation="prelu",
    num_queries=300,
    num_patterns=0,
    num_select=300,
    random_refpoints_xy=False,
    two_stage=False,
    num_feature_levels=4,
    enc_n_points=4,
    dec_n_points=4,
    masks=False,
    frozen_weights=None,
    use_dn=True,
    aux_loss=True,
    set_cost_class=2.0,
    set_cost_bbox=5.0,
    set_cost_giou=2.0,
    cls_loss_coef=1.0,
    bbox_loss_coef=5.0,
    giou_loss_coef=2.0,
    mask_loss_coef=1.0,
    dice_loss_coef=1.0,
    focal_alpha=0.25,
    lr_backbone=1e-5,
)
GROUPS, LABEL_NOISE, BOX_NOISE, PATTERNS = 5, 0.2, 0.4, 0


def step(preset: str, batch: Batch, device: str, **changed) -> Callable[[], float]:
    """Its training step on a batch, in float32; changed: other settings than the defaults.

    Raises ImportError where there is no copy, or where it cannot be imported.
    """
    name, build = DETECTORS[preset]
    package, nested_tensor = _imported(name)
    options = SimpleNamespace(**DEFAULTS | changed, device=device)
    torch.manual_seed(0)
    with mock.patch.object(sys.modules[f"{package.__name__}.backbone"], "is_main_process", return_value=False):
        model, criterion, _ = getattr(package, build)(options)  # nothing is downloaded by what is not the main process
    model.to(device).train(), criterion.train()
    trained = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
    rest = [parameter for key, parameter in trained if "backbone" not in key]
    backbone = [parameter for key, parameter in trained if "backbone" in key]
    groups = [{"params": rest}, {"params": backbone, "lr": options.lr_backbone}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4)
    images = images_of(batch).contiguous()
    padding = torch.zeros(len(images), *batch.canvas, dtype=torch.bool)
    targets = [
        {"labels": batch.targets.labels[image, :count], "boxes": batch.targets.boxes[image, :count]}
        for image, count in enumerate(batch.targets.counts.tolist())
    ]

    def run() -> float:
        arrived = nested_tensor(images, padding).to(device)
        truth = [{key: value.to(device) for key, value in target.items()} for target in targets]
        outputs, denoised = model(arrived, dn_args=(truth, GROUPS, LABEL_NOISE, BOX_NOISE, PATTERNS))
        losses = criterion(outputs, truth, denoised)
        weights = criterion.weight_dict
        total = sum(losses[key] * weights[key] for key in losses if key in weights)
        loss = total.item()  # its loop looks at every step's
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return loss

    return run


def _imported(name: str) -> tuple[ModuleType, type]:
    """One of its packages, and its type of padded images."""
    folder = os.environ.get("DNDETR_OFFICIAL")
    if not folder:
        raise ImportError("DNDETR_OFFICIAL names no copy of the official implementation")
    if not Path(folder, "models", name).is_dir():
        raise ImportError(f"DNDETR_OFFICIAL={folder} holds no models/{name}")
    # Its models/__init__.py imports every detector, and a backbone that is not used here wants packages of its own.
    models, swin = ModuleType("models"), ModuleType(f"models.{name}.swin_transformer")
    models.__path__, swin.build_swin_transformer = [str(Path(folder, "models"))], None
    sys.modules |= {"models": models, swin.__name__: swin}
    try:
        importlib.import_module("MultiScaleDeformableAttention")
    except ImportError:
        sys.modules["MultiScaleDeformableAttention"] = deform_attn_peers.ClassicalExtension()
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(f"models.{name}"), importlib.import_module("util.misc").NestedTensor
    finally:
        sys.path.remove(folder)
