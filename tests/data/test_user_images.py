"""What a detector may be handed: whatever is no image is named with its place."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from dndetr.data.user_images import UserImages

GOOD = np.zeros((4, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (None, "is a NoneType"),
        (Image.new("RGB", (0, 0)), "is a picture of 0x0 pixels"),
        (torch.zeros(3, 0, 5), "is a tensor of shape [3, 0, 5]"),
        (torch.zeros(4, 5), "is a tensor of shape [4, 5]"),
        (torch.full((3, 4, 5), 2.0), "has values from 2 to 2"),
        (np.zeros((4, 0, 3), dtype=np.uint8), "is an array uint8 [4, 0, 3]"),
        (np.zeros((4, 6, 3)), "is an array float64 [4, 6, 3]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_image(image, told):
    with pytest.raises(ValueError, match=re.escape(f"image 1 {told}")):
        UserImages([GOOD, image], None)
