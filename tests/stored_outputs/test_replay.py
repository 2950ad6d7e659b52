"""What happens to a sample is a function of (seed, sample, view), whatever asks for it."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from kd_lightning.data import WithIds
from kd_lightning.data.in_memory import CropAndFlip, InMemory
from kd_lightning.data.loaders import View
from kd_lightning.stored_outputs.replay import ReplayedViews, view_seeds
from tests.stored_outputs.data import Augmented, store


class Own:
    """Has a generator of its own, as albumentations' ``Compose`` has, and can be seeded likewise."""

    def __init__(self) -> None:
        self.random = np.random.default_rng()

    def set_random_seed(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + float(self.random.normal())


class Pipeline:
    def __init__(self, *transforms) -> None:
        self.transforms = transforms

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for transform in self.transforms:
            x = transform(x)
        return x


def images(count: int = 12, seed: int = 0) -> InMemory:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)
    return InMemory(pixels, np.arange(count), [0.5], [0.5], CropAndFlip(count, seed, padding=2))


@pytest.mark.parametrize("transform", [None, Own(), Pipeline(Own())])
def test_a_view_is_the_same_in_any_batch_and_another_than_the_others(transform) -> None:
    views = ReplayedViews(Augmented(transform=transform), seed=3)
    batch = [x for x, _ in views.__getitems__([View(4, 0), View(7, 2), View(4, 1)])]
    assert torch.equal(batch[1], views[View(7, 2)][0])
    assert torch.equal(batch[0], ReplayedViews(Augmented(transform=transform), seed=3)[View(4, 0)][0])
    assert not torch.equal(batch[0], batch[2])
    assert not torch.equal(batch[0], ReplayedViews(Augmented(transform=transform), seed=4)[View(4, 0)][0])


def test_the_generators_are_afterwards_what_they_were() -> None:
    def draws() -> tuple:
        return float(torch.rand(())), random.random(), float(np.random.rand()), random.gauss(0, 1), np.random.randn()

    def start() -> None:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        np.random.randn()  # numpy keeps the second one of a pair

    views = ReplayedViews(Augmented(), seed=0)
    start()
    expected = draws()
    start()
    views.__getitems__([View(0, 0), View(1, 0)])
    views[View(2, 0)]
    assert draws() == expected


def test_seeds_differ_and_are_the_same_everywhere() -> None:
    keys = [View(sample, view) for sample in range(300) for view in range(30)]
    found = np.concatenate([view_seeds(seed, keys) for seed in range(3)])
    assert len(set(found.tolist())) == len(found)
    assert len(set((found & np.uint64(0xFFFFFFFF)).tolist())) >= len(found) - 2  # numpy takes 32 bits
    assert view_seeds(0, [View(1, 2)])[0] == view_seeds(0, keys)[32]


@pytest.mark.parametrize("wrap", [lambda x: x, WithIds])
def test_data_sets_that_take_views_give_whole_batches(wrap) -> None:
    whole = images()
    views = ReplayedViews(wrap(whole), seed=0)
    batch = views.__getitems__([View(3, 5), View(1, 5)])
    pixels = batch[0] if wrap is not WithIds else batch.batch[0]
    assert torch.equal(pixels, whole.__getitems__([View(3, 5), View(1, 5)])[0])


def test_views_reach_data_sets_inside_subsets_and_concatenations() -> None:
    one, two = images(6), images(5, seed=1)
    views = ReplayedViews(ConcatDataset([Subset(one, [4, 2]), two]), seed=0)
    assert torch.equal(views[View(1, 3)][0], one[View(2, 3)][0])
    assert torch.equal(views[View(2, 3)][0], two[View(0, 3)][0])
    assert torch.equal(views[View(6, 1)][0], two[View(4, 1)][0])


def test_a_plain_data_set_is_asked_for_samples() -> None:
    plain = TensorDataset(torch.arange(12.0).reshape(4, 3))
    assert torch.equal(ReplayedViews(plain, 0)[View(2, 1)][0], torch.tensor([6.0, 7.0, 8.0]))


def test_augmentation_that_cannot_be_replayed_is_refused(tmp_path) -> None:
    source = np.random.default_rng()
    hidden = Augmented(transform=lambda x: x + float(source.normal()))
    with pytest.raises(ValueError, match="sample 0 of Augmented is another each time that view 0 of it is asked for"):
        store(tmp_path / "outputs", hidden)
    assert not (tmp_path / "outputs").exists()
