"""Models that others have wrapped: changed inside the wrapper or refused, and after any error as they were."""

import sys

import hf_models
import pytest
import torch
from hf_models import labels, pixels
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import dndetr
from dndetr.hf.matching import MatchedLoss
from dndetr.models.linear import Linear


def distributed(model):
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return DistributedDataParallel(model, find_unused_parameters=True)


def with_adapters(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


class HandsOn(nn.Module):
    """A wrapper of somebody's own, with the attributes of what is inside."""

    def __init__(self, model):
        super().__init__()
        self.inside = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inside, name)

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data-parallel": DataParallel,
    "distributed": distributed,
    "twice": lambda model: torch.compile(distributed(model), backend="eager"),
}


@pytest.fixture(autouse=True)
def _no_group_is_left():
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def trace_of(model) -> list:
    """Everything that we may change in a model."""
    kept = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
    modules = [(name, type(module), *(len(vars(module)[k]) for k in kept)) for name, module in model.named_modules()]
    return [*modules, *("_loss_function" in vars(module) for module in model.modules())]


def loss(model):
    torch.manual_seed(0)
    return model(pixel_values=pixels(2), labels=labels(3, 1)).loss


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "twice" else []) for name in WRAPPERS]
)
def test_a_wrapped_model_is_accelerated_inside(name):
    model = hf_models.build("deformable").eval()
    wrapped = WRAPPERS[name](model)
    before, expected = trace_of(model), loss(wrapped)
    done = dndetr.accelerate(wrapped)
    assert done.model is model and len(done.attention) == 3 and done.linear
    assert isinstance(model.loss_function, MatchedLoss)
    calls = []
    attention = model.model.decoder.layers[0].encoder_attn.attn
    attention.register_forward_hook(lambda module, *_: calls.append(type(module).__module__))
    torch.testing.assert_close(loss(model), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss(wrapped), expected, rtol=1e-4, atol=1e-4)
    assert "dndetr.hf.attention" in calls
    attention._forward_hooks.clear()
    done.undo()
    assert trace_of(model) == before


def test_a_model_with_adapters_is_accelerated_inside():
    wrapped = with_adapters(hf_models.build("conditional")).eval()
    before, expected = trace_of(wrapped), loss(wrapped)
    done = dndetr.accelerate(wrapped)
    assert done.model is wrapped.get_base_model()
    assert any(type(module) is Linear for module in wrapped.modules())
    torch.testing.assert_close(loss(wrapped), expected, rtol=1e-4, atol=1e-4)
    done.undo()
    assert trace_of(wrapped) == before


def test_a_wrapper_that_is_not_known_is_refused_before_anything_is_changed():
    wrapped = HandsOn(hf_models.build("deformable"))
    before = trace_of(wrapped)
    with pytest.raises(TypeError, match="HandsOn is wrapped around a model of transformers: give the model inside"):
        dndetr.accelerate(wrapped)
    assert trace_of(wrapped) == before
    assert dndetr.accelerate(wrapped.inside).matcher is not None


@pytest.mark.parametrize("part", ["MatchedLoss.__init__", "set_loss_function", "Acceleration._replace_products"])
def test_an_acceleration_that_fails_changes_nothing(monkeypatch, part):
    model = hf_models.build("deformable")
    before = trace_of(model)

    def fail(*_):
        raise RuntimeError("does not fit")

    owner, _, name = part.rpartition(".")
    module = sys.modules["dndetr.hf.accelerate"]
    monkeypatch.setattr(getattr(module, owner) if owner else module, name, fail)
    with pytest.raises(RuntimeError, match="does not fit"):
        dndetr.accelerate(model)
    assert trace_of(model) == before


def test_an_unknown_layer_after_known_ones_changes_nothing():
    model = hf_models.build("deformable")
    attention = model.model.decoder.layers[1].encoder_attn.attn

    class MultiScaleDeformableAttention(type(attention)):
        __module__ = type(attention).__module__

        def forward(self, value):
            return value

    attention.__class__ = MultiScaleDeformableAttention
    before = trace_of(model)
    with pytest.raises(RuntimeError, match=r"takes \(self, value\), expected"):
        dndetr.accelerate(model)
    assert trace_of(model) == before


@pytest.mark.parametrize("groups", [5, 0])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_would_not_notice_denoising_is_refused(wrap, groups):
    model = hf_models.build("deformable")
    if groups == 0:
        dndetr.denoise(model)
    before = trace_of(model)
    with pytest.raises(TypeError, match="denoise the model first, then wrap it") as error:
        dndetr.denoise(wrap(model), groups=groups)
    assert "\n" not in str(error.value) and trace_of(model) == before


def test_denoising_that_fails_half_way_changes_nothing(monkeypatch):
    model = hf_models.build("conditional")
    before = trace_of(model)
    with monkeypatch.context() as patch:
        last = model.model.decoder.layers[-1].self_attn
        patch.setattr(last, "register_forward_pre_hook", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dndetr.denoise(model)
    assert trace_of(model) == before and not hasattr(model, "denoising")
    assert "dn_loss_ce" in dndetr.denoise(model).train()(pixels(1), labels=labels(2)).loss_dict


def test_denoising_weights_of_another_model_are_not_half_taken():
    model, other = (dndetr.denoise(hf_models.build("conditional", num_labels=n)) for n in (5, 7))
    before = {name: value.clone() for name, value in model.denoising.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"embedding.label.weight is \[7, 32\] there and \[5, 32\] here") as error:
        model.denoising.load_state_dict(other.denoising.state_dict())
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.denoising.state_dict().items())


def test_adapters_and_denoising():
    wrapped = with_adapters(hf_models.build("conditional"))
    before = trace_of(wrapped)
    assert dndetr.denoise(wrapped, groups=2) is wrapped
    loss(wrapped.train()).backward()
    assert all(p.grad is not None for p in wrapped.denoising.parameters())
    dndetr.denoise(wrapped, groups=0)
    assert trace_of(wrapped) == before


def test_denoising_weights_that_are_frozen_are_told():
    model = dndetr.denoise(hf_models.build("conditional")).train()
    model.requires_grad_(False)  # as PEFT does with all that it finds
    with pytest.warns(UserWarning, match="the weights of denoising are frozen"):
        loss(model)
