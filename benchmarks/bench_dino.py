"""DINO: its training step beside the usual sequence, shares of its parts, and the encoder's proposals alone.

``pytest benchmarks/bench_dino.py -s --results FILE [--contenders "ours.*|layer.*"]``: on a CPU float32, two images
(``--images``) of 256 x 320, timed ``--rounds`` times in turn; on a GPU bfloat16, two images of 800 x 1333, as
``bench_gpu_step.py`` measures. "layer by layer" is our step with matching and losses of each layer and image on the
host; on "reference ops" all else is the usual sequence, too: plain torch, and the encoder's heads on all tokens.
"""

from collections.abc import Callable
from functools import partial
from unittest import mock

import bench_gpu_step
import bench_step
import ceilings
import in_turn
import torch
from peers import CLASSES, make_batch, our_step, references
from per_layer_losses import per_layer_losses
from torch import Tensor, nn

from dndetr.batch import Targets
from dndetr.counting.stages import PARTS
from dndetr.models.dn_detr import Predictions
from dndetr.models.features import Features, places_of_tokens
from dndetr.models.proposals import ProposalHead, Proposals, proposed_logits
from dndetr.ops.match import Matches
from dndetr.training.criterion import Criterion, Losses

PRESET = "dino-r50"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = (256, 320)  # on a CPU
LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))  # of 800 x 1333 pixels
WIDTH, COUNT = 256, 900


class LayerByLayer(Criterion):
    """The criterion as it is usually computed, which knows of no broken costs."""

    def forward(self, predictions: Predictions, targets: Targets, objects: Tensor | None = None) -> Losses:
        predictions = predictions._replace(logits=predictions.logits.float())
        counts = predictions.counted, predictions.proposals
        total, parts = per_layer_losses(predictions, targets, self.cost, self.weights, *counts)
        finite = torch.ones(predictions.boxes.shape[:2], dtype=torch.bool, device=total.device)
        return Losses(total, parts, Matches(None, None, finite))


def heads_on_all_tokens(head: ProposalHead, features: Features, more: int = 0) -> Proposals:
    """What the head does, as the official code does it: every token through every layer, then the best are gathered."""
    places, sound = proposed_logits(features, torch.promote_types(features.tokens.dtype, torch.float32))
    content, logits, corrected = head._heads(features.tokens.masked_fill(~sound[..., None], 0), places)
    index = logits.detach().amax(-1).topk(head.count + more, dim=1).indices
    content, logits, corrected = (torch.take_along_dim(x, index[..., None], 1) for x in (content, logits, corrected))
    return Proposals(index, content.detach(), corrected.detach(), logits, corrected.sigmoid())


def layer_by_layer(**options):
    """Our step with the usual criterion."""
    step = our_step(PRESET, **options)
    step.criterion = LayerByLayer()
    return step


def usual(step, batch) -> Callable[[], object]:
    """The step on its batch, in the usual sequence throughout."""

    def run():
        with references(), mock.patch.object(ProposalHead, "forward", heads_on_all_tokens):
            return step(batch)

    return run


def contenders(batch) -> dict[str, Callable[[], Callable[[], object]]]:
    """As ``bench_gpu_step.contenders``."""
    options = {"device": "cuda", "precision": torch.bfloat16}
    return {
        "ours": lambda: partial(our_step(PRESET, graph=True, **options), batch),
        "ours, eager": lambda: partial(our_step(PRESET, **options), batch),
        "layer by layer": lambda: partial(layer_by_layer(**options), batch),
        "reference ops": lambda: usual(layer_by_layer(**options), batch),
    }


def bench_dino_step(request, record, chosen):
    if DEVICE == "cuda":
        batch = bench_gpu_step.large_batch(2)
        bench_gpu_step.compare(record, chosen, PRESET, 2, contenders(batch), PARTS)
        return
    rounds, images = (request.config.getoption(option) for option in ("--rounds", "--images"))
    batch = make_batch(images, *SIZE, [7, 12])
    others = {
        "layer by layer": partial(layer_by_layer(), batch),
        "reference ops": usual(layer_by_layer(), batch),
    }
    others = {name: run for name, run in others.items() if chosen(name)}
    title = f"step of {PRESET}, {images} images of {SIZE[0]}x{SIZE[1]}"
    bench_step.compare(record, title, our_step(PRESET), batch, others, rounds, PARTS)


def proposing(way: Callable, head: ProposalHead, features: Features, tokens: Tensor, *_) -> Tensor:
    """Logits and boxes of the selected tokens [B, N, K + 4]; what else the way depends on is in the head."""
    proposals = way(head, features._replace(tokens=tokens))
    return torch.cat((proposals.logits.float(), proposals.boxes), dim=-1)


def case(device: str, levels=LEVELS, count: int = COUNT, images: int = 2) -> tuple[ProposalHead, Features]:
    """A head that corrects, and tokens of images that fill their canvas."""
    torch.manual_seed(0)
    head = ProposalHead(WIDTH, CLASSES, count, official=True)
    nn.init.normal_(head.bbox_embed.layers[-1].weight, std=0.02)
    nn.init.zeros_(head.enc_output.bias)  # tokens without a sound proposal score alike, and so low that none is taken
    tokens = torch.randn(images, sum(h * w for h, w in levels), WIDTH)
    sizes = torch.tensor(levels).repeat(images, 1, 1)
    on_device = (x.to(device) for x in (sizes, *places_of_tokens(sizes, levels, tokens.dtype)))
    return head.to(device), Features(tokens.to(device).requires_grad_(), None, levels, *on_device)


def check(head: ProposalHead, features: Features, weighting: Tensor) -> None:
    """Both ways select the same tokens, and have the same results and gradients in float32."""
    values = (features.tokens, *head.parameters())
    ours, theirs = (
        proposing(way, head, features, features.tokens) for way in (ProposalHead.forward, heads_on_all_tokens)
    )
    gradients = (torch.autograd.grad(out, values, weighting) for out in (ours, theirs))
    assert torch.equal(head(features).index, heads_on_all_tokens(head, features).index)
    for a, b in zip((ours, *next(gradients)), (theirs, *next(gradients)), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() and b.norm() > 0


def bench_proposals(record, seconds=10.0):
    head, features = case(DEVICE)
    weighting = torch.randn(len(features.tokens), COUNT, CLASSES + 4, device=DEVICE)
    check(head, features, weighting)
    values = (features.tokens, *head.parameters())
    title = f"proposals, {{passes}}, {COUNT} of {features.tokens.shape[1]} tokens of 2 images"
    ways = {"ours": ProposalHead.forward, "heads on all tokens": heads_on_all_tokens}
    functions = {name: partial(proposing, way, head, features) for name, way in ways.items()}
    if DEVICE == "cpu":
        in_turn.report(record, title, functions, values, weighting, seconds)
        return

    def forward(function):
        with torch.autocast("cuda", torch.bfloat16):
            return function(*values)

    def both(function):
        torch.autograd.grad(forward(function), values, weighting)

    for passes, run in (("forward", forward), ("forward and backward", both)):
        found = {name: ceilings.gpu_seconds(partial(run, function)) for name, function in functions.items()}
        record(title.format(passes=passes), found)
        print(f"\n{title.format(passes=passes)}: {found}")
