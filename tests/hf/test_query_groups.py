"""Denoising in models with query groups: what noised queries see there, and training fewer of the groups."""

import copy
import json

import hf_models
import pytest
import torch
import torch.nn.functional as F
from hf_models import GROUPS, QUERIES, labels, pixels
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import dndetr
from dndetr.hf.query_groups import LISTS, TABLES

COUNTS = (3, 0, 1)
NOISED = 2 * max(COUNTS)
both = pytest.mark.parametrize("name", ["lw", "rf"])


def shaken(name: str, **config):
    """A model in training whose weights make every query listen to every other it can see."""
    model = hf_models.build(name, **config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model.train()


def run(model, **kwargs):
    """A labelled forward pass with seeded noise."""
    torch.manual_seed(0)
    return model(pixels(len(COUNTS)), labels=labels(*COUNTS), **kwargs)


def gradients(model) -> dict:
    """Those that are there and not all zero."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@both
def test_noised_queries_see_the_first_query_group_and_no_other(name):
    model = dndetr.denoise(shaken(name), groups=2)
    found, loss = [], model.loss_function
    model.loss_function = lambda logits, *rest: found.append(logits.detach()) or loss(logits, *rest)
    run(model)
    for group in range(GROUPS):
        rows = model.model.query_feat.weight.detach()[group * QUERIES : (group + 1) * QUERIES]
        before = rows.clone()
        rows += 1.0
        run(model)
        rows.copy_(before)
    plain, *others = found
    for group, logits in enumerate(others):
        moved = (logits - plain).abs().amax(-1)
        own = slice(NOISED + group * QUERIES, NOISED + (group + 1) * QUERIES)
        assert (moved[:, own] > 1e-3).all()
        assert torch.equal(moved[:, NOISED : own.start], torch.zeros_like(moved[:, NOISED : own.start]))
        assert (moved[0, :NOISED].amax() > 1e-4) == (group == 0)


@both
def test_attention_of_noised_queries_is_masked_attention(name):
    model = dndetr.denoise(shaken(name), groups=2)
    calls = []
    attention = model.model.decoder.layers[1].self_attn
    model.model.decoder.layers[1].register_forward_pre_hook(
        lambda layer, args, kwargs: calls.append((args[0], kwargs["position_embeddings"])), with_kwargs=True
    )
    attention.register_forward_hook(lambda module, args, output: calls.append(output[0]))
    run(model)
    ((content, place), output), step = calls, model.denoising.step
    seen = NOISED + QUERIES
    blocked = step.layout._replace(matching=QUERIES).blocked(step.noised.active)[:, None]

    def by_the_mask(content, place):
        content, place = content[:, :seen], (content + place)[:, :seen]
        parts = attention.q_proj(place), attention.k_proj(place), attention.v_proj(content)
        q, k, v = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in parts)
        return attention.o_proj(F.scaled_dot_product_attention(q, k, v, ~blocked).transpose(1, 2).flatten(2))[
            :, :NOISED
        ]

    alive = step.layout.slot_alive(step.noised.active)
    expected = by_the_mask(content, place)
    torch.testing.assert_close(output[:, :NOISED][alive], expected[alive], rtol=1e-5, atol=1e-6)
    weights = torch.randn(expected[alive].shape)
    inputs = [content, place, attention.q_proj.weight, attention.o_proj.bias]
    found = torch.autograd.grad((output[:, :NOISED][alive] * weights).sum(), inputs, retain_graph=True)
    wanted = torch.autograd.grad((expected[alive] * weights).sum(), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@both
def test_what_is_recorded_holds_matching_queries_only(name):
    model = shaken(name, attn_implementation="eager")
    expected = run(model, output_attentions=True, output_hidden_states=True)
    found = run(dndetr.denoise(model), output_attentions=True, output_hidden_states=True)
    for key in ("attentions", "cross_attentions", "hidden_states"):
        assert len(found[key]) == len(expected[key]) > 1
        for one, other in zip(found[key], expected[key], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def first_groups(model, kept: int, name: str):
    """A model built with so many groups, and the first groups' weights of ``model``."""
    smaller = hf_models.build(name, group_detr=kept).train()
    state = model.state_dict()
    for table in TABLES:
        state[f"model.{table}.weight"] = state[f"model.{table}.weight"][: kept * QUERIES]
    smaller.load_state_dict({key: state[key] for key in smaller.state_dict()})
    return smaller


@both
@pytest.mark.parametrize("kept", [1, 2])
def test_kept_groups_are_a_model_with_as_many(name, kept):
    model = shaken(name)
    smaller = dndetr.denoise(first_groups(model, kept, name), groups=2)
    dndetr.denoise(model, groups=2, keep_groups=kept)
    model.denoising.load_state_dict(smaller.denoising.state_dict())
    outputs = [run(smaller), run(model)]
    for key, value in outputs[0].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(outputs[1][key], value, rtol=1e-6, atol=1e-6, msg=key)
    assert outputs[1].logits.shape[1] == kept * QUERIES
    assert outputs[0].loss_dict.keys() == outputs[1].loss_dict.keys()
    for output in outputs:
        output.loss.backward()
    expected, found = gradients(smaller), gradients(model)
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        rows = found[key][: len(gradient)]
        torch.testing.assert_close(rows, gradient, rtol=1e-5, atol=1e-6, msg=key)
        assert not found[key][len(gradient) :].any()  # of idle groups in the two tables
    assert run(model.eval()).logits.shape[1] == QUERIES
    with torch.no_grad():  # without labels, and of the model without heads
        model.train()
        assert model(pixels(1)).logits.shape[1] == kept * QUERIES
        assert model.model(pixels(1)).last_hidden_state.shape[1] == kept * QUERIES


@both
def test_idle_groups_stay_as_they_are(name, tmp_path):
    plain, model = shaken(name), shaken(name)
    before = copy.deepcopy(model.state_dict())
    config = model.config
    dndetr.denoise(model, keep_groups=1)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert json.loads(model.config.to_json_string())["group_detr"] == GROUPS
    for output, expected in zip(run(model.eval()).values(), run(plain.eval()).values(), strict=True):
        assert not isinstance(output, torch.Tensor) or torch.equal(output, expected)

    run(model.train()).loss.backward()
    assert model.config is config
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0).step()
    after, idle = model.state_dict(), 0
    for key, value in before.items():
        part = key.split(".")
        if part[1] in LISTS and int(part[2]) > 0:
            assert torch.equal(value, after[key]) and not model.get_parameter(key).requires_grad
            idle += 1
        elif part[1] in TABLES:
            assert torch.equal(value[QUERIES:], after[key][QUERIES:])
            assert not torch.equal(value[:QUERIES], after[key][:QUERIES])
    assert idle == (GROUPS - 1) * (2 + 2 + 6 + 2)

    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path)
    assert read.config.group_detr == GROUPS and read.model.query_feat.weight.shape[0] == GROUPS * QUERIES
    assert torch.equal(read.eval()(pixels(1)).logits, model.eval()(pixels(1)).logits)


@pytest.mark.parametrize("used", [False, True])
def test_kept_groups_are_undone(used):
    plain, model = shaken("rf"), shaken("rf")
    frozen = [model.model.enc_output[2].bias, plain.model.enc_output[2].bias]
    for bias in frozen:
        bias.requires_grad = False
    dndetr.denoise(model, keep_groups=2)
    other = copy.deepcopy(model)
    if used:
        run(model), run(other)
    for copied in (model, other):
        dndetr.denoise(copied, groups=0)
        assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in plain.parameters()]
        assert copied.model.group_detr == GROUPS
        assert all(layer.self_attn.config is copied.config for layer in copied.model.decoder.layers)
        torch.testing.assert_close(run(copied).loss, run(plain).loss, rtol=0, atol=0)


def test_a_copy_keeps_groups_by_itself():
    model = dndetr.denoise(shaken("rf"), groups=2, keep_groups=2)
    other = copy.deepcopy(model)
    expected = run(model).loss
    dndetr.denoise(model, groups=0)
    assert torch.equal(run(other).loss, expected)
    assert other.config.group_detr == GROUPS


@pytest.mark.parametrize("kind", CheckpointImpl)
def test_layers_computed_again_have_their_groups(kind):
    found = []
    for checkpointed in (False, True):
        model = shaken("rf")
        torch.manual_seed(5)
        dndetr.denoise(model, groups=2, keep_groups=2)
        layers = model.model.decoder.layers
        for place, layer in enumerate(layers):
            layers[place] = checkpoint_wrapper(layer, checkpoint_impl=kind) if checkpointed else layer
        loss = run(model).loss
        run(model.eval())  # as an evaluation between forward and backward would
        model.train()
        loss.backward()
        found.append({key.replace("_checkpoint_wrapped_module.", ""): x for key, x in gradients(model).items()})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-5, atol=1e-5, msg=key)


def test_a_forward_that_raises_leaves_the_model_as_it_was():
    model = dndetr.denoise(shaken("rf"), keep_groups=1)
    config = model.config
    for where in (model.model.decoder.layers[1].cross_attn.value_proj, model.model.decoder.layers[0].self_attn.o_proj):
        handle = where.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model)
        handle.remove()
        assert model.config is config and not set(TABLES) & set(vars(model.model))
    assert run(model).loss.isfinite()


@pytest.mark.parametrize("then", ["evaluate", "undo"])
def test_an_interrupted_forward_is_followed_by_anything(then):
    def interrupt(*_):
        raise KeyboardInterrupt  # for which PyTorch calls no hook

    model = dndetr.denoise(shaken("rf"), groups=2, keep_groups=1)
    config = model.config
    handle = model.model.decoder.layers[0].self_attn.o_proj.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    handle.remove()
    if then == "evaluate":
        assert run(model.eval()).logits.shape[1] == QUERIES
    else:
        dndetr.denoise(model, groups=0)
        assert run(model).logits.shape[1] == GROUPS * QUERIES and model.model.group_detr == GROUPS
    assert model.config is config and not set(TABLES) & set(vars(model.model))


@pytest.mark.parametrize("first", ["denoise", "accelerate"])
def test_kept_groups_and_acceleration_go_together(first):
    plain, model = (shaken("rf") for _ in range(2))
    kinds = [type(module) for module in model.modules()]
    dndetr.denoise(plain, groups=2, keep_groups=2)
    if first == "accelerate":
        done = dndetr.accelerate(model)
    dndetr.denoise(model, groups=2, keep_groups=2).denoising.load_state_dict(plain.denoising.state_dict())
    if first == "denoise":
        done = dndetr.accelerate(model)
    assert done.matcher and len(done.attention) == 2
    outputs = [run(plain), run(model)]
    for output in outputs:
        output.loss.backward()
    for key in ("loss", "logits", "pred_boxes"):
        torch.testing.assert_close(outputs[1][key], outputs[0][key], rtol=1e-4, atol=1e-4)
    expected, found = gradients(plain), gradients(model)
    largest = max(float(value.abs().max()) for value in expected.values())
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * largest, msg=key)
    if first == "denoise":
        done.undo()
        dndetr.denoise(model, groups=0)
    else:
        dndetr.denoise(model, groups=0)
        done.undo()
    assert [type(module) for module in model.modules()] == kinds and "_loss_function" not in vars(model)


def test_no_process_waits_for_gradients_of_idle_groups():
    model = dndetr.denoise(shaken("lw"), keep_groups=1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second step would raise
            run(wrapped).loss.backward()
    finally:
        torch.distributed.destroy_process_group()


def test_mistakes_are_named():
    for name, kept, message in (
        ("dab", 1, "DabDetrForObjectDetection has no query groups: leave keep_groups out"),
        ("rf", 0, f"keep_groups must be between 1 and {GROUPS}, the query groups of this RfDetr"),
        ("lw", GROUPS + 1, "got 4"),
    ):
        model = hf_models.build(name)
        with pytest.raises(ValueError, match=message) as error:
            dndetr.denoise(model, keep_groups=kept)
        assert "\n" not in str(error.value) and not hasattr(model, "denoising")
    with pytest.raises(ValueError, match="leave keep_groups out"):
        dndetr.denoise(model, groups=0, keep_groups=1)
