"""Our settings as config.json and preprocessor_config.json of a transformers detector: detector_config's way back."""

import json

from ..config import Config, ImagesConfig
from ..data.classes import Classes, distinct_names
from ..demands import demand
from ..model_config import BackboneConfig, ModelConfig
from ..models.backbone import BLOCKS

_HAVE = (
    "of ours, transformers has DAB-DETR (the presets dn-detr-r50 and dn-detr-r101) and Deformable DETR "
    "(--model.variant dn-deformable-detr --model.query-positions vectors)"
)
_PROCESSORS = {"dab-detr": "ConditionalDetrImageProcessor", "deformable_detr": "DeformableDetrImageProcessor"}
_CLASSES = {"dab-detr": "DabDetrForObjectDetection", "deformable_detr": "DeformableDetrForObjectDetection"}


def to_transformers(config: Config, classes: Classes) -> dict:
    """The content of config.json; ValueError, naming the setting, where transformers has no such model."""
    model, loss = config.model, config.loss
    kind = _kind(model)
    names = distinct_names(classes)
    theirs = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "id2label": {str(row): name for row, name in enumerate(names)},
        "label2id": {name: row for row, name in enumerate(names)},
        "backbone_config": _backbone(model.backbone),
        "activation_function": model.activation,
        "encoder_layers": model.encoder_layers,
        "decoder_layers": model.decoder_layers,
        "encoder_attention_heads": model.heads,
        "decoder_attention_heads": model.heads,
        "encoder_ffn_dim": model.hidden,
        "decoder_ffn_dim": model.hidden,
        "dropout": 0.0,
        "auxiliary_loss": True,
        "focal_alpha": loss.alpha,
        "dtype": "float32",
    }
    costs = {"class_cost": loss.cost_label, "bbox_cost": loss.cost_l1, "giou_cost": loss.cost_giou}
    costs |= {"bbox_loss_coefficient": loss.l1, "giou_loss_coefficient": loss.giou}
    theirs |= {name: int(value) for name, value in costs.items() if value == int(value)}  # it has whole ones only
    return theirs | (_dab(model) if kind == "dab-detr" else _deformable(model))


def to_processor(config: Config, kind: str) -> dict:
    """The content of preprocessor_config.json: images as the run's evaluation has them."""
    images = config.images
    return {
        "image_processor_type": _PROCESSORS[kind],
        "format": "coco_detection",
        "do_resize": images.recipe != "original",
        "size": _size(images),
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
        "do_pad": True,
    }


def _size(images: ImagesConfig) -> dict:
    if images.recipe == "fixed":
        return dict(zip(("height", "width"), images.canvas, strict=True))
    return {"shortest_edge": images.eval_size, "longest_edge": images.max_size}


def _kind(model: ModelConfig) -> str:
    if model.variant == "dn-detr":
        return "dab-detr"
    if model.variant == "dn-deformable-detr" and model.query_positions == "vectors":
        return "deformable_detr"
    raise ValueError(f"a {model.variant} whose queries have {model.query_positions}: {_HAVE}")


def _dab(model: ModelConfig) -> dict:
    if model.position_shift or any(value != int(value) for value in model.temperature):
        raise ValueError(
            f"--model.position-shift {model.position_shift} --model.temperature {model.temperature[0]:g} "
            f"{model.temperature[1]:g}: DAB-DETR of transformers has no shift, and whole temperatures"
        )
    return {
        "hidden_size": model.width,
        "num_queries": model.queries,
        "num_patterns": max(1, model.patterns),
        "temperature_height": int(model.temperature[0]),
        "temperature_width": int(model.temperature[1]),
    }


def _deformable(model: ModelConfig) -> dict:
    two_stages = model.proposals != "none"
    wanted = {"temperature": (10000.0, 10000.0), "position_shift": 0.5} if model.encoder_layers else {}
    if two_stages:
        wanted |= {"proposals": "objects", "proposal_padding": "official", "proposal_size": 0.05}
    for name, value in wanted.items():
        demand(getattr(model, name) == value, f"model.{name.replace('_', '-')}", getattr(model, name), _typed(value))
    enough = model.decoder_layers > 1 or two_stages  # it cannot tie a single layer's heads
    layers = "2 or more, or two stages (--model.proposals objects), as Deformable DETR of transformers"
    demand(enough, "model.decoder-layers", model.decoder_layers, layers)
    demand(model.width % 32 == 0, "model.width", model.width, "a multiple of 32, as Deformable DETR of transformers")
    return {
        "d_model": model.width,
        "num_queries": model.queries,
        "num_feature_levels": model.levels,
        "encoder_n_points": model.encoder_points,
        "decoder_n_points": model.decoder_points,
        "two_stage": two_stages,
        "two_stage_num_proposals": model.queries,
        "with_box_refine": model.box_refinement,
    }


def _typed(value) -> str:
    text = " ".join(f"{each:g}" for each in value) if isinstance(value, tuple) else value
    return f"{text}, as Deformable DETR of transformers"


def _backbone(own: BackboneConfig) -> dict:
    if own.kind == "transformers":
        return _of_transformers(own)
    demand(own.stem == "imagenet", "model.backbone.stem", own.stem, "imagenet, as ResNets of transformers")
    demand(own.norm != "group", "model.backbone.norm", own.norm, "frozen or batch, as ResNets of transformers")
    demand(
        not own.dilation, "model.backbone.dilation", own.dilation, "False: transformers' own ResNet is never dilated"
    )
    stages = max(own.outputs)
    bottleneck = own.depth >= 50 if own.bottleneck is None else own.bottleneck
    return {
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": 64,
        "hidden_sizes": [4 * width if bottleneck else width for width in own.planes[:stages]],
        "depths": list((own.blocks or BLOCKS[own.depth])[:stages]),
        "layer_type": "bottleneck" if bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "stage_names": ["stem", *(f"stage{number}" for number in range(1, stages + 1))],
        "out_features": [f"stage{number}" for number in own.outputs],
        "out_indices": list(own.outputs),
    }


def _of_transformers(own: BackboneConfig) -> dict:
    theirs = json.loads(own.settings)
    if "depths" in theirs:
        stages, outputs = len(theirs["depths"]), own.outputs
        last = f"numbers that end with the last of its {stages} stages, as backbones of transformers"
        demand(max(outputs) == stages, "model.backbone.outputs", own.outputs, last)
    else:  # a plain vision transformer's one map is its last block's
        one = "one of them, since transformers makes no pyramid of it"
        demand(len(own.outputs) == 1, "model.backbone.outputs", own.outputs, one)
        outputs = (theirs["num_hidden_layers"],)
    stages = [f"stage{number}" for number in range(1, max(outputs) + 1)]
    names = theirs.get("stage_names") or ["stem", *stages]
    features = [stages[number - 1] for number in outputs]
    return theirs | {
        "stage_names": names,
        "out_features": features,
        "out_indices": [names.index(name) for name in features],
    }
