"""Started by torchrun: a training step shared by two processes, against the same in one; or a run that loses one."""

import os
import random
import sys
import time
from pathlib import Path

import detectors
import torch

from dndetr.batch import Batch, Targets
from dndetr.denoising import Noise, draw_noise
from dndetr.training.distributed import Processes


def gradients(name: str, batches: list[Batch], processes: Processes, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of a step on the batches, taken twice, with noise that depends on the image alone."""
    step = detectors.make_step(detectors.build(name, torch.float64), groups, processes=processes)
    step.clip_norm = 1e9

    def draw(batch: Batch) -> Noise:
        draws = []
        for image, targets in zip(batch.ids.tolist(), images_of(batch.targets), strict=True):
            draw = torch.Generator().manual_seed(image)
            draws.append(draw_noise(targets, groups, detectors.CLASSES, draw, step.denoising.contrastive))
        return Noise(*(torch.cat(field) for field in zip(*draws, strict=True)))

    found = []
    if groups:
        step.draw = draw
    step.optimizer.step = lambda: found.extend(
        (torch.zeros_like(value) if value.grad is None else value.grad).flatten() for value in step.model.parameters()
    )
    for _ in range(2):  # a gradient that a process waits for in vain is missed at its next step
        losses, _ = step(*batches)
    return processes.stack(losses.total).mean(), torch.cat(found)


def images_of(targets: Targets) -> list[Targets]:
    """Each image's targets as a batch of one."""
    return [
        Targets(targets.labels[i : i + 1], targets.boxes[i : i + 1], targets.counts[i : i + 1])
        for i in range(len(targets.counts))
    ]


def compare(name: str, accumulate: int, groups: int) -> None:
    """Two processes with two images each, and one with four, for objects here and there, and in no image of one."""
    with Processes() as processes:
        for counts in ([3, 1, 2, 5], [4, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]):
            whole = detectors.make_batch(counts, 8, torch.float64)
            images = range(2 * processes.rank, 2 * processes.rank + 2)
            if accumulate == 1:
                mine = [detectors.part(whole, slice(images[0], images[0] + 2))]
            else:
                mine = [detectors.part(whole, slice(image, image + 1)) for image in images]
            loss, gradient = gradients(name, mine, processes, groups)
            expected_loss, expected = gradients(name, [whole], Processes({}), groups)
            torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
            assert expected.norm() > 0
        if processes.first:
            print("equal")


def lose_one(*flags: str) -> None:
    """A run whose second process dies in its third step."""
    from dndetr import train
    from dndetr.training.step import TrainStep

    call, steps = TrainStep.__call__, []

    def dying(self, *batches):
        steps.append(None)
        if self.processes.rank == 1 and len(steps) == 3:
            os._exit(9)
        return call(self, *batches)

    TrainStep.__call__ = dying
    sys.exit(train.main(flags))


def straggle(*flags: str) -> None:
    """A run whose second process is late now and then."""
    from dndetr import train
    from dndetr.training.step import TrainStep

    call, draw = TrainStep.__call__, random.Random(0)

    def late(self, *batches):
        if self.processes.rank == 1 and draw.random() < 0.3:
            time.sleep(draw.uniform(0, 0.5))
        return call(self, *batches)

    TrainStep.__call__ = late
    sys.exit(train.main(flags))


def end_alone(*flags: str) -> None:
    """A watched run that leaves no thread behind: one that outlives the interpreter aborts the process now and then."""
    from dndetr import train
    from dndetr.runs.listener import Listener

    class Noting(Listener):
        def run_started(self, run):
            (run.folder / f"told-{os.environ['RANK']}").touch()

    train.run(flags, listeners=[Noting()])
    left = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert len(left) == 1, left


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "end-alone":
        end_alone(*sys.argv[2:])
    elif sys.argv[1] == "lose-one":
        lose_one(*sys.argv[2:])
    elif sys.argv[1] == "straggle":
        straggle(*sys.argv[2:])
    else:
        compare(sys.argv[1], *map(int, sys.argv[2:]))
