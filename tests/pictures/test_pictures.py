"""Pictures: right pixels in the right colours, and no crash on what real runs bring along."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dndetr.data.collate import collate
from dndetr.data.sample import IMAGENET, Sample, colour_map
from dndetr.ops import images_of
from dndetr.pictures import batch_images, class_colour, draw_boxes, draw_curves, draw_first_batch, draw_predictions
from dndetr.pictures.boxes import BoxCanvas
from dndetr.pictures.scores import draw_confusion, draw_precision_recall

NAMES = ["circle", "star", "ring"]
GREY = (90, 90, 90)


def count(image: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(image) == colour).all(-1).sum())


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    assert [entry.name for entry in path.parent.glob("*.tmp")] == []
    return image.convert("RGB")


# ---- boxes


def test_colours_of_a_hundred_classes_differ():
    assert len({class_colour(label) for label in range(100)}) == 100


def test_box_lies_where_it_should_in_its_colour():
    image = Image.new("RGB", (600, 500), GREY)
    drawn = np.asarray(draw_boxes(image, [[100, 200, 300, 400]], [1], None, NAMES))
    assert drawn.shape == (500, 600, 3)
    for y, x in ((300, 100), (300, 300), (200, 250), (400, 250)):
        assert tuple(drawn[y, x]) == class_colour(1)
    assert tuple(drawn[300, 200]) == GREY and tuple(drawn[300, 90]) == GREY
    assert count(image, GREY) == 600 * 500, "the given image was changed"


def test_small_images_grow_and_boxes_with_them():
    drawn = draw_boxes(Image.new("L", (128, 96), 90), torch.tensor([[32.0, 24.0, 64.0, 48.0]]), torch.tensor([0]))
    assert drawn.size == (480, 360) and drawn.mode == "RGB"
    assert drawn.getpixel((120, 150)) == class_colour(0) and drawn.getpixel((240, 150)) == class_colour(0)


def test_the_best_detection_is_on_top():
    image = Image.new("RGB", (600, 600), GREY)
    box = [100, 100, 500, 500]
    for scores, top in (([0.9, 0.4], 0), ([0.4, 0.9], 1)):
        drawn = draw_boxes(image, [box, box], [0, 1], scores, NAMES)
        assert drawn.getpixel((500, 300)) == class_colour(top)


def test_tags_do_not_cover_each_other_or_leave_the_picture():
    canvas = BoxCanvas(Image.new("RGB", (400, 400)), 1.0)
    boxes = [[0, 0, 60, 60], [5, 2, 66, 62], [340, 0, 399, 40], [180, 180, 240, 240], [182, 182, 238, 244]]
    for box in boxes:
        canvas.outline(box, class_colour(0))
    for box in boxes:
        canvas.tag(box, "triangle 0.99", class_colour(0))
    tags = canvas._tags
    assert len(tags) == 5 and all(min(x0, y0) >= 0 and max(x1, y1) < 400 for x0, y0, x1, y1 in tags)
    for one in range(5):
        for two in range(one):
            a, b = tags[one], tags[two]
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize(
    "box", [[-1e9, -1e9, 1e9, 1e9], [50, 50, 50, 50], [80, 80, 20, 20], [500, 500, 600, 600]],
    ids=["huge", "empty", "inside out", "outside"],
)  # fmt: skip
def test_wild_boxes_are_drawn_without_complaint(box: list[float]):
    assert draw_boxes(Image.new("RGB", (100, 100)), [box], [7], [0.5], NAMES).size == (480, 480)


@pytest.mark.parametrize("name", ["Größe", "Заяц", "Ωmega"])
def test_letters_beyond_ascii_are_written(name: str):
    """Letters that a font lacks all look the same."""

    def drawn(text: str) -> np.ndarray:
        return np.asarray(draw_boxes(Image.new("RGB", (600, 500), GREY), [(50, 50, 500, 400)], [0], None, [text]))

    for letter in {letter for letter in name if not letter.isascii()}:
        assert (drawn(letter) != drawn("\U0010ffff")).any(), letter


def test_no_boxes_and_dashes():
    assert count(draw_boxes(Image.new("RGB", (500, 500), GREY), [], [], [], NAMES), GREY) == 500 * 500
    solid, dashed = (BoxCanvas(Image.new("RGB", (300, 300)), 1.0) for _ in range(2))
    solid.outline([50, 50, 250, 250], class_colour(0))
    dashed.outline([50, 50, 250, 250], class_colour(0), dashed=True)
    whole, part = (count(canvas.image, class_colour(0)) for canvas in (solid, dashed))
    assert 0.4 * whole < part < 0.8 * whole


# ---- sheets


def batch(size: int = 3, slots: int = 4) -> dict:
    """Images on a 64 x 96 canvas of which 64 x 64 is valid; object counts 2, 0, 4, ..."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([2, 0, 4, 1, 3, 2, 2, 1, 1, 1][:size], dtype=torch.int32)
    return {
        "images": torch.randn(size, 3, 64, 96, generator=generator) * 0.2,
        "sizes": torch.tensor([[64, 64]] * size),
        "boxes": torch.rand(size, slots, 4, generator=generator) * 0.3 + 0.2,
        "labels": torch.randint(3, (size, slots), generator=generator),
        "counts": counts,
    }


def test_batch_images_undo_the_normalisation_and_the_padding():
    original = torch.randint(256, (1, 3, 20, 30), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = torch.zeros(1, 3, 32, 32)
    normalised[..., :20, :30] = (original / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    (image,) = batch_images(normalised, torch.tensor([[20, 30]]))
    assert image.size == (30, 20)
    assert np.array_equal(np.asarray(image), original[0].permute(1, 2, 0).numpy())


def test_pictures_are_what_the_model_is_shown():
    """Bytes as they are under plain normalisation, and with the colours of an augmentation otherwise."""
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    darker = colour_map(0.5 * np.eye(3), 30)
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    shown = collate([Sample(picture, colours, *nothing, 0, (20, 30)) for colours in (IMAGENET, darker)])
    plain, changed = (np.asarray(image) for image in batch_images(images_of(shown), shown.sizes))
    assert np.array_equal(plain, picture)
    assert np.abs(changed - (0.5 * picture + 30)).max() <= 0.5 + 1e-3


def test_first_batch_shows_truth_groups_and_flipped_labels(tmp_path: Path):
    parts = batch()
    noised_boxes = (parts["boxes"][:, None] + 0.05).repeat(1, 5, 1, 1)
    noised_labels = parts["labels"][:, None].repeat(1, 5, 1)
    path = tmp_path / "first_batch.png"
    draw_first_batch(path, **parts, noised_boxes=noised_boxes, noised_labels=noised_labels, class_names=NAMES)
    kept = opened(path)
    yellow = (255, 225, 120)  # the text of a flipped label's tag
    assert count(kept, yellow) == 0
    draw_first_batch(path, **parts, noised_boxes=noised_boxes, noised_labels=(noised_labels + 1) % 3, class_names=NAMES)
    flipped = opened(path)
    assert flipped.size == kept.size and count(flipped, yellow) > 20
    draw_first_batch(path, **parts, noised_boxes=None, noised_labels=None, class_names=NAMES)
    assert opened(path).size != kept.size


def test_empty_slots_are_not_drawn(tmp_path: Path):
    parts = batch()
    noised = {"noised_boxes": parts["boxes"][:, None].clone(), "noised_labels": parts["labels"][:, None].clone()}
    draw_first_batch(tmp_path / "a.png", **parts, **noised, class_names=NAMES)
    for row, live in enumerate(parts["counts"].tolist()):
        parts["boxes"][row, live:] = 0.9
        noised["noised_boxes"][row, :, live:] = 0.9
        noised["noised_labels"][row, :, live:] = 0
    draw_first_batch(tmp_path / "b.png", **parts, **noised, class_names=NAMES)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("size", [1, 10])
def test_first_batch_of_any_size(tmp_path: Path, size: int):
    draw_first_batch(
        tmp_path / "first.png", **batch(size), noised_boxes=None, noised_labels=None,
        class_names=[f"a rather long class name {number}" for number in range(80)],
    )  # fmt: skip
    image = opened(tmp_path / "first.png")
    assert image.width <= 2600 and image.height <= 1200


def test_predictions_above_the_threshold_only(tmp_path: Path):
    images = [Image.new("RGB", (200, 200), GREY), Image.new("RGB", (100, 200), GREY)]
    boxes = torch.tensor([[20.0, 20, 80, 80], [100, 100, 150, 150]])
    detections = [(torch.tensor([0.9, 0.2]), torch.tensor([0, 1]), boxes)] * 2
    truths = [(torch.tensor([0]), boxes[:1]), (torch.zeros(0).long(), torch.zeros(0, 4))]
    path = tmp_path / "predictions.png"
    draw_predictions(path, images, detections, truths, NAMES, threshold=0.5, caption="AP 0.790")
    legend = 17 * 17  # pixels of a class's chip, at most
    image = opened(path)
    assert count(image, class_colour(0)) > 500 + legend and count(image, class_colour(1)) <= legend
    draw_predictions(path, images, detections, None, NAMES, threshold=0.1)
    assert count(opened(path), class_colour(1)) > 500 + legend


def test_predictions_of_nothing(tmp_path: Path):
    nothing = (torch.zeros(0), torch.zeros(0).long(), torch.zeros(0, 4))
    draw_predictions(tmp_path / "a.png", [Image.new("RGB", (50, 50))] * 20, [nothing] * 20, None, NAMES)
    draw_predictions(tmp_path / "b.png", [], [], None, NAMES)
    assert opened(tmp_path / "a.png").height > opened(tmp_path / "b.png").height


# ---- curves


def rows(steps: int) -> list[dict]:
    made = []
    for step in range(1, steps + 1):
        loss = 5 * math.exp(-step / 50) + 1
        terms = {name: loss / 3 for name in ("label", "l1", "giou", "dn_label", "dn_l1", "dn_giou")}
        parts = {"loss": loss, "matching": loss * 0.6, "denoising": loss * 0.4, "lr": 1e-4, "lr_backbone": 1e-5}
        made.append({"event": "train", "step": step, "epoch": 1 + step // 20, **parts, **terms})
        if step % 20 == 0:
            ap = 1 - math.exp(-step / 100)
            made.append({"event": "eval", "step": step, "epoch": step // 20, "AP": ap, "AP50": ap, "AP75": None})
    return made


@pytest.mark.parametrize("steps", [0, 1, 3, 200])
def test_curves_of_any_length(tmp_path: Path, steps: int):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows(steps)))
    draw_curves(metrics, tmp_path / "curves.png", title="tiny-1")
    image = np.asarray(opened(tmp_path / "curves.png"))
    blue = (np.abs(image.astype(int) - (45, 125, 210)).sum(-1) < 30).sum()
    assert {0: blue == 0, 200: blue > 2000}.get(steps, 100 < blue < 2000), blue


def test_curves_survive_nulls_missing_keys_and_a_half_line(tmp_path: Path):
    made = rows(40)
    made[3]["loss"] = None
    made[4] = {"event": "train", "step": 5, "epoch": 1, "loss": 0.0}
    made.append({"event": "end", "step": 40})
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in made) + '{"event": "tr')
    draw_curves(metrics, tmp_path / "curves.png")
    assert opened(tmp_path / "curves.png").width > 1000


def test_names_and_titles_are_no_formulas(tmp_path: Path):
    name = r"$\\unknown$ " + "long " * 20
    (tmp_path / "metrics.jsonl").write_text("")
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", name)
    draw_precision_recall(tmp_path / "pr.png", {name: np.full((10, 101), 0.5)}, name)
    draw_confusion(tmp_path / "confusion.png", np.eye(2, dtype=np.int64), [name], name)
    figure = opened(tmp_path / "confusion.png")
    full = (8, 48, 107)  # the colour of a cell with all of a row
    assert count(figure, full) > 0.08 * figure.width * figure.height  # a long name has not pushed the matrix aside


def test_importing_pictures_does_not_import_matplotlib():
    code = "import sys, dndetr.pictures; sys.exit('matplotlib' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
