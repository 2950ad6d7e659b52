"""Loaders whose order is a function of seed and epoch, and subsets of a pool of samples."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

ROLES = ("teacher", "student", "control", "distilled")


def check_role(role: str) -> None:
    """Raise ValueError for a role that no stage has."""
    if role not in ROLES:
        raise ValueError(f"expected role to be one of {', '.join(ROLES)}, got {role!r}")


def shuffled(
    dataset: Dataset[Any], batch_size: int, seed: int, trainer: Trainer | None, num_workers: int = 0
) -> DataLoader[Any]:
    """Shuffle by (seed, epoch), so that a resumed training sees the order of an uninterrupted one.

    Lightning tells the sampler the epoch. Nothing is drawn from the global random number generator. Each process of a
    distributed training gets its own share.
    """
    world, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, world, rank, seed=seed)
    return _loader(dataset, sampler, batch_size, seed, num_workers)


def in_order(dataset: Dataset[Any], batch_size: int, num_workers: int = 0) -> DataLoader[Any]:
    """Go through the data set once, in its order."""
    return _loader(dataset, SequentialSampler(dataset), batch_size, 0, num_workers)  # type: ignore[arg-type]


def draw(
    pool: Sequence[int] | NDArray[np.int64], sizes: Sequence[int], seed: int, what: str
) -> list[NDArray[np.int64]]:
    """Draw disjoint subsets at random, the same for the same seed.

    Raises:
        ValueError: When the pool is too small.
    """
    if sum(sizes) > len(pool):
        raise ValueError(
            f"expected {what} to fit into a pool of {len(pool)} images, got {' + '.join(map(str, sizes))}: ask for "
            "fewer, or use the whole set"
        )
    order = np.random.default_rng(seed).permutation(pool)
    return list(np.split(order, np.cumsum(sizes))[: len(sizes)])


class InMemory(Dataset[tuple[Tensor, Tensor]]):
    """Images and targets as two tensors; a batch is one indexing, not one for each sample."""

    def __init__(self, images: Tensor, target: Tensor) -> None:
        self.images, self.target = images, target

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.target[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a batch; PyTorch's DataLoader asks for it where this method is there."""
        return self.images[indices], self.target[indices]


def _loader(dataset: Dataset[Any], sampler: Any, batch_size: int, seed: int, num_workers: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size,
        # Lightning looks for the epoch-dependent sampler here, and leaves it in place in a distributed training.
        sampler=sampler,
        collate_fn=_as_is if isinstance(dataset, InMemory) else None,
        generator=torch.Generator().manual_seed(seed),  # of the workers' seeds
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _as_is(batch: Any) -> Any:
    return batch


def normalised(images: NDArray[np.uint8], mean: Tensor, std: Tensor) -> Tensor:
    """Turn bytes (N, C, H, W) into float32, each channel shifted and scaled as the networks expect it."""
    return (torch.from_numpy(images).float() / 255 - mean[:, None, None]) / std[:, None, None]
