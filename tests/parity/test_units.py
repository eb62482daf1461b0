"""The method's pieces against the official code's recorded numbers, in float64."""

import goldens
import pytest
import torch

from dndetr.boxes import cxcywh_to_xyxy, generalized_iou, inverse_sigmoid, iou_and_union
from dndetr.denoising import noised_queries
from dndetr.models.encoder import MSDeformAttn
from dndetr.models.features import Features
from dndetr.models.queries import Queries
from dndetr.ops import GroupLayout, anchor_encoding, ms_deform_attn, pixel_encoding
from dndetr.ops.class_loss import focal_loss

MSDA_CASES = goldens.unit_cases(
    "msda_core.pt", lambda c: f"{c['mode']}-{c['M']}x{c['D']}-q{c['Lq']}-l{c['L']}p{c['P']}"
)
MODULE_CASES = goldens.unit_cases("msda_module.pt", lambda c: f"ref{c['reference_points'].shape[-1]}")
NOISE_CASES = goldens.unit_cases(
    "dn_noise.pt", lambda c: f"{c['kind']}-{'_'.join(map(str, c['counts']))}", keep=lambda c: c["kind"] != "dino"
)
MASK_CASES = goldens.unit_cases(
    "dn_attn_masks.pt", lambda c: f"q{c['num_queries']}p{c['num_patterns']}g{c['scalar']}s{c['single_pad']}"
)


@pytest.fixture(scope="module")
def primitives():
    return goldens.unit("primitives.pt")


def exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_boxes(primitives):
    golden = primitives["boxes"]
    a, b = cxcywh_to_xyxy(golden["a_cxcywh"]), cxcywh_to_xyxy(golden["b_cxcywh"])
    exact(a, golden["a_xyxy"])
    iou, union = iou_and_union(a[:, None], b)
    exact(iou, golden["iou"])
    exact(union, golden["union"])
    exact(generalized_iou(a[:, None], b), golden["giou"])


def test_giou_loss_and_gradient(primitives):
    golden = primitives["giou_loss"]
    boxes = golden["pred"].clone().requires_grad_()
    loss = 1 - generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(golden["target"]))
    exact(loss.detach(), golden["loss"])
    (loss * golden["weights"]).sum().backward()
    exact(boxes.grad, golden["grad_pred"])


def test_focal_loss_and_gradient(primitives):
    golden = primitives["focal"]
    assert golden["gamma"] == 2.0
    queries = golden["logits"].shape[1]
    logits = golden["logits"].clone().requires_grad_()
    # The recorded targets may hold several classes a query, so every class is a problem of its own here.
    labels = torch.where(golden["targets"] > 0, 0, -1)
    loss = focal_loss(logits[..., None], labels, golden["alpha"]).sum() / golden["num_boxes"]
    exact(loss.detach(), golden["loss_ce"])
    (loss / queries).backward()
    exact(logits.grad, golden["grad_of_loss_before_times_Q"])


def test_inverse_sigmoid(primitives):
    golden = primitives["inverse_sigmoid"]
    exact(inverse_sigmoid(golden["x"], golden["eps"]), golden["y"])


@pytest.mark.parametrize(
    ("name", "temperature", "shift"),
    [
        ("dab_sine_hw_T20", (20.0, 20.0), 0.0),
        ("dab_sine_hw_T1000_20", (1000.0, 20.0), 0.0),
        ("deformable_sine_T10000", (10000.0, 10000.0), 0.5),
    ],
)
def test_pixel_encoding(primitives, name, temperature, shift):
    golden = primitives["posenc"]
    padded = golden["mask"]
    sizes = torch.stack(((~padded)[:, :, 0].sum(1), (~padded)[:, 0].sum(1)), dim=-1)
    shape = tuple(padded.shape[1:])
    sides, width = torch.tensor([shape]), golden["hidden_dim"]
    ours = pixel_encoding(sizes[:, None], (shape,), sides, width, temperature, shift, torch.float64)
    ours, expected = ours.transpose(1, 2).unflatten(2, shape), golden[name]
    valid = ~padded[:, None]
    exact(ours * valid, expected * valid)
    # Outside, the official code takes sines of angles in the millions, where float64 has fewer digits left.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


def test_anchor_encoding(primitives):
    golden = primitives["posenc"]
    channels = golden["hidden_dim"] // 2
    exact(anchor_encoding(golden["anchors"], channels), golden["anchor_sine_embed"])
    exact(anchor_encoding(golden["anchors"][..., :2], channels), golden["anchor_sine_embed_xy_only"])


@pytest.mark.parametrize("case", MSDA_CASES)
def test_deformable_attention(case):
    value, locations, weights = (
        case[name].clone().requires_grad_() for name in ("value", "sampling_locations", "attention_weights")
    )
    shapes = tuple(map(tuple, case["spatial_shapes"].tolist()))
    out = ms_deform_attn(value, shapes, locations, weights)
    exact(out.detach(), case["output"])
    out.backward(case["grad_output"])
    exact(value.grad, case["grad_value"])
    exact(weights.grad, case["grad_attention_weights"])
    if "grad_sampling_locations" in case:  # not where points sit on pixel centres: a kink
        exact(locations.grad, case["grad_sampling_locations"])


@pytest.mark.parametrize("case", MODULE_CASES)
def test_deformable_attention_module(case):
    module = MSDeformAttn(case["d_model"], case["n_heads"], case["n_levels"], case["n_points"]).double()
    module.load_state_dict(case["state_dict"])
    query, reference, tokens = (
        case[name].clone().requires_grad_() for name in ("query", "reference_points", "input_flatten")
    )
    shapes = tuple(map(tuple, case["spatial_shapes"].tolist()))
    # The recorded mask is no rectangle, as images' masks are: it is applied where the official module does.
    padded = case["padding_mask"][..., None]
    module.value_proj.register_forward_hook(lambda _module, _inputs, value: value.masked_fill(padded, 0))
    features = Features(tokens, None, shapes, None, None)
    out = module(query, reference, features)
    exact(out.detach(), case["output"])
    out.backward(case["grad_output"])
    exact(query.grad, case["grad_query"])
    exact(reference.grad, case["grad_reference_points"])
    exact(tokens.grad, case["grad_input_flatten"])
    for name, parameter in module.named_parameters():
        exact(parameter.grad, case["grad_params"][name])


def test_initial_sampling_directions():
    module = goldens.unit("msda_module.pt")
    bias = MSDeformAttn(256, 8, 4, 4).sampling_offsets.bias.detach()
    torch.testing.assert_close(bias, module["default_init_sampling_offsets_bias"].float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", NOISE_CASES)
def test_noise(case):
    groups, slots = case["scalar"], case["single_pad"]
    targets = goldens.pad_targets(case["labels"], case["boxes"], torch.float64)
    noise = goldens.recorded_noise(case["draws"], targets, groups, case["label_noise_scale"])
    noised = noised_queries(targets, noise, case["label_noise_scale"], case["box_noise_scale"], batch_active=True)
    where = targets.valid.nonzero()
    image, slot = where[:, 0].repeat(groups), where[:, 1].repeat(groups)
    group = torch.arange(groups).repeat_interleave(len(where))
    assert torch.equal(noised.labels[image, group, slot], case["noised_labels"])
    exact(noised.boxes[image, group, slot], case["noised_boxes"])

    queries = Queries(
        case["hidden_dim"], case["num_queries"], case["num_classes"], case["kind"] == "deformable", case["num_patterns"]
    ).double()
    with torch.no_grad():
        queries.label_enc.weight.copy_(case["label_enc"])
        queries.refpoint_embed.weight.copy_(case["refpoint_embed"])
        if queries.tgt_embed is not None:
            queries.tgt_embed.weight.copy_(case["tgt_embed"])
        if queries.patterns is not None:
            queries.patterns.weight.zero_()  # the official code adds them later, in the transformer
        content, anchors = queries(len(case["counts"]), noised)
    skipped = noised.layout(1).denoising - case["pad_size"]  # the one slot we keep when nothing is there to denoise
    assert skipped == (groups if slots == 0 else 0)
    exact(content[:, skipped:], case["input_query_label"])
    exact(anchors[:, skipped:], case["input_query_bbox_logit"])


@pytest.mark.parametrize("case", MASK_CASES)
def test_attention_mask(case):
    matching = case["num_queries"] * max(1, case["num_patterns"])
    layout = GroupLayout(case["scalar"], case["single_pad"], matching)
    assert layout.denoising == case["pad_size"]
    assert torch.equal(layout.blocked(), case["attn_mask"])
