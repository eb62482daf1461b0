"""Denoised Hugging Face models in training: on real images, and under transformers' Trainer."""

import itertools
import json

import hf_models
import numpy as np
import pytest
import torch
from goldens import SHARED
from hf_models import both_kinds, labels, pixels
from PIL import Image
from transformers import AutoModelForObjectDetection, Trainer, TrainingArguments

import dndetr

pytest.importorskip("accelerate", reason='accelerate is not installed (pip install -e ".[hf]")')
TINY_COCO = SHARED / "data" / "coco_tiny"


@pytest.fixture(scope="module")
def crops():
    """Four images' middles, 128 x 128, and the objects whose centre is inside: pixel_values, labels, classes."""
    if not TINY_COCO.is_dir():
        pytest.skip(f"no data at {TINY_COCO} (set DNDETR_SHARED)")
    data = json.loads((TINY_COCO / "annotations" / "instances_train.json").read_text())
    classes = {category["id"]: number for number, category in enumerate(data["categories"])}
    images, targets = [], []
    for record in data["images"]:
        left, top = record["width"] // 2 - 128, record["height"] // 2 - 128
        found = []
        for annotation in data["annotations"]:
            if annotation["image_id"] != record["id"] or annotation["iscrowd"]:
                continue
            x, y, w, h = annotation["bbox"]
            x0, y0, x1, y1 = (np.clip(v, 0, 256) / 256 for v in (x - left, y - top, x + w - left, y + h - top))
            if 0 < x + w / 2 - left < 256 and 0 < y + h / 2 - top < 256:
                found.append((classes[annotation["category_id"]], (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0))
        if not found:
            continue
        image = Image.open(TINY_COCO / "train" / record["file_name"]).convert("RGB")
        image = image.crop((left, top, left + 256, top + 256)).resize((128, 128))
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1)
        rows = torch.tensor(found, dtype=torch.float32)
        targets.append({"class_labels": rows[:, 0].long(), "boxes": rows[:, 1:]})
        if len(images) == 4:
            return torch.stack(images), targets, len(classes)
    raise AssertionError("too few crops with objects")


@pytest.mark.parametrize(
    "name, accelerated, contrastive",
    [
        *itertools.product(("dab", "conditional", "deformable"), (False, True), (False, True)),
        ("detr", False, False),
        ("detr", False, True),
    ],
)
def test_twenty_steps_on_real_crops(name, accelerated, contrastive, crops):
    images, targets, classes = crops
    model = dndetr.denoise(hf_models.build(name, num_labels=classes).train(), groups=3, contrastive=contrastive)
    if accelerated:
        dndetr.accelerate(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, denoising = [], []
    for _ in range(20):
        output = model(images, labels=targets)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(output.loss.detach())
        denoising.append(sum(value for key, value in output.loss_dict.items() if key.startswith("dn_loss")))
    for history in (losses, denoising):
        history = torch.stack(history)
        assert history.isfinite().all()
        assert history[-5:].mean() < 0.95 * history[:5].mean(), history


def test_the_decoder_learns_to_reject_negatives():
    counts, groups = (3, 2), 5
    torch.manual_seed(0)
    model = dndetr.denoise(hf_models.build("deformable-two-stage"), groups, label_noise=0.0, contrastive=True).train()
    dndetr.accelerate(model)
    predicted, losses, loss = [], [], model.loss_function
    model.loss_function = lambda logits, *rest: predicted.append(logits.detach()) or loss(logits, *rest)
    images, targets = pixels(2), labels(*counts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(50):
        optimizer.zero_grad()
        output = model(images, labels=targets)
        output.loss.backward()
        losses.append(output.loss_dict["dn_loss_ce"])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    scores = torch.stack(predicted).sigmoid()[:, :, : groups * 2 * max(counts)].unflatten(2, (groups, max(counts), 2))
    own = torch.cat(  # scores of each object's class, [steps, objects * groups, 2]
        [
            scores[:, image, :, number, :, int(label)]
            for image, found in enumerate(targets)
            for number, label in enumerate(found["class_labels"])
        ],
        dim=1,
    )
    positive, negative = own[-10:].flatten(0, -2).mean(0)
    assert positive > negative + 0.05
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


class Shapes(torch.utils.data.Dataset):
    """Eight random images with one to three objects."""

    def __len__(self):
        return 8

    def __getitem__(self, number):
        return {"pixel_values": pixels(1, seed=number)[0], "labels": labels(1 + number % 3, seed=number)[0]}


def together(samples):
    """Images stacked, labels as a list."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": [sample["labels"] for sample in samples],
    }


def make_trainer(model, folder, steps: int, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=3,
        **options,
    )
    return Trainer(model, arguments, together, Shapes(), Shapes(), callbacks=[dndetr.hf.KeepDenoising()])


@both_kinds
def test_the_trainer_trains_evaluates_and_resumes_exactly(contrastive, tmp_path):
    whole = dndetr.denoise(hf_models.build("dab"), contrastive=contrastive)
    label_table = whole.denoising.embedding.label.weight.detach().clone()
    trainer = make_trainer(whole, tmp_path / "whole", 4)
    trainer.train()
    assert not torch.equal(label_table, whole.denoising.embedding.label.weight)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4 and np.isfinite(logged).all()
    assert np.isfinite(trainer.evaluate()["eval_loss"])

    resumed = dndetr.denoise(hf_models.build("dab", seed=9), contrastive=contrastive)
    make_trainer(resumed, tmp_path / "whole", 4).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    pairs = zip(whole.named_parameters(), resumed.named_parameters(), strict=True)
    for (name, first), (_, second) in pairs:
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6, msg=name)

    read, info = AutoModelForObjectDetection.from_pretrained(
        tmp_path / "whole" / "checkpoint-4", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    images = pixels(2)
    assert torch.equal(read.eval()(images).logits, whole.eval()(images).logits)


def test_the_trainer_trains_kept_groups_and_a_checkpoint_is_gone_on_with(tmp_path):
    model = dndetr.denoise(hf_models.build("rf"), keep_groups=2)
    trainer = make_trainer(model, tmp_path, 2)
    trainer.train()
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    again = dndetr.denoise(AutoModelForObjectDetection.from_pretrained(tmp_path / "checkpoint-2"), keep_groups=2)
    again.denoising.load_state_dict(torch.load(tmp_path / "checkpoint-2" / "denoising.pt", weights_only=True))
    assert again.config.group_detr == hf_models.GROUPS
    losses = []
    for each in (model, again):
        torch.manual_seed(0)
        losses.append(each.train()(pixels(2), labels=labels(3, 1)).loss)
    assert torch.equal(*losses)


def test_noised_labels_are_learned_beside_query_groups():
    torch.manual_seed(0)
    model = dndetr.denoise(hf_models.build("rf"), keep_groups=1).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        output = model(pixels(2), labels=labels(3, 2))
        output.loss.backward()
        losses.append(output.loss_dict["dn_loss_ce"])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_resuming_without_the_denoising_weights_is_refused(tmp_path):
    make_trainer(dndetr.denoise(hf_models.build("dab")), tmp_path, 2).train()
    (tmp_path / "checkpoint-2" / "denoising.pt").unlink()
    again = make_trainer(dndetr.denoise(hf_models.build("dab")), tmp_path, 4)
    with pytest.raises(FileNotFoundError, match="denoising cannot resume"):
        again.train(resume_from_checkpoint=True)
