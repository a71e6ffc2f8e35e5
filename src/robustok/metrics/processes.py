"""How several processes share the images of a set."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustok.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process computes every ``world``-th image of a set, beginning with image ``rank``.

    Attributes:
        rank: number of this process.
        world: number of processes.
        add: adds up a float64 tensor over all processes.
        gather: a list of each process to the list of all their entries, the same in every process.
    """

    rank: int = 0
    world: int = 1
    add: Callable[[Tensor], Tensor] = lambda tensor: tensor
    gather: Callable[[list], list] = lambda parts: parts

    def batches(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """Indices (n,) int64 of this process's images out of ``count``, a batch at a time."""
        own = torch.arange(self.rank, count, self.world)
        return iter(own.split(batch_size)) if len(own) else iter(())

    def of_the_first(self, numbers: Sequence[float]) -> list[float]:
        """The numbers of process 0, in every process: what they decide is then decided alike everywhere."""
        own = torch.tensor(numbers, dtype=torch.float64)
        return self.add(own if self.rank == 0 else torch.zeros_like(own)).tolist()

    def in_order(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Rows (N, ...) of all processes in the order of the set, from pairs of indices (n,) and rows (n, ...).

        Raises:
            UserError: no process has any.
        """
        parts = self.gather(list(parts))
        if not parts:
            raise UserError("got no images to evaluate, expected at least one; check the data set")
        indices = torch.cat([indices for indices, _ in parts])
        return torch.cat([rows for _, rows in parts])[indices.argsort()]


ALONE = Processes()
