"""The training loader of a data module that does not know of wrappers, with something put around its data set."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    default_collate,
)

from kd_lightning.data.loaders import View, Views, mixed
from kd_lightning.data.with_ids import asks_for_views
from kd_lightning.tasks.batch import Identified, Taught

_REMEDY = (
    "return torch.utils.data.DataLoader(dataset, batch_size=...) of a map-style data set, or give the data module "
    "training_set() and wrappers, which its train_dataloader puts around that set; or take teachers=live and losses "
    "that remember no samples"
)


def rewrapped(loader: Any, wrappers: Sequence[Callable[[Any], Any]], seed: int = 0) -> DataLoader[Any]:
    """Return a loader like another one, of a data set with wrappers around it, the first one innermost.

    Where the outermost data set asks for a :class:`~kd_lightning.data.loaders.View`, samples that were shuffled, or
    came in order, come through :class:`~kd_lightning.data.loaders.Views`, as Lightning replaces samplers for a
    distributed training; of another sampler's samples each is asked for as this epoch has it.

    Args:
        loader: As the data module's ``train_dataloader`` returns it.
        wrappers: Each makes a data set of a data set.
        seed: Of the order, where samples are shuffled.

    Raises:
        ValueError: For a loader whose samples cannot be told apart: of an iterable data set, of several loaders, of a
            subclass, or with batches of its own making.
    """
    check_can_be_rewrapped(loader)
    dataset = loader.dataset
    for wrap in wrappers:
        dataset = wrap(dataset)
    sampler = loader.sampler
    if asks_for_views(dataset) and not isinstance(sampler, Views):
        plain = isinstance(sampler, SequentialSampler) or (
            isinstance(sampler, RandomSampler) and not sampler.replacement and len(sampler) == len(dataset)
        )
        shuffle = isinstance(sampler, RandomSampler)
        sampler = Views(dataset, shuffle, mixed(seed) % 2**32) if plain else _AsViews(sampler)
    return DataLoader(
        dataset,
        loader.batch_size,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=partial(collate_inside, loader.collate_fn),
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def check_can_be_rewrapped(loader: Any) -> None:
    """Raise ValueError for a loader of which :func:`rewrapped` cannot make another; with what to do."""
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        got = f"an iterable data set, {type(loader.dataset).__name__}"
    elif type(loader) is not DataLoader:
        got = type(loader).__name__
    elif type(loader.batch_sampler) is not BatchSampler:
        by = "the data set" if loader.batch_sampler is None else type(loader.batch_sampler).__name__
        got = f"batches that {by} makes"
    else:
        return
    raise ValueError(f"expected a training loader that asks its data set for samples by number, got {got}: {_REMEDY}")


def collate_inside(collate: Callable[[Any], Any], fetched: Any) -> Any:
    """Collate samples as a loader does, and what :class:`WithIds` and ``StoredOutputs`` have put around each."""
    if isinstance(fetched, Taught | Identified):  # a batch that was fetched at once
        return fetched._replace(batch=collate_inside(collate, fetched.batch))
    if isinstance(fetched, list) and isinstance(fetched[0], Taught | Identified):
        inner = collate_inside(collate, [sample.batch for sample in fetched])
        return type(fetched[0])(inner, *(default_collate(list(part)) for part in list(zip(*fetched, strict=True))[1:]))
    return collate(fetched)


class _AsViews(Sampler[View]):
    """The samples of another sampler, each as this epoch has it."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.epoch = sampler, 0

    def __iter__(self) -> Iterator[View]:
        return (View(int(sample), self.epoch) for sample in self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning ahead of each epoch."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
