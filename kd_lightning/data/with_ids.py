"""Tell the losses which samples of the data set a batch holds."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from kd_lightning.data.loaders import View
from kd_lightning.tasks.batch import Identified


class WithIds(Dataset[Any]):
    """A data set whose batches say which samples they hold, for losses that remember samples (CRD).

    Wrap the whole training set, outside of a subset or a concatenation: ids run from 0 to its length − 1.
    ``DistillationModule`` and the ``Distillation`` callback unwrap the batch before ``training_step`` sees it.

    Args:
        dataset: Map-style.

    Raises:
        TypeError: For a data set without a length.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> plain = TensorDataset(torch.zeros(3, 2), torch.tensor([5, 6, 7]))
        >>> batch = next(iter(DataLoader(WithIds(plain), batch_size=2)))
        >>> batch.batch[1], batch.ids
        (tensor([5, 6]), tensor([0, 1]))
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"expected a map-style data set with a length, got {type(dataset).__name__}: an iterable one does not "
                "say which sample is which"
            )
        self.dataset = dataset
        if hasattr(dataset, "__getitems__"):
            self.__getitems__ = self._batch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Identified:
        return Identified(self.dataset[key], torch.tensor(_id(key)), torch.tensor(len(self)))

    def _batch(self, keys: Sequence[Any]) -> Any:
        """Fetch a batch at once where the data set can; as samples, or collated as our own data sets give it."""
        fetched, ids = self.dataset.__getitems__(keys), torch.tensor([_id(key) for key in keys])
        total = torch.tensor(len(self))
        if isinstance(fetched, list):
            return [Identified(sample, i, total) for sample, i in zip(fetched, ids, strict=True)]
        return Identified(fetched, ids, total.expand(len(ids)))


def asks_for_views(dataset: Any) -> bool:
    """Tell whether a data set, or the one inside :class:`WithIds`, is annotated to take a :class:`View` as key."""
    if isinstance(dataset, WithIds):
        return asks_for_views(dataset.dataset)
    annotations = getattr(type(dataset).__getitem__, "__annotations__", {})
    return any("View" in str(kind) for name, kind in annotations.items() if name != "return")


def _id(key: Any) -> int:
    return key.sample if isinstance(key, View) else int(key)
