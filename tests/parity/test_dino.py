"""DINO's own pieces against the official code's recorded numbers: proposals, their selection, contrastive noise."""

import goldens
import pytest
import torch

from dndetr.config import DenoisingConfig
from dndetr.denoising import noised_queries
from dndetr.models.features import Features, places_of_tokens
from dndetr.models.proposals import proposed_logits
from dndetr.models.queries import Queries

NOISE_CASES = goldens.unit_cases("dino_dn.pt", lambda c: f"{'_'.join(map(str, c['counts']))}-dn{c['dn_number']}")
PLACES = goldens.unit_cases("dino_dn.pt", lambda c: "x".join(map(str, c["proposals_logit"].shape)), of="proposals")
SELECTED = [
    (file, content)
    for file, content in goldens.model_files().items()
    if "two_stage" in content["cases"].get("base", {})
]
every_model = pytest.mark.parametrize("content", [c for _, c in SELECTED], ids=[file for file, _ in SELECTED])


def exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("more", [0, 3], ids=["exact-slots", "more-slots"])
@pytest.mark.parametrize("case", NOISE_CASES)
def test_contrastive_noise(case, more):
    groups, largest, noise = case["scalar"], case["slots"], (case["label_noise_scale"], case["box_noise_scale"])
    targets = goldens.pad_targets(case["labels"], case["boxes"], torch.float64, max(largest, 1) + more)
    drawn = goldens.recorded_noise(case["draws"], targets, groups, noise[0], contrastive=True)
    noised = noised_queries(targets, drawn, *noise, batch_active=True, contrastive=True)
    assert noised.active.tolist() == noised.counted.tolist() == [2 * largest] * len(case["counts"])

    image, slot = targets.valid.nonzero().unbind(1)
    entries = (image.repeat(2 * groups), torch.arange(groups).repeat_interleave(2 * len(image)))
    place = torch.cat((2 * slot, 2 * slot + 1)).repeat(groups)
    assert torch.equal(noised.labels[*entries, place], case["noised_labels"])
    exact(noised.boxes[*entries, place], case["noised_boxes"])
    assert torch.equal(noised.live, (torch.arange(noised.live.shape[1]) < 2 * targets.counts[:, None]))

    queries = Queries(case["hidden_dim"], 3, case["num_classes"], learned_content=True, indicator=False).double()
    queries.label_enc.weight.data = case["label_enc"]
    content, anchors = queries(len(case["counts"]), noised)
    within = torch.cat((torch.arange(largest) * 2, torch.arange(largest) * 2 + 1))
    rows = (torch.arange(groups)[:, None] * noised.labels.shape[2] + within).flatten()
    exact(content[:, rows], case["input_query_label"])
    exact(anchors[:, rows], case["input_query_bbox_logit"])
    # Who may see whom, among the rows that the official code has and the matching queries.
    blocked = noised.layout(case["num_queries"]).blocked(noised.active)[0]
    kept = torch.cat((rows, torch.arange(noised.layout(0).queries, len(blocked[0]))))
    assert torch.equal(blocked[kept][:, kept], case["attn_mask"])


@pytest.mark.parametrize("case", NOISE_CASES)
def test_number_of_groups(case):
    queries = 2 * case["dn_number"]
    config = DenoisingConfig(groups=queries, fill=queries if queries >= 100 else 0, contrastive=True)
    if case["slots"]:
        assert config.groups_for(case["slots"]) == case["scalar"]


@pytest.mark.parametrize("case", PLACES)
def test_places_of_proposals(case):
    shapes = tuple(map(tuple, case["spatial_shapes"].tolist()))
    inside = (~case["padding_mask"]).split([h * w for h, w in shapes], dim=1)
    levels = [level.unflatten(1, shape) for level, shape in zip(inside, shapes, strict=True)]
    sizes = torch.stack([torch.stack((x[:, :, 0].sum(1), x[:, 0].sum(1)), dim=-1) for x in levels], dim=1)
    valid, centres = places_of_tokens(sizes, shapes, torch.float64)
    assert torch.equal(valid, ~case["padding_mask"])
    features = Features(case["memory"], None, shapes, sizes, valid, centres)
    learned = case["learned_wh_logit"]
    logits, sound = proposed_logits(features, torch.float64, *([] if learned is None else [learned.double().sigmoid()]))
    assert torch.equal(sound, case["valid"].reshape(sound.shape))
    exact(logits, case["proposals_logit"])
    exact(features.tokens.masked_fill(~sound[..., None], 0), case["output_memory"])


@every_model
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_selection(content, training):
    model = goldens.load_model(content, torch.float64).train(training)
    seen = []
    model.proposals.register_forward_hook(lambda _module, inputs, output: seen.append((*inputs, output)))
    with torch.no_grad():
        model(*goldens.images(content, torch.float64))
    ((features, proposals),) = seen
    recorded = content["cases"]["base"]["two_stage"]
    places, sound = proposed_logits(features, torch.float64)
    exact(places, recorded["proposals_logit"])
    assert torch.equal(sound, recorded["proposals_valid"])
    assert torch.equal(proposals.index, recorded["topk_indices"])
    exact(proposals.anchors, recorded["refpoint_logit"])
    exact(places.gather(1, proposals.index[..., None].expand(-1, -1, 4)).sigmoid(), recorded["init_box_proposal"])
    with torch.no_grad():
        head, tokens = model.proposals, features.tokens.masked_fill(~sound[..., None], 0)
        memory = head.enc_output_norm(head.enc_output(tokens))
        torch.testing.assert_close(memory.float(), recorded["output_memory"], rtol=1e-6, atol=1e-6)
        exact(head.class_embed(memory), recorded["enc_class_unselected"])
        exact(head.bbox_embed(memory) + places, recorded["enc_coord_unselected_logit"])
        exact(head.class_embed(memory).amax(-1), recorded["scores"])
