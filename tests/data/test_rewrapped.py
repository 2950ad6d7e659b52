"""A loader like another one, of a data set with something around it: samples, their order, how they are collated."""

from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from kd_lightning.data import WithIds
from kd_lightning.data.loaders import View, Views
from kd_lightning.data.rewrapped import rewrapped
from kd_lightning.tasks.batch import Identified, Taught

DATA = TensorDataset(torch.arange(10)[:, None].float(), torch.arange(10) % 3)


class AsViews(Dataset[Any]):
    """Asks for views, as ``StoredOutputs`` does; says which one it was asked for."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: View) -> Taught:
        return Taught(self.dataset[key.sample], {"logits": torch.tensor([float(key.sample), float(key.epoch)])})


def batches(loader: DataLoader, epoch: int = 0) -> list[Any]:
    """An epoch of a loader, as Lightning sees to it."""
    if hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)
    return list(loader)


def test_samples_in_order_stay_in_order_and_come_as_this_epochs_views() -> None:
    loader = rewrapped(DataLoader(DATA, batch_size=4), [AsViews])
    assert isinstance(loader.sampler, Views)
    for epoch in (0, 3):
        found = batches(loader, epoch)
        x, y = (torch.cat([batch.batch[i] for batch in found]) for i in (0, 1))
        assert torch.equal(x[:, 0], torch.arange(10.0))
        assert torch.equal(y, torch.arange(10) % 3)
        views = torch.cat([batch.teacher["logits"] for batch in found])
        assert torch.equal(views, torch.stack([torch.arange(10.0), torch.full((10,), float(epoch))], 1))


def test_shuffled_samples_are_shuffled_by_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[float]:
        torch.randn(3)  # of the global generator nothing depends
        loader = rewrapped(DataLoader(DATA, batch_size=5, shuffle=True), [AsViews], seed)
        return torch.cat([batch.batch[0] for batch in batches(loader, epoch)]).flatten().tolist()

    assert sorted(order(0, 0)) == list(range(10))
    assert order(0, 0) == order(0, 0) != order(0, 1)
    assert order(1, 0) != order(0, 0)


def test_another_samplers_samples_are_kept() -> None:
    weights = torch.zeros(10)
    weights[[2, 7]] = 1
    sampler = WeightedRandomSampler(weights.tolist(), num_samples=20)
    found = batches(rewrapped(DataLoader(DATA, batch_size=4, sampler=sampler), [AsViews]), epoch=2)
    assert set(torch.cat([batch.batch[0] for batch in found]).flatten().tolist()) == {2.0, 7.0}
    assert sum(len(batch.batch[1]) for batch in found) == 20
    assert {float(view) for batch in found for view in batch.teacher["logits"][:, 1]} == {2.0}


def test_where_nothing_asks_for_views_the_sampler_stays_and_ids_are_numbers() -> None:
    """A TensorDataset that is asked for a view would take it for two indices."""
    loader = rewrapped(DataLoader(DATA, batch_size=4, shuffle=True), [WithIds])
    assert isinstance(loader.sampler, RandomSampler)
    for batch in loader:
        assert isinstance(batch, Identified)
        assert torch.equal(batch.batch[0][:, 0], batch.ids.float())
        assert batch.total.unique().tolist() == [10]


def collated(items: list[Any]) -> dict[str, Any]:
    return {"x": torch.stack([x for x, _ in items]), "labels": torch.stack([y for _, y in items]), "count": len(items)}


@pytest.mark.parametrize("wrappers", [[AsViews], [AsViews, WithIds]])
def test_ones_own_way_to_make_a_batch_is_kept_inside(wrappers: list[Any]) -> None:
    loader = DataLoader(DATA, batch_size=4, collate_fn=collated, drop_last=True)
    found = batches(rewrapped(loader, wrappers))
    assert len(found) == 2
    for batch in found:
        if WithIds in wrappers:
            assert torch.equal(batch.ids.float(), batch.batch.batch["x"][:, 0])
            batch = batch.batch
        assert isinstance(batch, Taught)
        assert batch.batch["count"] == 4
        assert torch.equal(batch.batch["x"][:, 0], batch.teacher["logits"][:, 0])


def test_samples_that_are_fetched_at_once_are_collated_inside() -> None:
    class Fetched(TensorDataset):
        def __getitems__(self, keys: list[int]) -> list[Any]:
            return [self[key] for key in keys]

    (batch,) = rewrapped(DataLoader(Fetched(*DATA.tensors), batch_size=10, collate_fn=collated), [WithIds])
    assert torch.equal(batch.ids.float(), batch.batch["x"][:, 0])


def test_the_rest_of_the_loader_is_kept() -> None:
    given = DataLoader(
        DATA, batch_size=3, num_workers=2, drop_last=True, timeout=5, prefetch_factor=4, persistent_workers=True
    )
    made = rewrapped(given, [AsViews])
    for name in ("batch_size", "num_workers", "drop_last", "timeout", "prefetch_factor", "persistent_workers"):
        assert getattr(made, name) == getattr(given, name)
    assert len(batches(made)) == 3


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from DATA


class Own(DataLoader):
    """A subclass, which may make batches in any way."""


class Pairs(BatchSampler):
    """Batches of its own making."""


@pytest.mark.parametrize(
    ("loader", "got"),
    [
        (DataLoader(Stream(), batch_size=4), "an iterable data set, Stream"),
        ([DataLoader(DATA)], "list"),
        (Own(DATA), "Own"),
        (DataLoader(DATA, batch_sampler=Pairs(SequentialSampler(DATA), 2, False)), "batches that Pairs makes"),
        (DataLoader(DATA, batch_size=None), "batches that the data set makes"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_with_the_remedy(loader: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"asks its data set for samples by number, got {got}: return .*DataLoader"):
        rewrapped(loader, [WithIds])
