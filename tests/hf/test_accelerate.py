"""Our attention and matcher inside Hugging Face models: equal results, and a way back."""

import copy
import io
import pickle
import re

import hf_models
import pytest
import torch
import transformers
from hf_models import CLASSES, QUERIES, both_kinds, labels, pixels
from hf_steps import assert_equal_steps, look_far, step

import dndetr
from dndetr.hf.attention import sample_points
from dndetr.hf.matching import MatchedLoss, Matcher
from dndetr.models import linear
from dndetr.models.linear import Linear

_SMALL = {
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 24, 32],
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "num_queries": QUERIES,
    "num_labels": CLASSES,
    "hidden_expansion": 1.0,
    "dropout": 0.0,
    "num_denoising": 4,
    "freeze_backbone_batch_norms": False,
}


def _rt_detr(name: str, **config):
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    kind, model = (getattr(transformers, name + suffix) for suffix in ("Config", "ForObjectDetection"))
    return model(kind(backbone_config=backbone, **(_SMALL | config)))


MODELS = {
    "deformable": lambda: hf_models.MODELS["deformable"](with_box_refine=True),
    "deformable-two-stage": hf_models.MODELS["deformable-two-stage"],
    "rt-detr": lambda: _rt_detr("RTDetr"),
    "rt-detr-v2": lambda: _rt_detr("RTDetrV2"),
    "d-fine": lambda: _rt_detr("DFine", decoder_n_points=[3, 6, 3]),
}
GROUPED = {name: hf_models.MODELS[name] for name in ("lw", "rf")}
ATTENTION_LAYERS = {name: 3 if name.startswith("deformable") else 2 for name in (*MODELS, *GROUPED)}
LOSSES = dict.fromkeys(("deformable", "deformable-two-stage"), "losses of DeformableDetrForObjectDetectionLoss")
LOSSES |= dict.fromkeys(GROUPED, "losses of LwDetrForObjectDetectionLoss")
every_model = pytest.mark.parametrize("name", MODELS)
every_loss = pytest.mark.parametrize("name", [*MODELS, *GROUPED])


def build(name: str):
    """A model with weights that make attention look far away."""
    torch.manual_seed(0)
    return look_far((MODELS | GROUPED)[name]())


@every_loss
def test_outputs_losses_and_gradients_are_equal(name):
    model = build(name).train()
    before = step(model)
    done = dndetr.accelerate(model)
    assert len(done.attention) == ATTENTION_LAYERS[name] and done.matcher is not None
    assert len(done.linear) == sum(type(module) is Linear for module in model.modules()) > 0
    assert f"deformable attention in {ATTENTION_LAYERS[name]} layers, float32 products of" in str(done)
    assert f" {len(done.linear)} linear layers, and the {LOSSES.get(name, 'matcher of')}" in str(done)
    assert_equal_steps(before, step(model))


def test_linear_layers_that_would_gain_nothing_stay_torchs(monkeypatch):
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: False)
    model = build("deformable")
    done = dndetr.accelerate(model)
    assert done.attention and not done.linear and not any(type(module) is Linear for module in model.modules())
    assert "linear" not in str(done)


@every_loss
def test_losses_in_evaluation_are_equal(name):
    model = build(name).eval()

    def losses():
        with torch.no_grad():
            output = model(pixels(3), labels=labels(4, 0, 2))
        return {"loss": output.loss} | {key: x for key, x in output.loss_dict.items() if isinstance(x, torch.Tensor)}

    plain = losses()
    dndetr.accelerate(model)
    torch.testing.assert_close(losses(), plain, rtol=1e-4, atol=1e-4)


@every_model
def test_our_op_is_what_runs(name, monkeypatch):
    model = build(name).eval()
    calls = []
    attention = "dndetr.hf.attention.ms_deform_attn"
    from dndetr.ops import ms_deform_attn

    monkeypatch.setattr(attention, lambda *args: calls.append(args) or ms_deform_attn(*args))
    model(pixels(1))
    assert not calls
    dndetr.accelerate(model)
    model(pixels(1))
    assert len(calls) >= ATTENTION_LAYERS[name]


@every_model
def test_it_can_be_undone(name):
    model = build(name)
    kinds = [type(module) for module in model.modules()]
    before, state = step(model), copy.deepcopy(model.state_dict())
    done = dndetr.accelerate(model)
    assert model.state_dict().keys() == state.keys()
    with pytest.raises(TypeError, match="nothing to replace"):
        dndetr.accelerate(model)
    done.undo()
    done.undo()
    assert [type(module) for module in model.modules()] == kinds and "_loss_function" not in vars(model)
    for first, second in zip(before, step(model), strict=True):
        assert all(torch.equal(value, second[key]) for key, value in first.items())


@every_model
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=("copy", "pickle"))
def test_copies_are_accelerated_too(name, clone):
    model = build(name)
    done = dndetr.accelerate(model)
    other = clone(model)
    done.undo()
    assert isinstance(other.loss_function, MatchedLoss)
    assert_equal_steps(step(model), step(other))
    with pytest.raises(TypeError, match="nothing to replace"):
        dndetr.accelerate(other)


def test_a_copy_is_undone_by_its_own_acceleration():
    model = build("d-fine")
    kinds = [type(module) for module in model.modules()]
    done = dndetr.accelerate(model)
    for clone in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        other, undone = clone((model, done))
        undone.undo()
        assert [type(module) for module in other.modules()] == kinds
        assert not other.model.decoder.layers[0].encoder_attn.ms_deformable_attn_core.__module__.startswith("dndetr")
        assert not isinstance(other.loss_function, MatchedLoss) and isinstance(model.loss_function, MatchedLoss)
        assert model.model.decoder.layers[0].encoder_attn.ms_deformable_attn_core is sample_points


class Detections(torch.nn.Module):
    """What a model finds, as tensors alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        output = self.model(images)
        return output.logits, output.pred_boxes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["deformable", "rt-detr-v2", "d-fine"])
def test_a_trace_holds_plain_operations(name):
    plain, model = Detections(build(name).eval()), Detections(build(name).eval())
    dndetr.accelerate(model.model)
    traced = torch.jit.trace(model, pixels(1), check_trace=False)
    assert not {"mkldnn", "dndetr"} & set(re.findall(r"(\w+)::", str(traced.inlined_graph)))
    for found, expected in zip(traced(pixels(1)), plain(pixels(1)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_an_onnx_file_from_a_trace():
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    model = Detections(hf_models.build("dab").eval())
    dndetr.accelerate(model.model)
    file = io.BytesIO()
    torch.onnx.export(model, (pixels(1),), file, dynamo=False)
    model.eval()
    session = onnxruntime.InferenceSession(file.getvalue())
    found = session.run(None, {session.get_inputs()[0].name: pixels(1).numpy()})
    for values, expected in zip(found, model(pixels(1)), strict=True):
        torch.testing.assert_close(torch.from_numpy(values), expected, rtol=1e-3, atol=1e-4)


def test_functional_transforms_are_those_of_the_plain_model():
    plain, model = Detections(build("deformable").eval()), Detections(build("deformable").eval())
    dndetr.accelerate(model.model)

    def gradients(detections):
        def total(parameters):
            return sum(x.sum() for x in torch.func.functional_call(detections, parameters, (pixels(1),)))

        return torch.func.grad(total)(dict(detections.named_parameters()))

    for (name, found), expected in zip(gradients(model).items(), gradients(plain).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=name)


@every_model
def test_saved_weights_are_the_plain_models(name, tmp_path):
    model = build(name).eval()
    plain = model(pixels(1)).logits
    dndetr.accelerate(model)
    model.save_pretrained(tmp_path)
    read, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(read.eval()(pixels(1)).logits, plain, rtol=1e-6, atol=1e-6)


@both_kinds
@pytest.mark.parametrize("first", ["denoise", "accelerate"])
def test_denoising_and_acceleration_go_together(first, contrastive):
    plain, model = build("deformable").train(), build("deformable").train()
    dndetr.denoise(plain, groups=2, contrastive=contrastive)
    if first == "denoise":
        dndetr.denoise(model, groups=2, contrastive=contrastive)
        done = dndetr.accelerate(model)
    else:
        done = dndetr.accelerate(model)
        dndetr.denoise(model, groups=2, contrastive=contrastive)
    model.denoising.load_state_dict(plain.denoising.state_dict())
    assert isinstance(model.denoising.own_loss, MatchedLoss)
    assert_equal_steps(step(plain), step(model))
    if first == "denoise":
        done.undo()
        assert not isinstance(model.denoising.own_loss, MatchedLoss) and "dn_loss_ce" in step(model)[0]
        dndetr.denoise(model, groups=0)
    else:
        dndetr.denoise(model, groups=0)
        assert isinstance(model.loss_function, MatchedLoss)
        done.undo()
    assert "_loss_function" not in vars(model)


@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (QUERIES + 4, 1)], ids=str)
def test_the_matcher_finds_what_transformers_finds(counts):
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher

    draw = torch.Generator().manual_seed(2)
    outputs = {
        "logits": torch.randn(2, QUERIES, CLASSES, generator=draw),
        "pred_boxes": 0.1 + 0.3 * torch.rand(2, QUERIES, 4, generator=draw),
    }
    weights = {"class_cost": 1.5, "bbox_cost": 5.0, "giou_cost": 2.0}
    theirs = DeformableDetrHungarianMatcher(**weights)(outputs, labels(*counts))
    ours = Matcher(**weights)(outputs, labels(*counts))
    for (query, target), (own_query, own_target) in zip(theirs, ours, strict=True):
        assert torch.equal(query, own_query) and torch.equal(target, own_target)


@pytest.mark.parametrize("counts", [(5, 2), (0, 0), (30, 1)], ids=str)
@pytest.mark.parametrize(("queries", "sets"), [(60, 3), (62, 3), (300, 13), (13, 13)], ids=str)
def test_the_matcher_knows_sets_of_queries(queries, sets, counts):
    from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher

    draw = torch.Generator().manual_seed(3)
    outputs = {
        "logits": torch.randn(2, queries, CLASSES, generator=draw),
        "pred_boxes": 0.1 + 0.3 * torch.rand(2, queries, 4, generator=draw),
    }
    weights = {"class_cost": 2.0, "bbox_cost": 5.0, "giou_cost": 2.0}
    theirs = LwDetrHungarianMatcher(**weights)(outputs, labels(*counts), sets)
    ours = Matcher(**weights)(outputs, labels(*counts), sets)
    for (query, target), (own_query, own_target) in zip(theirs, ours, strict=True):
        assert torch.equal(query, own_query) and torch.equal(target, own_target)


def test_fewer_queries_than_sets_are_an_error_in_both():
    from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher

    outputs = {"logits": torch.zeros(1, 2, CLASSES), "pred_boxes": torch.full((1, 2, 4), 0.5)}
    with pytest.raises(RuntimeError, match="split_size"):
        LwDetrHungarianMatcher()(outputs, labels(1), 3)
    with pytest.raises(ValueError, match="3 sets need as many queries at least, got 2"):
        Matcher()(outputs, labels(1), 3)


@pytest.mark.parametrize("points", [[4, 4], [3, 5]], ids=str)
def test_points_per_level(points):
    from transformers.models.d_fine.modeling_d_fine import multi_scale_deformable_attention_v2

    draw = torch.Generator().manual_seed(4)
    shapes, total = [(6, 5), (3, 4)], sum(points)
    value = torch.randn(2, 42, 4, 8, generator=draw)
    locations = torch.rand(2, 7, 4, total, 2, generator=draw) * 1.2 - 0.1
    weights = torch.rand(2, 7, 4, total, generator=draw)
    expected = multi_scale_deformable_attention_v2(value, shapes, locations, weights, points)
    torch.testing.assert_close(sample_points(value, shapes, locations, weights, points), expected)


def test_what_cannot_be_replaced_is_left_alone():
    discrete = _rt_detr("RTDetrV2", decoder_method="discrete")
    assert not dndetr.accelerate(discrete).attention
    matcher_only = dndetr.accelerate(hf_models.build("dab"))
    assert not matcher_only.attention and matcher_only.matcher == "DeformableDetrHungarianMatcher"
    attention_only = dndetr.accelerate(hf_models.build("deformable").model)
    assert attention_only.attention and attention_only.matcher is None and "no matcher" in str(attention_only)
    with pytest.raises(TypeError, match="nothing to replace in Linear"):
        dndetr.accelerate(torch.nn.Linear(2, 2))


def test_a_changed_layer_is_refused(monkeypatch):
    model = hf_models.build("deformable")
    layer = type(model.model.encoder.layers[0].self_attn.attn)
    monkeypatch.setattr(layer, "forward", lambda self, value: value)
    with pytest.raises(RuntimeError, match=r"takes \(self, value\), expected"):
        dndetr.accelerate(model)
