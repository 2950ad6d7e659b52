"""Augmentation that can be replayed: what happens to a sample is a function of (seed, sample, view)."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Dataset, Subset

from kd_lightning.data.loaders import View
from kd_lightning.data.with_ids import asks_for_views


@runtime_checkable
class Reseedable(Protocol):
    """A transform with generators of its own, as albumentations' ``Compose``."""

    def set_random_seed(self, seed: int) -> None: ...


class ReplayedViews(Dataset[Any]):
    """A data set that is asked for a :class:`~kd_lightning.data.loaders.View`: a sample, as view ``epoch`` has it.

    The generators of ``torch``, ``random`` and ``numpy``, and those of transforms that have ``set_random_seed``, are
    seeded for each view, and are afterwards what they were before. A data set whose ``__getitem__`` is annotated to
    take a ``View`` replays by itself and is asked for one, also inside ``Subset`` and ``ConcatDataset``.

    Args:
        dataset: Map-style.
        seed: Of all views.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.batched = asks_for_views(dataset) and hasattr(dataset, "__getitems__")
        self._reseedable = list(_reseedable(dataset, set()))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: View) -> Any:
        return self._one_by_one([key])[0]

    def __getitems__(self, keys: Sequence[View]) -> Any:
        """Return a batch: a list of samples, or collated as our own data sets give it."""
        if not self.batched:
            return self._one_by_one(keys)
        if len({key.epoch for key in keys}) > 1:
            raise ValueError(
                f"expected one view a batch from {type(self.dataset).__name__}, which gives whole batches, got views "
                f"{sorted({key.epoch for key in keys})}: let all samples of a batch be of one epoch"
            )
        return self.dataset.__getitems__(keys)

    def _one_by_one(self, keys: Sequence[View]) -> list[Any]:
        items, seeds = [], view_seeds(self.seed, keys)
        with untouched_generators():
            for key, number in zip(keys, seeds.tolist(), strict=True):
                # Not torch.manual_seed, which looks after each accelerator and takes a hundred times as long.
                torch.default_generator.manual_seed(number)
                random.seed(number)
                np.random.seed(number & 0xFFFFFFFF)
                for transform in self._reseedable:
                    transform.set_random_seed(number & 0xFFFFFFFF)
                items.append(_fetch(self.dataset, key))
        return items


def view_seeds(seed: int, keys: Sequence[View]) -> NDArray[np.uint64]:
    """Mix (seed, sample, view) to a number each: SplitMix64's finaliser (Steele et al., 2014), over a batch at once."""
    numbers = np.zeros(len(keys), np.uint64)
    for part in (np.uint64(seed % 2**64), *np.asarray(keys, np.uint64).reshape(-1, 2).T):
        numbers = (numbers ^ part) + np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
        numbers ^= numbers >> np.uint64(31)
    return numbers


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Put the generators of this process's CPU back; once a batch, as reading numpy's takes as long as ten seedings."""
    states = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _fetch(dataset: Any, key: View) -> Any:
    if type(dataset) is Subset:
        return _fetch(dataset.dataset, View(dataset.indices[key.sample], key.epoch))
    if type(dataset) is ConcatDataset:
        part = int(np.searchsorted(dataset.cumulative_sizes, key.sample, side="right"))
        before = dataset.cumulative_sizes[part - 1] if part else 0
        return _fetch(dataset.datasets[part], View(key.sample - before, key.epoch))
    return dataset[key if asks_for_views(dataset) else key.sample]


def parts(thing: Any) -> list[Any]:
    """Return the data sets and transforms that a data set or transform is made of."""
    names = ("dataset", "datasets", "transform", "transforms", "target_transform", "augment", "augmented")
    found = [getattr(thing, name, None) for name in names]
    return [x for part in found for x in (part if isinstance(part, list | tuple) else [part]) if x is not None]


def _reseedable(thing: Any, seen: set[int]) -> Iterator[Reseedable]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Reseedable):
        yield thing  # which sees to its own parts
        return
    for part in parts(thing):
        yield from _reseedable(part, seen)
