"""See the first batches of a training before it begins, without a trace of having looked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, IterableDataset

from kd_lightning.namespaces import of_both

SCAN = 100
"""Batches that are looked through, for a labelled one or for samples to judge a teacher on."""
_END = object()


def training_loader(module: LightningModule) -> Any:
    """Make the training loader, of which nothing is drawn from any random number generator that the training uses."""
    with untouched_rng():
        # Lightning's own set-up of the loader would come too early here: it restores a loader's state after this.
        return module.trainer.fit_loop._data_source.dataloader()


def training_batches(module: LightningModule, count: int = SCAN, loader: Any = None) -> Iterator[Any]:
    """Yield up to ``count`` batches of the training loader, on CPU, as ``training_step`` would get them.

    Runs in this process whatever the number of workers, and draws nothing from any random number generator that the
    training uses. The loader is made, unless it is given.
    """
    for batch in loader_batches(training_loader(module) if loader is None else loader, count):
        with untouched_rng():
            transferred = _transferred(module.trainer, module, batch)
        yield transferred


def loader_batches(loader: Any, count: int = SCAN) -> Iterator[Any]:
    """Yield up to ``count`` batches of a loader, likewise."""
    batches = _iterate(loader)
    for _ in range(count):
        with untouched_rng():  # for each batch: between them it is the caller's draws that count
            batch = next(batches, _END)
        if batch is _END:
            return
        yield batch


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Put the random number generators back to where they were."""
    error: BaseException | None = None
    with isolate_rng():  # which does not when it is left by an exception, or by a generator that is not run to its end
        try:
            yield
        except BaseException as caught:
            error = caught
    if error is not None:
        raise error


def _iterate(loader: Any) -> Iterator[Any]:
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        dataset, collate = loader.dataset, loader.collate_fn
        if loader.batch_sampler is None:
            for index in _unshared(loader.sampler):
                yield collate(dataset[index])
        else:
            for indices in _unshared(loader.batch_sampler):
                fetch = getattr(dataset, "__getitems__", None)
                yield collate(fetch(indices) if fetch else [dataset[i] for i in indices])
    elif isinstance(loader, DataLoader):
        yield from _unshared(loader)
    else:
        combined: Any = loader
        if not isinstance(loader, of_both(CombinedLoader)):
            combined = CombinedLoader(loader, "max_size_cycle")
        for batch, _, _ in combined:
            yield batch


def _unshared(source: Any) -> Iterator[Any]:
    """Iterate a sampler or a loader and put its generators back to where they were."""
    owners = (source, getattr(source, "sampler", None))
    states = [(g, g.get_state()) for g in (getattr(o, "generator", None) for o in owners) if g is not None]
    try:
        yield from source
    finally:
        for generator, state in states:
            generator.set_state(state)


def _transferred(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    for owner in (trainer.datamodule, module):  # type: ignore[attr-defined]
        if owner is not None:
            batch = owner.on_after_batch_transfer(owner.on_before_batch_transfer(batch, 0), 0)
    return batch
