"""Static shapes: canvases, target buckets, padding."""

import numpy as np
import pytest
import torch

from dndetr.boxes import cxcywh_to_xyxy
from dndetr.data.collate import TARGET_BUCKETS, canvas_bucket, collate, target_bucket
from dndetr.data.sample import IMAGENET, Sample


def sample(height: int, width: int, objects: int, image_id: int = 1) -> Sample:
    generator = torch.Generator().manual_seed(image_id)
    corners = torch.rand(objects, 2, generator=generator) * torch.tensor([width / 2, height / 2])
    sizes = (torch.rand(objects, 2, generator=generator) * 0.5 + 0.01) * torch.tensor([width / 2, height / 2])
    boxes = torch.cat((corners, corners + sizes), dim=1)
    pixels = torch.randint(1, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy()
    return Sample(pixels, image_id % 7 * IMAGENET, boxes, torch.arange(objects), image_id, (2 * height, 2 * width))


def test_a_batch_holds_its_samples_and_zeros():
    samples = [sample(100, 70, 3, 2**40), sample(60, 130, 11, 5), sample(30, 30, 0, 6)]
    batch = collate(samples)
    assert batch.pixels.shape == (3, 128, 192, 3) and batch.canvas == (128, 192)
    assert batch.targets.labels.shape == (3, 16) and batch.targets.boxes.shape == (3, 16, 4)
    assert batch.targets.counts.tolist() == [3, 11, 0] and batch.targets.counts.dtype == torch.int32
    assert batch.ids.tolist() == [2**40, 5, 6]
    assert batch.sizes.tolist() == [[100, 70], [60, 130], [30, 30]]
    assert batch.original_sizes.tolist() == [[200, 140], [120, 260], [60, 60]]
    for row, one in enumerate(samples):
        height, width = one.size
        assert np.array_equal(batch.pixels[row, :height, :width], one.pixels)
        assert batch.pixels[row].sum() == one.pixels.sum()
        assert torch.equal(batch.colours[row], one.colours)
        count = len(one.labels)
        boxes = cxcywh_to_xyxy(batch.targets.boxes[row, :count]) * torch.tensor([width, height, width, height])
        assert torch.allclose(boxes, one.boxes_xyxy, atol=1e-3)
        assert batch.targets.labels[row, :count].tolist() == one.labels.tolist()
        assert not batch.targets.boxes[row, count:].any() and not batch.targets.labels[row, count:].any()


@pytest.mark.parametrize(("objects", "slots"), [((3, 11, 0), 11), ((0, 0), 1), ((600, 2), 512)])
def test_room_for_the_largest_count_alone(objects, slots):
    batch = collate([sample(100, 70, count) for count in objects], exact=True)
    assert batch.targets.labels.shape[1] == batch.targets.needed == slots
    assert batch.targets.counts.tolist() == [min(count, slots) for count in objects]


def test_shapes_come_from_small_sets():
    assert [target_bucket(n) for n in (0, 8, 9, 512, 513)] == [8, 8, 16, 512, 512]
    assert list(TARGET_BUCKETS) == sorted(TARGET_BUCKETS)
    assert canvas_bucket([(64, 65), (1, 1)], 64) == (64, 128)
    assert collate([sample(30, 40, 2)], multiple=32).canvas == (32, 64)
    fixed = collate([sample(30, 40, 2)], canvas=(30, 40), slots=5)
    assert fixed.canvas == (30, 40) and fixed.targets.labels.shape[1] == 5
    for slots, needed in ((None, 16), (64, 16), (4, 4)):
        assert collate([sample(30, 40, 9)], slots=slots).targets.needed == needed


def test_the_largest_objects_stay_where_there_are_too_many():
    one = sample(50, 50, 9)
    batch = collate([one], slots=4)
    area = (one.boxes_xyxy[:, 2:] - one.boxes_xyxy[:, :2]).prod(dim=1)
    assert batch.targets.labels[0].tolist() == sorted(area.argsort(descending=True)[:4].tolist())
    assert batch.targets.counts.tolist() == [4]
