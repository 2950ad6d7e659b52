"""Training loaders whose order is a function of seed and epoch, and loaders that keep the data set's order."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler, default_collate


class View(NamedTuple):
    """What a training loader asks its data set for: a sample, augmented as this epoch has it."""

    sample: int
    epoch: int


class Batched(Dataset[Any]):
    """A data set in memory, whose batch is one indexing; a sample is that of a batch of one. A subclass has `batch`."""

    @property
    def deterministic(self) -> bool:
        """Whether a sample is the same in each epoch and with each seed."""
        return True

    def batch(self, samples: Sequence[int], epoch: int | None) -> Any:
        """Return a batch, tensors (B, ...); augmented as the epoch has it, unless that is None."""
        raise NotImplementedError

    def __getitem__(self, key: View | int) -> Any:
        return apply_to_collection(self.__getitems__([key]), Tensor, lambda x: x[0])

    def __getitems__(self, keys: Sequence[View | int]) -> Any:
        """Return a batch; PyTorch's DataLoader asks for it where this method is there."""
        samples = [key.sample if isinstance(key, View) else key for key in keys]
        return self.batch(samples, keys[0].epoch if isinstance(keys[0], View) else None)


def shuffled(
    dataset: Dataset[Any], batch_size: int, seed: int, trainer: Trainer | None = None, num_workers: int = 0
) -> DataLoader[Any]:
    """Ask the data set for a :class:`View` of each sample once an epoch, in an order drawn from (seed, epoch).

    So a resumed training sees what an uninterrupted one sees (with ``num_workers``, which begin before Lightning has
    told them the epoch, thanks to :class:`~kd_lightning.resume.Resumption`). Lightning leaves the sampler in place
    in a distributed training: each process gets its own share, of equal length, for which up to one sample a process
    is seen twice. Nothing is drawn from the global random number generator.
    """
    world, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
    # Mixed, as the sampler adds the epoch: otherwise epoch 1 of seed 0 would be epoch 0 of seed 1.
    sampler = Views(dataset, seed=mixed(seed) % 2**32, num_replicas=world, rank=rank)
    return _loader(dataset, sampler, batch_size, seed, num_workers)


def in_order(dataset: Dataset[Any], batch_size: int, num_workers: int = 0) -> DataLoader[Any]:
    """Go through the data set once, in its order and without augmentation.

    In a distributed training Lightning divides it among the processes and repeats samples until all have as many;
    of 1,000 images and 2 processes none. Score it in one process for an exact figure.
    """
    sampler: SequentialSampler = SequentialSampler(dataset)  # type: ignore[arg-type]  # a Dataset need not have a length
    return _loader(dataset, sampler, batch_size, 0, num_workers)


def mixed(*numbers: int) -> int:
    """Make one seed of several numbers; neighbours give unrelated ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class Views(DistributedSampler[Any]):
    """Ask a data set for a :class:`View` of each sample once an epoch.

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


def _loader(dataset: Dataset[Any], sampler: Any, batch_size: int, seed: int, num_workers: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        collate_fn=_as_is if hasattr(dataset, "__getitems__") else None,
        generator=torch.Generator().manual_seed(seed),  # the workers' seeds are drawn from the global one otherwise
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _as_is(batch: Any) -> Any:
    """Collate samples that were fetched together; a data set in memory gives a batch already."""
    return default_collate(batch) if isinstance(batch, list) else batch
