"""Detectors of transformers, read by us: the same outputs to the last digits of float32."""

import pytest
import torch
import transformers_detectors as theirs

from dndetr.detector import load

VARIANTS = {
    "dab": theirs.dab,
    "dab-bottleneck-relu": lambda: theirs.dab(theirs.resnet(kind="bottleneck"), activation_function="relu"),
    "dab-patterns": lambda: theirs.dab(num_patterns=3, temperature_height=10, temperature_width=15),
    "deformable": theirs.deformable,
    "deformable-box-refinement": lambda: theirs.deformable(with_box_refine=True),
    "deformable-two-stage": lambda: theirs.deformable(with_box_refine=True, two_stage=True),
    "deformable-single-scale": lambda: theirs.deformable(1, 1),
    "deformable-3-levels": lambda: theirs.deformable(3, 3, encoder_n_points=3, decoder_n_points=2),
    "deformable-more-levels": lambda: theirs.deformable(2, 5, activation_function="prelu", with_box_refine=True),
    "deformable-gelu": lambda: theirs.deformable(activation_function="gelu", encoder_layers=0),
}


def demand_equal(detector, model):
    images, sizes, mask = theirs.pair()
    with torch.no_grad():
        expected = model(pixel_values=images, pixel_mask=mask)
        logits, boxes = detector.model.predict(images, sizes)
    assert expected.pred_boxes.std(dim=1).min() > 1e-3  # of boxes that are alike any order would do
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(boxes, expected.pred_boxes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_those_of_transformers(variant, tmp_path):
    model = VARIANTS[variant]()
    model.save_pretrained(tmp_path)
    demand_equal(load(tmp_path, "cpu"), model)
