"""The documentation's example of denoising in somebody else's detector: it trains, and nothing leaks."""

import importlib.util

import pytest
import torch

from dndetr.denoising import draw_noise, noised_queries


@pytest.fixture(scope="module")
def example(root):
    spec = importlib.util.spec_from_file_location("vanilla_detr", root / "docs" / "examples" / "vanilla_detr.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_losses_fall(example):
    own, denoising = torch.tensor(example.main(steps=30)).T
    for history in (own, denoising):
        assert history.isfinite().all() and history[-5:].mean() < 0.85 * history[:5].mean()


def test_matching_queries_do_not_see_the_ground_truth(example):
    torch.manual_seed(0)
    model = example.VanillaDETR(classes=3).double().eval()
    images, targets = example.rectangles(2, torch.Generator().manual_seed(1))
    _, others = example.rectangles(2, torch.Generator().manual_seed(2))
    plain = model(images.double())
    for given in (targets, others):
        logits, boxes, layout = model(images.double(), _noised(given))
        first = layout.denoising
        torch.testing.assert_close(logits[:, :, first:], plain[0])
        torch.testing.assert_close(boxes[:, :, first:], plain[1])


def _noised(targets):
    targets = type(targets)(targets.labels, targets.boxes.double(), targets.counts)
    return noised_queries(targets, draw_noise(targets, 3, 3))


def test_the_page_names_what_exists(root):
    """Python blocks of the page compile, and import only what is there."""
    page = (root / "docs" / "plug-in.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    assert blocks
    for block in blocks:
        compile(block, "plug-in.md", "exec")
        for line in block.splitlines():
            if line.startswith("from dndetr"):
                exec(line)
