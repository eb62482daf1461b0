"""What denoising keeps of a forward pass is that pass's: several before one backward, layers computed again."""

import hf_models
import pytest
import torch
from callers import every_caller
from hf_models import labels, pixels
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import dndetr
from dndetr.denoising import draw_noise
from dndetr.hf.labels import to_targets
from dndetr.hf.matching import Matcher

BATCHES = {"as-many-objects": ((3, 1), (3, 2)), "more-objects": ((3, 1), (5, 2)), "three": ((2, 2), (4, 1), (2, 2))}


def transformers_own(reentrant: bool):
    def enable(model):
        if not model.supports_gradient_checkpointing:
            pytest.skip("transformers has no gradient checkpointing for this model")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    return enable


def around_layers(reentrant: bool):
    """Hooks of what is in a layer run again with it, as they do in transformers up to 5.23."""
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT

    def enable(model):
        layers = model.model.decoder.layers
        for place, layer in enumerate(layers):
            layers[place] = checkpoint_wrapper(layer, checkpoint_impl=kind)

    return enable


CHECKPOINTING = {
    "transformers": transformers_own(False),
    "transformers-reentrant": transformers_own(True),
    "around-layers": around_layers(False),
    "around-layers-reentrant": around_layers(True),
}


def denoised(name: str, checkpointing=None):
    torch.manual_seed(5)
    model = dndetr.denoise(hf_models.build(name), groups=2).train()
    if checkpointing is not None:
        checkpointing(model)
    return model


def gradients(model, batches, alternating: bool = False) -> dict:
    """Of several passes and one backward; alternating: every other pass has contrastive denoising."""
    torch.manual_seed(6)
    losses = []
    for seed, counts in enumerate(batches):
        model.denoising.contrastive = alternating and seed % 2 == 0
        losses.append(model(pixels(len(counts), seed=seed), labels=labels(*counts, seed=seed)).loss)
    model.eval()(pixels(1))  # as an evaluation between forward and backward would
    model.train()
    sum(losses).backward()
    return {
        key.replace("_checkpoint_wrapped_module.", ""): p.grad
        for key, p in model.named_parameters()
        if p.grad is not None
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.parametrize("alternating", [False, True], ids=["plain", "alternating"])
@pytest.mark.parametrize("name", ["conditional", "dab", "deformable"])
def test_several_passes_before_one_backward_have_their_own_masks(name, alternating, checkpointing):
    for batches in BATCHES.values():
        expected = gradients(denoised(name), batches, alternating)
        found = gradients(denoised(name, checkpointing), batches, alternating)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.filterwarnings("ignore")
def test_a_layer_whose_input_was_moved_is_refused():
    model = denoised("conditional", around_layers(reentrant=True))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        loss = model(pixels(2), labels=labels(3, 1)).loss
    with pytest.raises(RuntimeError, match=r"denoising: a layer is computed again .*activation offloading"):
        loss.backward()


def test_masks_go_with_their_passes():
    model = denoised("conditional")
    for seed in range(3):
        model(pixels(2), labels=labels(3, 1, seed=seed)).loss.backward()
    layers = len(model.model.decoder.layers)
    assert len(model.denoising.steps) == layers
    kept = [model(pixels(2), labels=labels(3, 1)).loss for _ in range(3)]
    assert len(model.denoising.steps) == layers * len(kept)


def test_threads_that_share_the_module_are_refused():
    model = denoised("dab")
    model._is_replica = True  # as nn.DataParallel makes them, which needs two GPUs
    with pytest.raises(RuntimeError, match=r"does not run under nn\.DataParallel"):
        model(pixels(1), labels=labels(1))
    model.eval()(pixels(1))


@every_caller
def test_targets_noise_and_matches_do_not_depend_on_what_the_caller_has_set(caller):
    given = labels(3, 0, 1)
    draw = torch.Generator().manual_seed(7)
    outputs = {
        "logits": torch.randn(3, 20, 5, generator=draw),
        "pred_boxes": 0.2 + 0.5 * torch.rand(3, 20, 4, generator=draw),
    }

    def results():
        targets = to_targets(given, torch.device("cpu"))
        noise = draw_noise(targets, 2, 5, torch.Generator("cpu").manual_seed(8))
        matches = [index for pair in Matcher()(outputs, given) for index in pair]
        return [targets.labels, targets.boxes, targets.counts, *noise, *matches]

    expected = results()
    with caller():
        found = results()
    for value, other in zip(found, expected, strict=True):
        assert value.dtype == other.dtype and value.device == other.device and torch.equal(value, other)
