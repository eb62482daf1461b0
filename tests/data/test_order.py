"""Which images make which batch: one pass of array operations against the loop that says what is meant."""

import pickle

import numpy as np
import pytest

from dndetr.data.columns import Column
from dndetr.data.order import Order, portraits


def by_loop(portrait, batch_size, training, seed, rank, world, epoch) -> list[list[int]]:
    """Images wait among those of their kind until they are a batch; what is left of both kinds makes the last ones."""
    images = np.arange(len(portrait))
    if training:
        images = np.random.default_rng((seed, epoch, len(images))).permutation(images)
    batches, waiting = [], ([], [])
    for image in images.tolist():
        group = waiting[portrait[image]]
        group.append(image)
        if len(group) == batch_size:
            batches.append(group.copy())
            group.clear()
    rest = waiting[0] + waiting[1]
    batches += [rest[at : at + batch_size] for at in range(0, len(rest), batch_size)]
    if training:
        batches = batches[: len(portrait) // batch_size // world * world]
    return batches[rank::world]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", range(150))
def test_batches_are_those_of_the_loop(case, training):
    draw = np.random.default_rng(case)
    images, batch_size, world = draw.integers(0, 60), int(draw.integers(1, 9)), int(draw.integers(1, 4))
    portrait = (draw.random(images) < draw.choice((0, 0.1, 0.5, 1))).tolist()
    for rank in range(world):
        order = Order(portrait, batch_size, training, seed=case, rank=rank, world=world)
        for epoch in (0, 3):
            expected = by_loop(portrait, batch_size, training, case, rank, world, epoch)
            made = order.batches(epoch)
            assert list(made) == expected and len(made) == len(order) == len(expected)
            assert list(made[1:]) == expected[1:] and list(made[::3]) == expected[::3]
            assert all(type(image) is int for batch in made for image in batch)


def test_an_epoch_is_kept_as_one_array():
    order = Order(np.zeros(1_000_000, bool), 16, training=True, seed=0)
    made = order.batches(0)
    assert len(pickle.dumps(made)) < 1.01 * 8 * 1_000_000
    assert sorted(image for batch in made for image in batch) == list(range(1_000_000))


@pytest.mark.parametrize("kind", [list, lambda sizes: Column(np.array(sizes, np.int64).reshape(-1, 2))])
def test_tall_images(kind):
    sizes = [(40, 60), (60, 40), (50, 50)]
    assert portraits(kind(sizes), None).tolist() == [False, True, False]
    assert portraits(kind(sizes), (64, 64)).tolist() == [False] * 3
    assert portraits(kind([]), None).tolist() == []
