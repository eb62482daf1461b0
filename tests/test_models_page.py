"""The numbers of docs/models.md, counted again from the models."""

import functools
import re
from importlib.util import find_spec

import detectors
import peers
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dndetr import train
from dndetr.counting.flops import operations
from dndetr.models.build import build_model
from dndetr.presets import PRESETS


def test_what_dino_adds_makes_a_dino(root):
    section = (
        (root / "docs" / "models.md").read_text().partition("\n## What DINO adds\n")[2].partition("\n\nWhat each")[0]
    )
    flags = [
        words for cell in re.findall(r"^\|[^|]+\|([^|]+)\|", section, re.M) for words in re.findall("`([^`]+)`", cell)
    ]
    made = train.parse(["--preset", "dn-deformable-detr-r50", *" ".join(flags).split()])
    dino = PRESETS["dino-r50"]()
    assert (made.model, made.denoising) == (dino.model, dino.denoising)


@pytest.fixture(scope="module")
def rows(root) -> dict[str, list[str]]:
    """The cells of every preset's row."""
    section = (root / "docs" / "models.md").read_text().partition("\n## Presets\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", section, re.M)
    assert len(dict(found)) == len(found)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in found}


def test_every_preset_has_a_row(rows):
    assert set(rows) == set(PRESETS)


def buildable(name: str, *marks):
    """A preset's name, for tests that build its model."""
    missing = PRESETS[name]().model.backbone.kind == "transformers" and find_spec("transformers") is None
    needed = pytest.mark.skipif(missing, reason='transformers is not installed (pip install -e ".[hf]")')
    return pytest.param(name, marks=[needed, *marks])


@pytest.mark.parametrize("preset", [buildable(name) for name in PRESETS])
def test_parameters(rows, preset):
    with torch.device("meta"):
        model = build_model(PRESETS[preset]().model, peers.CLASSES)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert rows[preset][1] == f"{count / 1e6:.1f} M"


@pytest.mark.parametrize("preset", PRESETS)
def test_epochs(rows, preset):
    assert rows[preset][4] == str(PRESETS[preset]().epochs)


@functools.cache
def billions(preset: str) -> float:
    """Floating-point operations of a forward pass over an image, with nothing computed."""
    config = PRESETS[preset]()
    size = config.images.canvas if config.images.recipe == "fixed" else (800, 1333)
    with torch.device("meta"):
        # Frozen, as the counter would follow gradients through tensors that hold none.
        model = build_model(config.model, peers.CLASSES).eval().requires_grad_(False)
    with FakeTensorMode(), peers.references(), torch.no_grad():
        model = detectors.emptied(model, "cpu")
        counted = operations(lambda: model(torch.zeros(1, 3, *size), torch.tensor([size])))
    return sum(counted.values()) / 1e9


@pytest.mark.parametrize(
    "preset", [buildable(name, *([] if name == "tiny" else [pytest.mark.slow])) for name in PRESETS]
)
def test_operations(rows, preset):
    count = billions(preset)
    assert rows[preset][2] == (f"{count:.0f}" if count >= 1 else f"{count:.1f}")


@pytest.mark.slow
def test_costs_that_are_counted_are_ratios_of_operations(rows):
    base, found = billions("dn-detr-r50"), 0
    for name, cells in rows.items():
        if "counted" in cells[3]:
            assert cells[3] == f"{billions(name) / base:.1f}, counted"
            found += 1
    assert found == 6
