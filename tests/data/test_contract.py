"""What is asked of a data module: what it has to have, and what else is used where it has it."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning.data import FashionMNIST, ShakespeareText, WithIds
from kd_lightning.data.contract import Data, make_data
from kd_lightning.data.in_memory import CropAndFlip, InMemory
from tests.tiny import loader


class Plain(LightningDataModule):
    """The least: three loaders."""

    def train_dataloader(self) -> DataLoader:
        return loader(32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return loader(24, seed=1)

    def test_dataloader(self) -> DataLoader:
        return loader(40, seed=2)


def test_three_loaders_are_enough() -> None:
    data = Data(Plain())
    data.check()
    data.check_can_be_wrapped()
    assert data.fingerprint() is None
    assert data.class_names is None
    assert (tuple(data.mean), tuple(data.std), data.unlabelled) == ((), (), 0)
    assert data.batch_size == 8
    assert len(data.training_set()) == 32


def test_role_and_seed_are_given_to_those_that_take_them() -> None:
    class Seeded(Plain):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.given = {"seed": seed}

    class Anything(Plain):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.given = options

    make_data(Plain, role="student", seed=3).check()
    assert make_data(Seeded, role="student", seed=3).module.given == {"seed": 3}
    assert make_data(Anything, role="student", seed=3).module.given == {"role": "student", "seed": 3}
    data = make_data(FashionMNIST, role="teacher", seed=3)
    assert (data.module.role, data.module.seed) == ("teacher", 3)


def test_our_own_modules_keep_it_in_full() -> None:
    data = Data(FashionMNIST(labelled=50, unlabelled=20))
    data.check()
    data.check_can_be_wrapped()
    assert len(data.class_names) == 10
    assert (data.mean, data.std) == ((0.2860,), (0.3530,))
    assert (data.unlabelled, data.batch_size, len(data.training_set())) == (20, 64, 70)
    assert data.fingerprint() == [FashionMNIST(labelled=50, unlabelled=20).fingerprint(), 64]
    assert data.module.wrappers == ()  # nothing stays of having looked


def around(name: str) -> Any:
    """Something to put around a data set, that says what it was put around."""

    class Around(TensorDataset):
        def __init__(self, dataset: Any) -> None:
            super().__init__(*getattr(dataset, "tensors", (torch.zeros(len(dataset)),)))
            self.names = [*getattr(dataset, "names", []), name]

    return Around


@pytest.mark.parametrize("module", [Plain, lambda: FashionMNIST(labelled=50)])
def test_wrappers_are_put_around_in_their_order_the_innermost_first(module: Any) -> None:
    data = Data(module())
    for name in ("b", "c"):
        data.wrap(around(name))
    data.wrap(around("a"), innermost=True)
    for _ in range(2):
        assert data.module.train_dataloader().dataset.names == ["a", "b", "c"]
    assert not hasattr(data.training_set(), "names")  # beneath them


def test_a_wrapped_plain_module_gives_ids_of_the_very_samples() -> None:
    data = Data(Plain())
    data.wrap(WithIds)
    inputs = loader(32).dataset.tensors[0]
    seen = []
    for batch in data.module.train_dataloader():
        assert torch.equal(batch.batch[0], inputs[batch.ids])
        seen += batch.ids.tolist()
    assert sorted(seen) == list(range(32))


def refused(module: Any, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        Data(module).check()


def test_what_is_missing_or_something_else_is_named() -> None:
    class NoTest(LightningDataModule):
        train_dataloader = val_dataloader = Plain.train_dataloader

    refused(
        NoTest(), "NoTest has no test_dataloader, expected train_dataloader, val_dataloader, test_dataloader: models"
    )
    refused(LightningDataModule(), "has no train_dataloader and no val_dataloader and no test_dataloader")
    refused([1, 2], "expected a LightningDataModule, got list", TypeError)
    for name, value, expected in (
        ("fingerprint", "abc", "a method that returns a string"),
        ("training_set", TensorDataset(torch.zeros(2)), "a method that returns the training set"),
        ("wrappers", len, "a list of functions"),
        ("batch_size", "8", "a whole number of 1 or more"),
        ("class_names", "cat", "names, one for each class"),
        ("class_names", [0, 1], "names, one for each class"),
        ("mean", "0.5", "a number for each channel, or one for all"),
        ("std", ["a"], "a number for each channel, or one for all"),
    ):
        module = Plain()
        setattr(module, name, value)
        refused(module, f"Plain.{name} is .*, expected {expected}.*, or leave it out")


def test_one_number_for_all_channels_is_a_mean() -> None:
    module = Plain()
    module.mean, module.std = 0.5, [0.25]
    data = Data(module)
    data.check()
    assert (data.mean, data.std) == ((0.5,), (0.25,))


def test_several_loaders_of_a_split_are_refused() -> None:
    class Two(Plain):
        def val_dataloader(self) -> list[DataLoader]:
            return [loader(8), loader(8)]

    with pytest.raises(ValueError, match=r"val_dataloader returns a list, expected one loader: .*ConcatDataset"):
        Data(Two()).val_dataloader()


def test_wrappers_that_a_module_does_not_put_around_its_set_are_refused() -> None:
    module = Plain()
    module.wrappers = []
    with pytest.raises(
        ValueError, match=r"Plain has wrappers, which its train_dataloader does not call, expected it to"
    ):
        Data(module).check_can_be_wrapped()
    assert module.wrappers == []


def test_samples_may_be_augmented_unless_their_set_says_that_they_are_not() -> None:
    assert Data(Plain()).augmented
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)

    class Images(Plain):
        def __init__(self, augment: CropAndFlip | None) -> None:
            super().__init__()
            self.set = InMemory(images, torch.zeros(4).long(), [0.0] * 3, [1.0] * 3, augment)

        def training_set(self) -> InMemory:
            return self.set

    assert Data(Images(CropAndFlip(4, seed=0))).augmented
    for plain in (Images(None), FashionMNIST(), ShakespeareText()):
        assert not Data(plain).augmented
