"""What is said about denoising: achieved noise, restored boxes by noise level, leaks."""

import json

import detectors
import pytest
import torch
from PIL import Image
from short_runs import short_run

from dndetr import health
from dndetr.analysis.leak import leak_check
from dndetr.analysis.reconstruction import measure_reconstruction
from dndetr.denoising import draw_noise, noised_queries
from dndetr.models import layers
from dndetr.models.dn_detr import Predictions
from dndetr.ops import images_of
from dndetr.ops.group_attention import GroupLayout, group_attention
from dndetr.pictures import draw_denoising
from dndetr.training.noise_meter import NoiseMeter

COUNTS = [3, 0, 5]
NAMES = ["circle", "square", "triangle", "star", "ring"]


def draw(counts, slots=8, groups=400, label_noise=0.2, box_noise=0.4):
    targets = detectors.make_targets(counts, slots)
    noise = draw_noise(targets, groups, detectors.CLASSES, torch.Generator().manual_seed(0))
    return targets, noised_queries(targets, noise, label_noise, box_noise)


# ---- achieved noise


def test_the_meter_reads_what_a_loop_over_objects_finds():
    targets, noised = draw(COUNTS, groups=3)
    targets.boxes[0, 3:], targets.labels[0, 3:] = 0.5, 1  # what is in slots without an object must not count
    meter = NoiseMeter()
    meter.add(noised, targets)
    flips, shifts = [], []
    for image, count in enumerate(COUNTS):
        for group in range(3):
            for slot in range(count):
                old, new = targets.boxes[image, slot], noised.boxes[image, group, slot]
                flips.append(float(noised.labels[image, group, slot] != targets.labels[image, slot]))
                w, h = old[2:].tolist()
                shifts.append(((new - old).abs() / torch.tensor([w / 2, h / 2, w, h])).mean().item())
    expected = [sum(values) / 24 for values in (flips, shifts)]
    assert list(meter.read().values()) == pytest.approx(expected, abs=1e-5)
    assert meter.read() == {}


def test_flips_that_hit_and_shifts_are_as_expected():
    targets, noised = draw([8])
    meter = NoiseMeter()
    meter.add(noised, targets)
    told = meter.read()
    # A flip draws among all classes, so one in five changes nothing; the mean of |uniform(-0.4, 0.4)| is 0.2.
    assert told["dn_flip_rate"] == pytest.approx(0.2 * 4 / 5, abs=0.02)
    assert told["dn_box_shift"] == pytest.approx(0.2, abs=0.01)


def test_of_contrastive_noise_what_is_to_be_restored_is_read():
    targets = detectors.make_targets([8] * 20, 8)
    noise = draw_noise(targets, 20, detectors.CLASSES, torch.Generator().manual_seed(0), contrastive=True)
    noised = noised_queries(targets, noise, 0.2, 0.4, contrastive=True)
    meter = NoiseMeter()
    meter.add(noised, targets)
    told = meter.read()
    assert told["dn_flip_rate"] == pytest.approx(0.2 * 4 / 5, abs=0.02)
    assert told["dn_box_shift"] == pytest.approx(0.2, abs=0.01)


def test_no_noise_reads_nothing():
    targets, noised = draw([4, 1], label_noise=0.0, box_noise=0.0)
    meter = NoiseMeter()
    meter.add(noised, targets)
    assert meter.read() == {"dn_flip_rate": 0, "dn_box_shift": 0}


def test_every_group_has_a_noise_of_its_own():
    targets, noised = draw([8], groups=2, box_noise=torch.tensor([0.0, 1.0]).view(1, 2, 1, 1))
    assert torch.equal(noised.boxes[:, 0], targets.boxes) and not torch.equal(noised.boxes[:, 1], targets.boxes)


# ---- reconstruction


def batches():
    return [detectors.make_batch(COUNTS, 8), detectors.make_batch([2, 4], 8)]


def measured(infer, **options):
    return measure_reconstruction(infer, batches(), detectors.CLASSES, 0.5, levels=(0.0, 0.4, 1.0), **options)


def by_hand(boxes_of, labels_of):
    """An ``infer`` of two layers, the first of which leaves the noised boxes as they are."""

    def infer(batch, noised):
        layout = GroupLayout(noised.labels.shape[1], noised.labels.shape[2], 4)
        flat = [noised.boxes.flatten(1, 2), boxes_of(batch, noised).flatten(1, 2)]
        boxes = torch.stack([torch.nn.functional.pad(one, (0, 0, 0, 4), value=0.5) for one in flat])
        logits = torch.nn.functional.one_hot(labels_of(batch, noised).flatten(1), detectors.CLASSES).float()
        logits = torch.nn.functional.pad(logits, (0, 0, 0, 4)).expand(2, -1, -1, -1)
        return Predictions(logits, boxes, layout)

    return infer


def test_a_perfect_and_an_idle_detector():
    perfect = measured(
        by_hand(
            lambda batch, noised: batch.targets.boxes[:, None].expand_as(noised.boxes),
            lambda batch, noised: batch.targets.labels[:, None].expand_as(noised.labels),
        )
    ).report
    assert perfect["objects"] == 14 and perfect["images"] == 5
    assert perfect["error"][0] == perfect["noised_error"] and perfect["error"][1] == pytest.approx([0] * 3, abs=1e-3)
    assert perfect["noised_error"][0] < 0.01 < 0.2 < perfect["noised_error"][1] < perfect["noised_error"][2]
    assert perfect["flipped_corrected"] == perfect["kept_correct"] == [1, 1, 1]
    idle = measured(by_hand(lambda _, noised: noised.boxes, lambda _, noised: noised.labels)).report
    assert idle["error"][1] == idle["noised_error"] == perfect["noised_error"]
    assert idle["flipped_corrected"] == [0, 0, 0] and idle["kept_correct"] == [1, 1, 1]


def test_a_level_measures_the_same_beside_other_levels():
    """Groups do not see each other: that is why one pass may measure all."""
    model = detectors.build("dn-deformable-detr").eval()

    def infer(batch, noised):
        return model(images_of(batch), batch.sizes, noised)

    def alone(batch, noised):
        for name in ("labels", "boxes"):
            changed = getattr(noised, name).clone()
            changed[:, 1:] = changed[:, 1:].flip(0)
            object.__setattr__(noised, name, changed)
        return model(images_of(batch), batch.sizes, noised)

    one, two = (measured(function).report["error"] for function in (infer, alone))
    assert one[-1][0] == pytest.approx(two[-1][0], abs=1e-4) and one[-1][2] != pytest.approx(two[-1][2], abs=1e-3)


def test_examples_are_of_images_with_objects_and_reading_stops():
    reconstruction = measured(by_hand(lambda _, noised: noised.boxes, lambda _, noised: noised.labels), images=2)
    assert reconstruction.report["images"] == 3
    assert [len(example.labels) for example in reconstruction.examples] == [3, 5]
    empty = [detectors.make_batch([0, 0], 8)]
    infer = by_hand(lambda _, noised: noised.boxes, lambda _, noised: noised.labels)
    assert measure_reconstruction(infer, empty, detectors.CLASSES, 0.2) is None
    assert measure_reconstruction(infer, [], detectors.CLASSES, 0.2) is None


def test_the_picture_shows_restored_boxes_and_bears_missing_rows(tmp_path):
    idle = measured(by_hand(lambda _, noised: noised.boxes, lambda _, noised: noised.labels))
    rows = [{"event": "train", "step": 1, "dn_share": 0.4}, {"event": "eval", "step": 1, "dn_flip_rate": None}]
    sizes = set()
    for name, log in (("a", []), ("b", rows)):
        draw_denoising(tmp_path / f"{name}.png", idle, log, NAMES, 0.4)
        with Image.open(tmp_path / f"{name}.png") as picture:
            sizes.add(picture.size)
    assert len(sizes) == 1 and (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


# ---- leaks


@pytest.mark.parametrize("name", detectors.CONFIGS)
@pytest.mark.parametrize("batch_active", [False, True], ids=["hidden", "official"])
def test_no_detector_leaks(name, batch_active):
    model = detectors.build(name).train()
    check = leak_check(model, detectors.make_batch(COUNTS, 8), detectors.CLASSES, 3, batch_active)
    assert check.passed, check
    assert model.training


def without_groups(q, k, v, layout, active=None, scale=None):
    return group_attention(q, k, v, GroupLayout(0, 0, layout.denoising + layout.matching), None, scale)


def between_groups(q, k, v, layout, active=None, scale=None):
    """Matching queries are kept apart, groups are not: a leak from one reconstruction to the next."""
    n = layout.denoising
    if not n:
        return group_attention(q, k, v, layout, active, scale)
    parts = [[x[:, :, :n] for x in (q, k, v)], [x[:, :, n:] for x in (q, k, v)]]
    return torch.cat([group_attention(*part, GroupLayout(0, 0, part[0].shape[2])) for part in parts], dim=2)


@pytest.mark.parametrize(("attention", "leak"), [(without_groups, "matching"), (between_groups, "groups")])
def test_a_leak_is_found(monkeypatch, attention, leak):
    monkeypatch.setattr(layers, "group_attention", attention)
    check = leak_check(detectors.build("dn-deformable-detr"), detectors.make_batch(COUNTS, 8), detectors.CLASSES)
    assert getattr(check, leak) > 1e-3 and not check.passed


def test_a_check_that_cannot_see_is_no_pass(monkeypatch):
    model = detectors.build("dn-deformable-detr")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda images, sizes, noised=None: blind(forward(images, sizes, noised)))

    def blind(predictions):
        n = predictions.layout.denoising
        predictions.logits[:, :, :n], predictions.boxes[:, :, :n] = 0, 0
        return predictions

    check = leak_check(model, detectors.make_batch(COUNTS, 8), detectors.CLASSES)
    assert check.matching == check.groups == 0 and not check.passed
    with pytest.raises(ValueError, match="batch with objects"):
        leak_check(model, detectors.make_batch([0], 8), detectors.CLASSES)


# ---- the command


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    torch.set_num_threads(1)
    return short_run(tmp_path_factory.mktemp("runs") / "run", pictures=True)


def test_a_run_ends_with_the_panel(finished):
    report = json.loads((finished / "denoising.json").read_text())
    assert len(report["error"]) == 3 and len(report["levels"]) == len(report["noised_error"])
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    (trained,) = (row for row in rows if row["event"] == "train")
    assert trained["dn_share"] == pytest.approx(trained["denoising"] / trained["loss"], rel=1e-4)
    (evaluated,) = (row for row in rows if row["event"] == "eval")
    assert 0 <= evaluated["dn_flip_rate"] < 0.5 and 0.1 < evaluated["dn_box_shift"] < 0.3


def test_the_command_measures_what_the_run_did(finished, tmp_path, capsys):
    assert health.main([str(finished), "--steps", "1", "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "leak check: passed" in told and "box noise   noised  layer 1" in told and "ms with denoising" in told
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"denoising.json", "denoising.png"}
    assert (tmp_path / "out" / "denoising.json").read_text() == (finished / "denoising.json").read_text()


def test_the_leak_check_alone_fails_for_a_leak(finished, monkeypatch, capsys):
    assert health.main([str(finished), "--leak-check"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setattr(layers, "group_attention", without_groups)
    assert health.main([str(finished), "--leak-check"]) == 1
    assert "error: leak check: FAILED" in capsys.readouterr().err


def test_without_denoising_there_is_no_panel(tmp_path, capsys):
    folder = short_run(tmp_path / "plain", "--denoising.groups", "0", pictures=True)
    assert not list(folder.glob("denoising.*"))
    assert health.main([str(folder)]) == 0
    assert "trained without denoising" in capsys.readouterr().out


def test_mistakes_are_one_line(finished, capsys):
    for arguments, message in (
        (["nowhere"], "nowhere"),
        ([str(finished), "--steps", "-1"], "--steps -1: give 0 or more"),
    ):
        assert health.main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
