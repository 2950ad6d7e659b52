"""Which samples of the data set a batch holds is known to the losses, and to nobody else."""

import pickle

import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset

from kd_lightning import Distillation, DistillationModule, Outputs
from kd_lightning.data import FashionMNIST, WithIds
from kd_lightning.data.loaders import shuffled
from kd_lightning.losses import DistillationLoss
from tests.callbacks.test_distillation import Existing
from tests.tiny import good_teacher, network, samples, sgd, trainer


class Remembers(DistillationLoss):
    """Notes the samples of each training batch."""

    needs_sample_ids = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.totals: set[int] = set()

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        assert student.samples is not None
        assert len(student.samples.ids) == len(student.logits)
        if self.training:
            self.seen += student.samples.ids.tolist()
            self.totals.add(student.samples.total)
        return student.logits.square().mean()


def numbered(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(float(count))[:, None], torch.arange(count))


class Batches(TensorDataset):
    """Gives samples by the batch, as torch's own fetching protocol has it."""

    def __getitems__(self, indices):
        return [self[i] for i in indices]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [numbered(10), Batches(*numbered(10).tensors), Subset(numbered(30), range(10))])
def test_ids_go_with_their_samples(dataset, workers: int) -> None:
    loader = DataLoader(
        WithIds(dataset), batch_size=4, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    for _ in range(2):
        batches = list(loader)
        assert all(torch.equal(batch.ids, batch.batch[1]) for batch in batches)
        assert sorted(torch.cat([batch.ids for batch in batches]).tolist()) == list(range(10))
        assert {int(total) for batch in batches for total in batch.total} == {10}


def test_ids_are_those_of_what_was_wrapped() -> None:
    whole = WithIds(ConcatDataset([numbered(3), numbered(4)]))
    batch = next(iter(DataLoader(whole, batch_size=7)))
    assert batch.ids.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert batch.batch[1].tolist() == [0, 1, 2, 0, 1, 2, 3]


def test_processes_share_the_ids() -> None:
    whole = WithIds(numbered(8))
    parts = [DataLoader(whole, batch_size=8, sampler=DistributedSampler(whole, 2, rank)) for rank in (0, 1)]
    ids = [next(iter(part)).ids.tolist() for part in parts]
    assert sorted(ids[0] + ids[1]) == list(range(8))


def test_our_loaders_keep_the_id_whatever_the_epochs_order_is() -> None:
    data = FashionMNIST(labelled=50)
    data.setup()
    images = data.training_set()
    loader = shuffled(WithIds(images), batch_size=16, seed=0)
    loader.sampler.set_epoch(3)
    for batch in loader:
        assert torch.equal(batch.batch[0], torch.stack([images[i][0] for i in batch.ids.tolist()]))


def test_a_wrapped_data_set_can_be_pickled() -> None:
    copy = pickle.loads(pickle.dumps(WithIds(Batches(*numbered(5).tensors))))
    assert copy.__getitems__([3])[0].ids == 3


def test_an_iterable_data_set_is_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(TypeError, match="expected a map-style data set with a length, got Stream"):
        WithIds(Stream())


def test_a_module_hands_the_ids_to_its_losses() -> None:
    loss = Remembers()
    module = DistillationModule(network(), good_teacher(), {"loss": loss}, sgd)
    trainer(max_epochs=2).fit(module, DataLoader(WithIds(TensorDataset(*samples(20))), batch_size=8, shuffle=True))
    assert sorted(loss.seen) == sorted(2 * list(range(20)))
    assert loss.totals == {20}


def test_an_existing_modules_step_sees_the_batch_that_it_always_saw() -> None:
    loss = Remembers()
    callback = Distillation(good_teacher(), {"loss": loss}, student="net")
    data = DataLoader(WithIds(TensorDataset(*samples(20))), batch_size=8)
    trainer(max_epochs=1, callbacks=[callback]).fit(Existing(), data)
    assert loss.seen == list(range(20))


@pytest.mark.parametrize("front_door", ["module", "callback"])
def test_a_batch_without_ids_is_refused_before_the_first_step(front_door: str) -> None:
    data = DataLoader(TensorDataset(*samples(20)), batch_size=8)
    callbacks, module = [], Existing()
    if front_door == "module":
        module = DistillationModule(network(), good_teacher(), {"loss": Remembers()}, sgd)
    else:
        callbacks = [Distillation(good_teacher(), {"loss": Remembers()}, student="net")]
    with pytest.raises(ValueError, match=r"losses \['loss'\] remember samples, expected.*WithIds\(dataset\)"):
        trainer(callbacks=callbacks).fit(module, data)


def test_a_data_module_gives_ids_where_it_is_asked_to() -> None:
    data = FashionMNIST(labelled=50)
    assert len(next(iter(data.train_dataloader()))) == 2
    data.wrappers = [WithIds]
    assert next(iter(data.train_dataloader())).ids.max() < 50
