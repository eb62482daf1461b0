"""Started by torchrun: rows of two processes, as many as may be of each, joined on the first one."""

import torch

from dndetr.training.distributed import Processes


def rows_of(rank: int, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(count * torch.Size(shape).numel()).reshape(count, *shape) + 1000 * rank).to(dtype)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with Processes() as processes:
        for counts in ((2, 3), (0, 4), (5, 0), (0, 0), (1, 100_000)):
            for shape, dtype in (((), torch.int64), ((4,), torch.float64)):
                parts = [rows_of(rank, count, shape, dtype) for rank, count in enumerate(counts)]
                joined = processes.join(parts[processes.rank])
                assert (joined is not None) == processes.first, "the others keep nothing"
                if processes.first:
                    assert joined.dtype == dtype and torch.equal(joined, torch.cat(parts))
        if processes.first:
            print("joined")
