"""Backbones of transformers as parts of our detectors: the same maps, and nothing that a step must not have."""

import copy
import json
from dataclasses import replace

import backbones
import detectors
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dndetr.model_config import BackboneConfig, ModelConfig
from dndetr.models.build import build_backbone, build_model
from dndetr.models.layers import Recomputable
from dndetr.models.transformers_backbone import TransformersBackbone
from dndetr.training.lowered import Lowered
from dndetr.training.optim import build_optimizer

pytest.importorskip("transformers", reason='transformers is not installed (pip install -e ".[hf]")')
every_kind = pytest.mark.parametrize("kind", backbones.SETTINGS)
STAGED = [kind for kind in backbones.SETTINGS if kind not in backbones.PLAIN]


def shaken(model):
    """The model with no tensor as it was made: zeros and ones hide what is left out."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(noise + 0.5 if "var" in name else value + 0.2 * (noise - 0.5))
    return model


def built(kind: str, **changes) -> TransformersBackbone:
    torch.manual_seed(0)
    return shaken(build_backbone(backbones.backbone(kind, **changes)))


def images(height=96, width=128, dtype=torch.float32):
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))
    return x.to(dtype, memory_format=torch.channels_last)


def auto_backbone(kind: str, **changes):
    """AutoBackbone's own model, in evaluation mode."""
    from transformers import CONFIG_MAPPING, AutoBackbone

    return AutoBackbone.from_config(CONFIG_MAPPING[kind](**{**backbones.SETTINGS[kind], **changes})).eval()


@pytest.mark.parametrize("outputs", [(4,), (2, 3), (1, 2), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", STAGED)
def test_maps_are_those_of_auto_backbone_to_the_bit(kind, outputs):
    ours = built(kind, outputs=outputs).eval()
    theirs = auto_backbone(kind, out_features=[f"stage{number}" for number in outputs])
    found = theirs.load_state_dict(ours.model.state_dict(), strict=False)
    assert not found.unexpected_keys
    # Only stages that no output needs are not there, and counters of batch norms.
    first_left_out = {name for name in found.missing_keys if not name.endswith("num_batches_tracked")}
    assert max(outputs) < 4 or not first_left_out
    with torch.no_grad():
        maps, expected = ours(images()), theirs(images()).feature_maps
    assert len(maps) == len(expected) == len(outputs)
    for one, other, width, stride in zip(maps, expected, ours.widths, ours.strides, strict=True):
        assert torch.equal(one, other)
        assert one.shape == (2, width, 96 // stride, 128 // stride)


@pytest.mark.parametrize("kind", backbones.PLAIN)
def test_one_output_of_a_plain_transformer_is_its_last_map(kind):
    ours, theirs = built(kind, outputs=(4,)).eval(), auto_backbone(kind)
    theirs.load_state_dict(ours.model.state_dict())
    with torch.no_grad():
        (found,), (expected,) = ours(images()), theirs(images()).feature_maps
    assert torch.equal(found, expected)
    assert (ours.strides, ours.multiple, found.shape) == ([16], 16, (2, 32, 6, 8))


@pytest.mark.parametrize("kind", backbones.PLAIN)
def test_several_outputs_of_a_plain_transformer_are_a_pyramid(kind):
    ours = built(kind, outputs=(1, 2, 3, 4)).eval()
    with torch.no_grad():
        maps, (own,) = ours(images()), ours.model(images()).feature_maps
    assert ours.strides == [4, 8, 16, 32] and ours.multiple == 32
    assert [x.shape[1:] for x in maps] == [(8, 24, 32), (16, 12, 16), (32, 6, 8), (32, 3, 4)]
    assert ours.widths == [8, 16, 32, 32]
    assert torch.equal(maps[2], own)
    assert torch.equal(maps[3], torch.nn.functional.max_pool2d(own, 2))


@pytest.mark.parametrize("outputs", [(1, 2), (2, 3), (2, 4)], ids=str)
def test_canvases_hold_whole_patches_whatever_the_pyramid_makes_of_them(outputs):
    assert built("dinov2", outputs=outputs).multiple == (32 if 4 in outputs else 16)


def test_a_norm_behind_the_last_stage_goes_with_it():
    """Of BiT it is a group norm."""
    settings = {"model_type": "bit", "embedding_size": 8, "hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 1, 1]}
    config = replace(backbones.backbone("swin"), settings=json.dumps(settings | {"num_groups": 4}), outputs=(1, 2))
    backbone = build_backbone(config)
    assert (backbone.widths, backbone.strides) == ([16, 16], [4, 8])


def test_a_pyramid_learns_at_the_full_rate_and_the_rest_at_the_backbones():
    model = build_model(backbones.detector("dinov2", outputs=(2, 3, 4)), 3)
    rest, backbone = build_optimizer(model, 1.0, 0.1).param_groups
    pyramid = list(model.backbone.pyramid.parameters())
    assert pyramid and (rest["lr"], backbone["lr"]) == (1.0, 0.1)
    assert {id(p) for p in pyramid} <= {id(p) for p in rest["params"]}
    trained = {id(p) for p in model.backbone.model.parameters() if p.requires_grad}
    assert {id(p) for p in backbone["params"]} == trained


class OnTheHost(TorchDispatchMode):
    """Keeps what has to do with the host's tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.is_cpu for x in tree_leaves((args, kwargs, result))):
            self.seen.append(op)
        return result


@every_kind
def test_a_step_takes_nothing_from_the_host_and_gives_it_nothing(kind):
    """No value decides anything, and nothing is copied, which a graph could not hold: tensors here are nowhere."""
    backbone = build_backbone(backbones.backbone(kind)).train().to("meta")
    with OnTheHost() as host:
        sum(x.sum() for x in backbone(torch.empty(2, 3, 96, 128, device="meta"))).backward()
    assert not host.seen


def test_what_the_host_has_is_seen():
    with OnTheHost() as host:
        torch.empty(3, device="meta").copy_(torch.zeros(3))
    assert len(host.seen) == 2


@every_kind
def test_nothing_in_training_is_random(kind):
    drops = {
        name: 0.5
        for name in ("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")
    }
    shakes = {"pos_embed_shift": 0.5, "pos_embed_jitter": 1.5, "pos_embed_rescale": 2.0} if kind == "dinov3_vit" else {}
    settings = json.dumps({"model_type": kind, **backbones.SETTINGS[kind], **drops, **shakes})
    backbone = shaken(build_backbone(replace(backbones.backbone(kind), settings=settings, norm="frozen"))).train()
    before = torch.get_rng_state()
    first, again = backbone(images()), backbone(images())
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, first, again))


@every_kind
@pytest.mark.parametrize("outputs", [(4,), (2, 3)], ids=str)
def test_every_parameter_that_wants_a_gradient_gets_one(kind, outputs):
    """Several processes would wait for it, and weight decay eat what has none."""
    backbone = built(kind, outputs=outputs, frozen=0).train()
    sum((x.square() * torch.rand_like(x)).sum() for x in backbone(images())).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.requires_grad == (name.removeprefix("model.") not in backbone.idle), name


@every_kind
def test_gradients_have_the_strides_of_their_weights(kind):
    backbone = built(kind, frozen=0).train().to(memory_format=torch.channels_last)
    sum(x.square().sum() for x in backbone(images())).backward()
    found = {
        name: (weight.shape, weight.stride(), weight.grad.stride())
        for name, weight in backbone.model.named_parameters()
        if weight.grad is not None and weight.grad.stride() != weight.stride()
    }
    assert not found


def test_what_no_output_needs_is_not_there():
    stages = (
        {name.split(".")[4] for name in built("swin", outputs=(n,)).state_dict() if ".layers." in name} for n in (4, 2)
    )
    assert list(map(sorted, stages)) == [["0", "1", "2", "3"], ["0", "1"]]


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("swin", ["swin.embeddings.", "swin.encoder.layers.0.", "swin.encoder.layers.1."]),
        ("convnextv2", ["embeddings.", "encoder.stages.0.", "encoder.stages.1."]),
        ("dinov2", ["embeddings.", "encoder.layer.0.", "encoder.layer.1."]),
        ("resnet", ["embedder.", "encoder.stages.0.", "encoder.stages.1."]),
    ],
)
def test_frozen_counts_parts_from_the_first(kind, parts):
    for frozen in range(4):
        backbone = built(kind, frozen=frozen, norm="batch").train()
        for name, parameter in backbone.model.named_parameters():
            expected = not name.startswith(tuple(parts[:frozen])) and name not in backbone.idle
            assert parameter.requires_grad == expected, (frozen, name)
        for name, module in backbone.model.named_modules():
            if not list(module.children()):
                assert module.training != f"{name}.".startswith(tuple(parts[:frozen])), (frozen, name)


@pytest.mark.parametrize("kind", ["hgnet_v2", "resnet", "rt_detr_resnet"])
def test_frozen_norms_know_nothing_of_the_batch(kind):
    backbone = built(kind).train()
    before = copy.deepcopy(backbone.state_dict())
    with torch.no_grad():
        both, alone = backbone(images()), backbone(images()[:1])
    for one, other in zip(both, alone, strict=True):
        torch.testing.assert_close(one[:1], other, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    trained = built(kind, norm="batch", frozen=0).train()
    trained(images())
    moved = [name for name, value in trained.state_dict().items() if "running_mean" in name]
    assert moved and not any(torch.equal(before[name], trained.state_dict()[name]) for name in moved[:1])


@every_kind
def test_recomputing_blocks_changes_memory_and_nothing_else(kind):
    ends = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = build_model(replace(backbones.detector(kind), checkpointing=recomputed), 3)
        backbone = shaken(model.backbone).train()
        assert any(isinstance(m, Recomputable) and m.recomputed for m in backbone.model.modules()) == recomputed
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            maps = backbone(images())
        sum(x.square().sum() for x in maps).backward()
        grads = [p.grad for p in backbone.model.parameters() if p.grad is not None]
        ends.append((sum(kept), *maps, *grads))
    assert ends[1][0] < ends[0][0]
    assert all(map(torch.equal, ends[0][1:], ends[1][1:]))


@every_kind
def test_half_precision_is_near(kind):
    model = build_model(backbones.detector(kind), 3)
    backbone = shaken(model.backbone).train()
    exact = backbone(images())
    with torch.autocast("cpu", torch.bfloat16):
        rough = Lowered(backbone, torch.bfloat16)(images())
    for one, other in zip(exact, rough, strict=True):
        assert (one - other.float()).norm() < 0.1 * one.norm()
    sum(x.float().square().sum() for x in rough).backward()
    assert all(p.grad.dtype == torch.float32 for p in backbone.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("swin", "convnextv2", "dinov2") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in backbones.SETTINGS
    ],
)
def test_it_exports_for_any_batch(kind):
    backbone = built(kind).eval().requires_grad_(False)
    any_batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(backbone, (images().contiguous(),), dynamic_shapes=(any_batch,))
    other = images().contiguous()[[1, 0, 1]]
    for found, expected in zip(program.module()(other), backbone(other), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["swin", "dinov2"])
def test_a_step_with_averages_learns(kind):
    model = build_model(backbones.detector(kind), detectors.CLASSES)
    step = detectors.make_step(model, lr=3e-3)
    batch = detectors.make_batch([3, 5], 8)
    history = [step(batch)[0].total.item() for _ in range(12)]
    assert sum(history[-3:]) < 0.9 * sum(history[:3])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter in step.optimizer.state}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("", "is empty: a backbone's own configuration is read from --model.backbone.name"),
        ("{", "is no JSON"),
        ("[1]", "names no model_type"),
        ('{"model_type": "bert"}', "bert is no backbone"),
        ('{"model_type": "swin", "embed_dim": "wide"}', "no swin is like this"),
        ('{"model_type": "swin", "embed_dim": 10, "num_heads": [3, 3, 3, 3]}', "."),
        ('{"model_type": "hiera"}', "the backbone hiera cannot be used: it takes no images of 224x448"),
        ('{"model_type": "pp_lcnet_v4"}', "the backbone pp_lcnet_v4 cannot be used: .* 16 down and 4 across"),
        ('{"model_type": "uvdoc"}', "model.backbone.settings: uvdoc straightens pages of text"),
        ('{"model_type": "swin", "patch_size": 6, "embed_dim": 12}', "swin cannot be used: its strides do not divide"),
    ],
)
def test_settings_of_no_backbone_end_in_one_line(settings, told):
    with pytest.raises(ValueError, match=told) as error:
        TransformersBackbone(settings)
    assert "\n" not in str(error.value)


def test_settings_alone_make_the_same_model_again():
    config = ModelConfig(backbone=BackboneConfig(kind="transformers", name="gone/away", outputs=(4,), settings="x"))
    settings = backbones.backbone("convnextv2").settings
    config = replace(config, backbone=replace(config.backbone, settings=settings))
    one = build_model(config, 3)
    assert one.state_dict().keys() == build_model(config, 3).state_dict().keys()
    assert all(name.startswith(("model.", "pyramid.")) for name in one.backbone.state_dict())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kind": "transformers"}, "--model.backbone.kind transformers: give --model.backbone.name too"),
        ({"name": "swin-tiny"}, "--model.backbone.name swin-tiny: give --model.backbone.kind transformers too"),
        ({"kind": "transformers", "name": "x", "norm": "group"}, "--model.backbone.norm group: give frozen or batch"),
        ({"kind": "transformers", "name": "x", "outputs": (5,)}, "--model.backbone.outputs"),
    ],
)
def test_settings_that_contradict_each_other(changes, told):
    with pytest.raises(ValueError, match=told):
        BackboneConfig(**changes)


def test_it_is_the_same_whoever_builds_it():
    with torch.no_grad():
        found = built("swin").idle
    assert found == built("swin").idle != set()


def test_fewer_stages_of_our_own_do_not_limit_those_of_others():
    config = BackboneConfig(kind="transformers", name="x", planes=(8, 8), blocks=(1, 1), outputs=(3, 4))
    assert config.outputs == (3, 4)
