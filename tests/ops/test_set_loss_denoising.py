"""Which denoising queries have a loss, and which one: contrastive slots, counted slots, the encoder's proposals."""

import importlib
import math

import pytest
import torch
from fake_gpu import NoHostSync
from per_layer_losses import per_layer_losses
from set_losses import NAMES, WEIGHTS, run, weights_of

from dndetr.models.dn_detr import Predictions
from dndetr.ops import PARTS, CostWeights, GroupLayout, LossWeights, match, set_loss
from dndetr.ops import _set_loss_cases as cases

# The package exports the function under the module's name.
op = importlib.import_module("dndetr.ops.set_loss")

FAST = ("reference", "cpp")
LIKE_A_LOOP = [
    name
    for name in cases.DENOISING
    if cases.CASES[name][-1] in (torch.float32, torch.float64) and cases.CASES[name][1] and name not in cases.WEIGHTS
]


def check_like_a_loop(name, backend):
    """The sums of a plain loop over layers and images, and its gradients."""
    logits, boxes, _, layout, targets, _ = cases.make_case(name)
    cost, weights, options = CostWeights(), LossWeights(1.5, 4.0, 3.0), cases.make_options(name)
    matches = match(logits[:, :, layout.denoising :], boxes[:, :, layout.denoising :], targets, cost)
    objects = targets.counts.sum().clamp(min=1).to(logits.dtype)
    normalizers = torch.stack((objects, objects * layout.groups))
    inputs = (logits.requires_grad_(), boxes.requires_grad_())
    results = []
    for total, parts in (
        set_loss(*inputs, matches, layout, targets, normalizers, weights, backend, **options),
        per_layer_losses(Predictions(*inputs, layout), targets, cost, weights, **options),
    ):
        results.append((total, parts, *torch.autograd.grad(total, inputs)))
    torch.testing.assert_close(*results, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", LIKE_A_LOOP)
def test_like_a_loop_over_layers_and_images(extension, name, backend):
    check_like_a_loop(name, backend)


def roles(name):
    """Layer, image, query and role of every denoising query: "restores", "background" or "nothing"."""
    layers, batch, (groups, slots, _), _, counts, _ = cases.CASES[name]
    per_object, counted, proposals = cases.DENOISING[name]
    for layer in range(layers):
        for image in range(batch):
            seen = per_object * counts[image] if counted is None else counted[image]
            for group in range(groups):
                for slot in range(slots):
                    role = "background"
                    if slot >= seen or layer < proposals:
                        role = "nothing"
                    elif slot % per_object == 0 and slot // per_object < counts[image]:
                        role = "restores"
                    yield layer, image, group * slots + slot, role


def check_what_counts(name, backend):
    """Only logits that count and boxes that are paired are looked at; what is not has no gradient, were it NaN."""
    case, options = cases.make_case(name), cases.make_options(name) | {"weights": weights_of(name)}
    clean = run(case, backend, **options)
    for layer, image, query, role in roles(name):
        if role == "nothing":
            case[0][layer, image, query] = math.nan
        if role != "restores":
            case[1][layer, image, query] = math.nan
    given = run(case, backend, **options)
    for part in NAMES:
        assert torch.equal(given[part], clean[part]), part
    for layer, image, query, role in roles(name):
        place = layer, image, query
        assert given["grad logits"][place].ne(0).any() == (role != "nothing"), place
        assert given["grad boxes"][place].ne(0).any() == (role == "restores"), place


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", cases.DENOISING)
def test_only_what_counts_is_looked_at(extension, name, backend):
    check_what_counts(name, backend)


INTERPRETED = """
import importlib
from dndetr.ops import _set_loss_cases as cases
from test_set_loss_denoising import LIKE_A_LOOP, check_like_a_loop, check_what_counts
op = importlib.import_module("dndetr.ops.set_loss")

for name in LIKE_A_LOOP:
    check_like_a_loop(name, "triton")
for name in cases.DENOISING:
    if name not in cases.WEIGHTS:
        check_what_counts(name, "triton")
assert op._self_test("cpu", "triton") < 1e-5
"""


def test_triton_in_the_interpreter(interpreter):
    interpreter(INTERPRETED)


def test_cases_have_every_role():
    found = {name: {role for *_, role in roles(name)} for name in cases.DENOISING}
    assert found["contrastive"] == {"restores", "background", "nothing"}
    assert found["contrastive-no-targets"] == {"background", "nothing"}
    assert found["contrastive-bf16"] == {"restores", "background", "nothing"}
    assert found["proposals"] == {"nothing"}


@pytest.mark.parametrize("backend", FAST)
def test_the_slots_of_objects_count_where_nothing_else_is_said(extension, backend):
    case = cases.make_case("contrastive")
    counts = case[4].counts
    told, plain = run(case, backend, counted=2 * counts), run(case, backend)
    assert all(torch.equal(told[part], plain[part]) for part in NAMES)
    # One slot more is one query more of the background.
    more = run(case, backend, counted=2 * counts + 1)
    assert torch.equal(more["parts"][:, :3], plain["parts"][:, :3])
    assert (more["parts"][:, PARTS.index("dn_label")] > plain["parts"][:, PARTS.index("dn_label")]).all()
    for part in ("dn_l1", "dn_giou"):
        assert torch.equal(more["parts"][:, PARTS.index(part)], plain["parts"][:, PARTS.index(part)])


@pytest.mark.parametrize("backend", FAST)
def test_numbers_of_slots_may_be_longer_integers_or_strided(extension, backend):
    case = cases.make_case("contrastive")
    plain = run(case, backend, counted=torch.tensor([5, 12], dtype=torch.int32))
    for counted in (torch.tensor([5, 12]), torch.tensor([5, 0, 12, 0], dtype=torch.int32)[::2]):
        assert torch.equal(run(case, backend, counted=counted)["parts"], plain["parts"])


@pytest.mark.parametrize("backend", FAST)
def test_proposals_of_the_encoder_are_matched_as_every_layer(extension, backend):
    case = cases.make_case("contrastive")
    plain, given = run(case, backend), run(case, backend, proposals=2)
    assert torch.equal(given["parts"][:, :3], plain["parts"][:, :3])
    assert given["parts"][:2, 3:].eq(0).all() and plain["parts"][:2, 3:].gt(0).all()
    assert torch.equal(given["parts"][2], plain["parts"][2])


@pytest.mark.parametrize("forgotten", ["slots of an object", "slots that count", "proposals"])
def test_the_self_test_finds_a_kernel_that_forgets_a_number(extension, monkeypatch, forgotten):
    problem = op._problem

    def wrong(module, inputs, groups, per_object, proposals, *weights):
        if forgotten == "slots of an object":
            groups, per_object = groups * per_object, 1
        elif forgotten == "slots that count":
            inputs = (*inputs[:6], 2 * inputs[5], inputs[7])
        else:
            proposals = 0
        kept.append(inputs)
        return problem(module, inputs, groups, per_object, proposals, *weights)

    kept = []  # what pointers point to
    assert op._self_test("cpu", "cpp") <= 1e-4
    monkeypatch.setattr(op, "_problem", wrong)
    assert not op._self_test("cpu", "cpp") <= 1e-4


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ["contrastive", "contrastive-bf16"])
def test_no_number_is_asked_for(extension, name, backend):
    """Neither with ``counted`` nor without, so that a step can be captured."""
    case, options = cases.make_case(name), cases.make_options(name)
    set_loss(*case, WEIGHTS, backend, **options)  # the first call of an op tests it
    with NoHostSync():
        run(case, backend, **options)


def test_wrong_input_is_an_error():
    logits, boxes, matches, _, targets, normalizers = case = cases.make_case("contrastive")
    for slots in (0, 5, 13):
        with pytest.raises(ValueError, match=f"padded to 6 per image, but the denoising groups have {slots} slots"):
            set_loss(logits, boxes, matches, GroupLayout(2, slots, 9), targets, normalizers)
    with pytest.raises(ValueError, match=r"set_loss: counted must be \[2\]"):
        set_loss(*case, counted=torch.zeros(3, dtype=torch.int32))
    for proposals in (-1, 4):
        with pytest.raises(ValueError, match=f"between 0 and the 3 layers of logits, got {proposals}"):
            set_loss(*case, proposals=proposals)
    set_loss(*case, proposals=3)
