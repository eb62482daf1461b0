"""A plain DETR trained with query denoising: what it takes to put ``dndetr.denoising`` into your own detector.

Run it: ``python docs/examples/vanilla_detr.py`` trains on drawn rectangles for a minute. The lines that denoising adds
are marked with "DN".
"""

import torch
from torch import Tensor, nn

from dndetr.batch import Targets
from dndetr.denoising import NoisedQueries, denoising_loss, draw_noise, noised_queries
from dndetr.ops import GroupLayout, LossWeights, Matches, group_attention, match, set_loss


class DecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to pixels, feed-forward; norms after each."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_key, self.value = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, content: Tensor, place: Tensor, pixels: Tensor, keys: Tensor, layout, active) -> Tensor:
        # DN: groups do not see each other, matching queries see no group. With a dense mask instead of our op:
        # nn.MultiheadAttention(..., attn_mask=layout.blocked()), or layout.blocked(active) per image.
        parts = *self.query_key(content + place).chunk(2, -1), self.value(content)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts)
        attended = group_attention(q, k, v, layout, active).transpose(1, 2).flatten(2)
        content = self.norms[0](content + self.output(attended))
        content = self.norms[1](content + self.cross(content + place, keys, pixels, need_weights=False)[0])
        return self.norms[2](content + self.feed(content))


class VanillaDETR(nn.Module):
    """DETR (arXiv 2005.12872) with a very small backbone and no encoder: queries are learned position vectors."""

    def __init__(self, classes: int, queries: int = 20, width: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        steps = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()]
        self.backbone = nn.Sequential(*steps, nn.Conv2d(64, width, 3, 2, 1))
        self.pixel_place = nn.Linear(2, width)
        self.place = nn.Embedding(queries, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads) for _ in range(layers))
        self.to_logits = nn.Linear(width, classes)
        self.to_box = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
        nn.init.constant_(self.to_logits.bias, -2.0)
        # DN: noised labels become content, noised boxes become places.
        self.label_content = nn.Embedding(classes, width)
        self.box_place = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, images: Tensor, noised: NoisedQueries | None = None) -> tuple[Tensor, Tensor, GroupLayout]:
        """images [B, 3, H, W] -> logits [Y, B, Q, K], boxes [Y, B, Q, 4] and the order of queries."""
        maps = self.backbone(images)
        height, width = maps.shape[-2:]
        rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
        pixels = maps.flatten(2).transpose(1, 2)
        keys = pixels + self.pixel_place(torch.stack((columns, rows), -1).flatten(0, 1).to(pixels))

        place = self.place.weight.expand(len(images), -1, -1)
        content = torch.zeros_like(place)
        layout, active = GroupLayout(0, 0, place.shape[1]), None
        if noised is not None:  # DN: first the noised queries, then the matching ones
            layout, active = noised.layout(place.shape[1]), noised.active
            content = torch.cat((self.label_content(noised.labels).flatten(1, 2), content), dim=1)
            place = torch.cat((self.box_place(noised.boxes).flatten(1, 2), place), dim=1)

        outputs = []
        for layer in self.layers:
            content = layer(content, place, pixels, keys, layout, active)
            outputs.append(content)
        hidden = torch.stack(outputs)
        return self.to_logits(hidden), self.to_box(hidden).sigmoid(), layout


def own_loss(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    """Stands for the loss your detector has already: Hungarian matching, then focal, L1 and GIoU losses."""
    matches: Matches = match(logits, boxes, targets)
    objects = targets.counts.sum().clamp(min=1).to(boxes.dtype)
    layout = GroupLayout(0, 0, logits.shape[2])
    return set_loss(logits, boxes, matches, layout, targets, torch.stack((objects, objects)), LossWeights())[0]


def training_loss(model: VanillaDETR, images: Tensor, targets: Targets, classes: int, groups: int = 5):
    """-> the detector's own loss, the denoising loss."""
    noise = draw_noise(targets, groups, classes)  # DN
    logits, boxes, layout = model(images, noised_queries(targets, noise, label_noise=0.2, box_noise=0.4))
    first = layout.denoising  # DN: the rows of noised queries come first in every output
    own = own_loss(logits[:, :, first:], boxes[:, :, first:], targets)
    return own, denoising_loss(logits[:, :, :first], boxes[:, :, :first], targets, groups)[0]


def rectangles(batch: int, generator: torch.Generator, slots: int = 4, side: int = 64) -> tuple[Tensor, Targets]:
    """Images with one to ``slots`` filled rectangles; the class is the colour channel. Targets are padded to slots."""
    counts = torch.randint(1, slots + 1, (batch,), generator=generator)
    labels = torch.randint(3, (batch, slots), generator=generator)
    size = 0.15 + 0.25 * torch.rand(batch, slots, 2, generator=generator)
    centre = size / 2 + (1 - size) * torch.rand(batch, slots, 2, generator=generator)
    boxes = torch.cat((centre, size), -1)
    grid = (torch.arange(side) + 0.5) / side
    inside = (grid - centre[..., None]).abs() < size[..., None] / 2  # [B, T, xy, side]
    images = torch.zeros(batch, 3, side, side)
    for image in range(batch):
        for slot in range(int(counts[image])):
            images[image, labels[image, slot]] += inside[image, slot, 1, :, None] & inside[image, slot, 0]
    valid = torch.arange(slots) < counts[:, None]
    return images, Targets(labels * valid, boxes * valid[..., None], counts.int())


def main(steps: int = 300) -> list[tuple[float, float]]:
    """Train, print and return (own loss, denoising loss)."""
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(0), VanillaDETR(classes=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for step in range(steps):
        images, targets = rectangles(16, generator)
        own, denoising = training_loss(model, images, targets, classes=3)
        optimizer.zero_grad()
        (own + denoising).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        history.append((own.item(), denoising.item()))
        if step % 25 == 0:
            print(f"step {step:4d}  own loss {own:.3f}  denoising loss {denoising:.3f}")
    return history


if __name__ == "__main__":
    main()
