"""A sampler that says the epoch, for data sets of several views."""

from collections.abc import Iterator
from typing import Any

import torch.distributed
from torch.utils.data import DistributedSampler

from kd_lightning.data.loaders import View


class Views(DistributedSampler[Any]):
    """Ask a data set for a :class:`~kd_lightning.data.loaders.View` of each sample once an epoch.

    The order is drawn from (seed, epoch). Lightning tells the sampler the epoch, also after a resume, and leaves it in
    place in a distributed training, where each process gets its own share; in a loop of one's own, call
    ``set_epoch(epoch)``.

    Args:
        dataset: Gives the length.
        shuffle: Draw another order for each epoch.
        seed: Of the order.
        num_replicas: Processes; those of ``torch.distributed`` unless given, or one.
        rank: Of this process; likewise.

    Example:
        >>> [tuple(key) for key in Views(range(3), shuffle=False)]
        [(0, 0), (1, 0), (2, 0)]
    """

    def __init__(
        self,
        dataset: Any,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if alone and num_replicas is None:
            num_replicas, rank = 1, 0
        super().__init__(dataset, num_replicas, rank, shuffle, seed)

    def __iter__(self) -> Iterator[Any]:
        return (View(sample, self.epoch) for sample in super().__iter__())
