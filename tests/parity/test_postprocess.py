"""Post-processing against the official implementation's recorded results."""

import goldens
import pytest
import torch

from dndetr.scoring.coco import postprocess


@pytest.fixture(scope="module")
def golden() -> dict:
    return goldens.unit("primitives.pt")["postprocess"]


def test_postprocess_is_the_official_one(golden: dict):
    detections = postprocess(
        golden["pred_logits"], golden["pred_boxes"], golden["target_sizes_hw"], keep=golden["num_select"]
    )
    for image, expected in enumerate(golden["results"]):
        assert torch.equal(detections.labels[image], expected["labels"])
        torch.testing.assert_close(detections.scores[image], expected["scores"], rtol=1e-12, atol=0)
        torch.testing.assert_close(detections.boxes_xyxy[image], expected["boxes"], rtol=1e-12, atol=1e-12)
