"""Denoising in Hugging Face models: what it adds while training, and that nothing of it is there otherwise."""

import copy
import io
import pickle
import subprocess
import sys
from importlib import metadata

import hf_models
import pytest
import torch
from hf_models import CLASSES, QUERIES, every_kind, every_model, labels, pixels, reference_points
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection

import dndetr

COUNTS = (3, 0, 1)


def shaken(name: str, **config):
    """A model whose weights make every query listen to every other."""
    model = hf_models.build(name, **config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model


def run(model, targets=None, seed: int = 0, batch: int = len(COUNTS), **kwargs):
    """A forward pass with seeded noise."""
    torch.manual_seed(seed)
    dtype = next(model.parameters()).dtype
    return model(pixels(batch).to(dtype), labels=targets, **kwargs)


def tensors(output) -> dict:
    """All tensors of an output that is a dictionary, one level of nesting deep."""
    found = {}
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, (tuple, list)):
            found |= {f"{name}.{i}": x for i, x in enumerate(value) if isinstance(x, torch.Tensor)}
        elif isinstance(value, dict):
            found |= {f"{name}.{key}": x for key, x in value.items()}
    return found


def assert_bit_equal(first, second):
    first, second = tensors(first), tensors(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@every_kind
def test_evaluation_and_unlabelled_training_are_the_plain_models(name, contrastive):
    plain, denoised = hf_models.build(name), dndetr.denoise(hf_models.build(name), contrastive=contrastive)
    for training, targets in ((False, None), (False, labels(*COUNTS)), (True, None)):
        extra = {} if training else {"output_hidden_states": True}
        assert_bit_equal(run(plain.train(training), targets, **extra), run(denoised.train(training), targets, **extra))


@every_model
def test_what_is_saved_is_the_plain_model(name, tmp_path):
    plain, denoised = hf_models.build(name), dndetr.denoise(hf_models.build(name))
    before, after = plain.state_dict(), denoised.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    plain.load_state_dict(after)
    denoised.load_state_dict(before)  # strict, although it has more parameters
    with pytest.raises(RuntimeError, match="Missing key"):
        denoised.load_state_dict(dict(list(before.items())[1:]))

    plain.save_pretrained(tmp_path / "plain")
    denoised.save_pretrained(tmp_path / "denoised")
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "denoised")]
    assert files[0].keys() == files[1].keys()
    read, info = AutoModelForObjectDetection.from_pretrained(tmp_path / "denoised", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (tmp_path / "plain" / "config.json").read_text() == (tmp_path / "denoised" / "config.json").read_text()
    assert_bit_equal(run(plain.eval()), run(read.eval()))


@every_kind
def test_training_adds_the_denoising_loss_and_nothing_else(name, contrastive):
    model = shaken(name)
    config = model.config
    plain = run(model.train(), labels(*COUNTS))
    denoised = run(dndetr.denoise(model, groups=3, weight=0.5, contrastive=contrastive), labels(*COUNTS))
    assert set(denoised.loss_dict) - set(plain.loss_dict) == {
        f"dn_{part}{layer}" for part in ("loss_ce", "loss_bbox", "loss_giou") for layer in ("", "_0")
    }
    for key, value in tensors(plain).items():
        if key != "loss":
            torch.testing.assert_close(tensors(denoised)[key], value, rtol=1e-4, atol=1e-4, msg=key)
    coefficients = {"ce": 1, "bbox": config.bbox_loss_coefficient, "giou": config.giou_loss_coefficient}
    added = sum(
        value * coefficients[key.split("_")[2]] for key, value in denoised.loss_dict.items() if key.startswith("dn_")
    )
    torch.testing.assert_close(denoised.loss, plain.loss + 0.5 * added)


@every_kind
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_matching_queries_do_not_see_the_ground_truth(name, attention, contrastive):
    if (name, attention) == ("dab", "sdpa"):
        pytest.skip("transformers' DAB-DETR has no sdpa attention")
    model = shaken(name, **({"attn_implementation": "eager"} if attention == "eager" else {}))
    assert model.config._attn_implementation == attention
    dndetr.denoise(model.train(), groups=3, contrastive=contrastive)
    first, second = (run(model, labels(*COUNTS, seed=seed), seed=seed) for seed in (0, 1))
    for key in ("logits", "pred_boxes", "last_hidden_state"):
        torch.testing.assert_close(first[key], second[key], rtol=1e-5, atol=1e-5)
    assert (first.loss_dict["dn_loss_bbox"] - second.loss_dict["dn_loss_bbox"]).abs() > 1e-4


@pytest.mark.parametrize("name", [name for name in hf_models.MODELS if name != "detr"])  # it has no reference points
def test_noised_queries_start_at_their_boxes(name):
    model = dndetr.denoise(hf_models.build(name).train(), groups=2)
    captured = []
    model.model.register_forward_hook(lambda module, args, output: captured.append(output))
    run(model, labels(*COUNTS))
    (output,), noised = captured, model.denoising.step.noised
    points = reference_points(name, output)
    live = noised.live[:, None].expand(-1, 2, -1).flatten(1)
    expected = noised.boxes.flatten(1, 2)[live][:, : points.shape[-1]]
    assert points.shape[-1] == {"conditional": 2, "deformable": 2}.get(name, 4)
    torch.testing.assert_close(points[:, : live.shape[1]][live], expected, rtol=0, atol=1e-3)


@every_kind
def test_every_added_parameter_is_trained(name, contrastive):
    model = dndetr.denoise(hf_models.build(name).train(), contrastive=contrastive)
    run(model, labels(*COUNTS)).loss.backward()
    for key, parameter in model.denoising.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@every_kind
@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (QUERIES + 5, 2), (2,), (0,)], ids=str)
def test_odd_numbers_of_objects(name, counts, contrastive):
    model = dndetr.denoise(hf_models.build(name).train(), contrastive=contrastive)
    output = run(model, labels(*counts), batch=len(counts))
    output.loss.backward()
    assert output.loss.isfinite()
    # With several processes every parameter must take part in every step.
    assert all(parameter.grad is not None for parameter in model.denoising.parameters())
    assert (output.loss_dict["dn_loss_ce"] > 0) == (sum(counts) > 0)


@every_model
def test_denoising_can_be_taken_out(name):
    plain, model = hf_models.build(name).train(), hf_models.build(name).train()
    run(dndetr.denoise(model), labels(*COUNTS)).loss.backward()
    assert dndetr.denoise(model, groups=0) is model and not hasattr(model, "denoising")
    assert model.loss_function is plain.loss_function and "_loss_function" not in vars(model)
    assert_bit_equal(run(plain, labels(*COUNTS)), run(model, labels(*COUNTS)))
    for module, other in zip(model.modules(), plain.modules(), strict=True):
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks"):
            assert len(getattr(module, kind)) == len(getattr(other, kind))
    dndetr.denoise(model, groups=0)  # nothing to take out: nothing happens


@every_kind
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=("copy", "pickle")
)
def test_a_copy_denoises_by_itself(name, clone, contrastive):
    if name in ("lw", "rf") and clone is not copy.deepcopy:
        pytest.skip("transformers puts hooks that no pickle takes into this model's backbone")
    model = dndetr.denoise(hf_models.build(name).train(), groups=2, contrastive=contrastive)
    run(model, labels(*COUNTS)).loss.backward()
    other = clone(model)
    assert model.denoising.step is not None and other.denoising.step is None  # a step's tensors are not copied
    assert torch.equal(run(model, labels(*COUNTS)).loss, run(other, labels(*COUNTS)).loss)
    dndetr.denoise(model, groups=0)
    assert "dn_loss_ce" in run(other, labels(*COUNTS)).loss_dict
    dndetr.denoise(other, groups=0)
    assert_bit_equal(run(model, labels(*COUNTS)), run(other, labels(*COUNTS)))


def test_the_denoising_weights_can_be_saved_by_themselves():
    first, second = (dndetr.denoise(hf_models.build("deformable", seed)) for seed in range(2))
    file = io.BytesIO()
    torch.save(first.denoising.state_dict(), file)
    file.seek(0)
    assert not torch.equal(first.denoising.embedding.label.weight, second.denoising.embedding.label.weight)
    second.denoising.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(first.denoising.embedding.label.weight, second.denoising.embedding.label.weight)


@every_kind
def test_gradient_checkpointing_changes_nothing(name, contrastive):
    gradients = []
    for checkpointing in (False, True):
        model = shaken(name)
        if checkpointing:
            if not model.supports_gradient_checkpointing:
                pytest.skip("transformers has no gradient checkpointing for this model")
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        dndetr.denoise(model.train(), groups=2, contrastive=contrastive)
        loss = run(model, labels(*COUNTS)).loss
        run(model.eval())  # as an evaluation between forward and backward would
        model.train()
        loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-5, atol=1e-5, msg=key)


@every_kind
def test_autocast(name, contrastive):
    model = dndetr.denoise(hf_models.build(name).train(), contrastive=contrastive)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model, labels(*COUNTS))
    output.loss.backward()
    assert output.loss.isfinite() and model.denoising.embedding.label.weight.grad.isfinite().all()


def test_without_losses_of_earlier_layers_only_the_last_denoises():
    for name in ("dab", "conditional", "deformable", "detr", "rf"):
        model = dndetr.denoise(hf_models.build(name, auxiliary_loss=False).train())
        parts = run(model, labels(*COUNTS)).loss_dict
        assert sorted(key for key in parts if key.startswith("dn_")) == ["dn_loss_bbox", "dn_loss_ce", "dn_loss_giou"]


def test_a_tuple_is_returned_where_one_is_asked_for():
    model = dndetr.denoise(hf_models.build("conditional").train())
    loss, _, logits, *_ = run(model, labels(*COUNTS), return_dict=False)
    assert loss.ndim == 0 and logits.shape == (len(COUNTS), QUERIES, CLASSES)
    assert run(model, labels(*COUNTS), return_dict=None).logits.shape == logits.shape  # None: what the config says


def test_labels_are_found_among_positional_arguments():
    model = dndetr.denoise(hf_models.build("dab").train())
    output = model(pixels(2), None, None, None, None, None, labels(2, 1))
    assert "dn_loss_ce" in output.loss_dict


def test_a_forward_that_raises_leaves_a_usable_model():
    model = dndetr.denoise(hf_models.build("dab").train())
    with pytest.raises(ValueError, match="channel"):
        model(pixels(2)[:, :2], labels=labels(2, 1))
    assert not model.denoising.active
    assert run(model).logits.isfinite().all()
    assert run(model, labels(*COUNTS)).loss.isfinite()


@every_model
def test_settings_may_change_between_steps(name):
    plain, model = hf_models.build(name).train(), dndetr.denoise(hf_models.build(name).train())
    model.denoising.groups, model.denoising.box_noise = 2, 0.0
    run(model, labels(*COUNTS))
    noised = model.denoising.step.noised
    assert noised.labels.shape[1] == 2
    torch.testing.assert_close(noised.boxes[0, 0], labels(*COUNTS)[0]["boxes"])
    model.denoising.groups = 0
    output = run(model, labels(*COUNTS))
    torch.testing.assert_close(output.loss, run(plain, labels(*COUNTS)).loss)
    run(model.eval())  # has as many queries as the step, which is alive


def test_mistakes_are_named():
    model = hf_models.build("dab")
    with pytest.raises(ValueError, match="groups must be 0 or more"):
        dndetr.denoise(model, groups=-1)
    with pytest.raises(TypeError, match=r"works on DabDetr.*not on Linear"):
        dndetr.denoise(torch.nn.Linear(2, 2))
    dndetr.denoise(model)
    with pytest.raises(ValueError, match="denoised already"):
        dndetr.denoise(model)
    wrong = [{"class_labels": torch.zeros(2, dtype=torch.int64), "boxes": torch.rand(3, 4)}]
    with pytest.raises(ValueError, match=r"labels\[0\]: boxes must be \[2, 4\]"):
        model.train()(pixels(1), labels=wrong)
    with pytest.raises(ValueError, match="labels of 2 images, but 3 in the batch"):
        run(model, labels(2, 1))
    for label in (-1, CLASSES):
        with pytest.raises(ValueError, match=f"class_labels must be at least 0 and below {CLASSES}"):
            model(pixels(1), labels=[{"class_labels": torch.tensor([label]), "boxes": torch.rand(1, 4)}])
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        model(pixels(1), labels=labels(1))
    model = dndetr.denoise(hf_models.build("detr").train())
    with pytest.raises(ValueError, match="leave decoder_attention_mask out"):
        model(pixels(1), labels=labels(1), decoder_attention_mask=torch.ones(1, QUERIES))


def test_a_changed_class_is_refused(monkeypatch):
    model = hf_models.build("dab")
    attention = type(model.model.decoder.layers[0].self_attn)
    monkeypatch.setattr(attention, "forward", lambda self, hidden_states: hidden_states)
    with pytest.raises(RuntimeError, match=r"no argument attention_mask.*pip install"):
        dndetr.denoise(model)


@pytest.mark.parametrize("found", [None, "4.57.1", "6.0.0"])
def test_a_missing_or_unsupported_transformers_is_one_sentence(monkeypatch, found):
    def version(name):
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    for feature in (dndetr.denoise, dndetr.accelerate):
        with pytest.raises(ImportError, match="pip install 'transformers>=") as error:
            feature(torch.nn.Linear(1, 1))
        assert "\n" not in str(error.value)


def test_importing_does_not_import_transformers(root):
    code = "import sys, dndetr.hf; dndetr.denoise; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
