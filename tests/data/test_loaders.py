"""Order and augmentation are functions of seed and epoch, in a real training too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from kd_lightning import DistillationModule, Teacher
from kd_lightning.data.image_data import ImageData
from kd_lightning.data.in_memory import CropAndFlip, InMemory
from kd_lightning.data.loaders import in_order, mixed, shuffled
from kd_lightning.losses import KD
from tests.tiny import trainer


def numbered(count: int = 20, augment: CropAndFlip | None = None) -> InMemory:
    """Targets that are the sample's index, images of noise."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 8, 8), generator=random, dtype=torch.uint8)
    return InMemory(images, torch.arange(count), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), augment)


def epoch(loader: torch.utils.data.DataLoader, number: int) -> list[int]:
    loader.sampler.set_epoch(number)
    return torch.cat([target for _, target in loader]).tolist()


class Recorder(LightningModule):
    """Learns a little, and keeps what it was shown."""

    def __init__(self, loader_of=None) -> None:
        super().__init__()
        self.layer, self.loader_of = torch.nn.Linear(192, 1), loader_of
        self.seen: list[list[int]] = []
        self.validated: list[int] = []

    def train_dataloader(self):
        return self.loader_of(self.trainer)

    def val_dataloader(self):
        return in_order(numbered(7), 3)

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch, _):
        torch.rand(1)  # as dropout would
        self.seen[-1] += batch[1].tolist()
        return self.layer(batch[0].flatten(1)).mean()

    def validation_step(self, batch, _) -> None:
        self.validated += batch[1].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def augmented(trainer_) -> torch.utils.data.DataLoader:
    return shuffled(numbered(augment=CropAndFlip(20, seed=3)), 6, 3, trainer_)


def test_each_epoch_has_an_order_of_its_own_and_every_sample_once():
    loader = shuffled(numbered(), 6, seed=0)
    first, second = epoch(loader, 0), epoch(loader, 1)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first != list(range(20))


def test_the_order_is_that_of_seed_and_epoch_whatever_the_global_generators_state():
    torch.manual_seed(1)
    one = epoch(shuffled(numbered(), 6, seed=5), 4)
    torch.manual_seed(2)
    assert one == epoch(shuffled(numbered(), 6, seed=5), 4)
    assert one != epoch(shuffled(numbered(), 6, seed=6), 4)


def test_an_epoch_of_one_seed_is_not_the_next_epoch_of_the_seed_before():
    orders = [epoch(shuffled(numbered(), 6, seed=seed), number) for seed in range(4) for number in range(4)]
    assert len({tuple(order) for order in orders}) == 16


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_is_drawn_from_the_global_generator(num_workers: int):
    training = shuffled(numbered(augment=CropAndFlip(20, 0)), 6, seed=0, num_workers=num_workers)
    before = torch.get_rng_state()
    list(training)
    list(in_order(numbered(), 6, num_workers))
    assert torch.equal(before, torch.get_rng_state())


def test_a_training_sees_the_orders_of_seed_and_epoch():
    module = Recorder(lambda trainer_: shuffled(numbered(), 6, 3, trainer_))
    trainer(max_epochs=3).fit(module)
    assert module.seen == [epoch(shuffled(numbered(), 6, 3), number) for number in range(3)]


class Distilled(DistillationModule):
    """Distils on noise, and keeps what it was shown."""

    def __init__(self) -> None:
        student, teacher = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 20)) for _ in range(2))
        losses = {"kd": KD(temperature=2.0)}
        super().__init__(student, Teacher(teacher), losses, lambda parameters: torch.optim.SGD(parameters, lr=0.01))
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch[0].clone(), batch[1].clone()))
        return super().training_step(batch, batch_idx)


class Numbered(ImageData):
    """As the data modules of this package make their loaders."""

    num_classes = 20

    def __init__(self, num_workers: int) -> None:
        super().__init__(batch_size=6, eval_batch_size=6, num_workers=num_workers, role="distilled", seed=3)

    def load_subsets(self):
        return {"train": numbered(augment=CropAndFlip(20, seed=3)), "validation": numbered(7), "test": numbered(7)}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_training_sees_what_an_uninterrupted_one_sees(tmp_path: Path, num_workers: int):
    whole = Distilled()
    trainer(max_epochs=4).fit(whole, datamodule=Numbered(num_workers))
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer(max_epochs=2, callbacks=[keep], enable_checkpointing=True).fit(
        Distilled(), datamodule=Numbered(num_workers)
    )
    resumed = Distilled()
    trainer(max_epochs=4).fit(
        resumed, datamodule=Numbered(num_workers), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True
    )
    assert len(whole.seen) == 16
    for one, other in zip(resumed.seen, whole.seen[8:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_what_happens_to_a_sample_depends_on_neither_batch_nor_workers():
    def images(batch_size: int, num_workers: int) -> torch.Tensor:
        loader = shuffled(numbered(augment=CropAndFlip(20, 1)), batch_size, 0, num_workers=num_workers)
        loader.sampler.set_epoch(2)
        return torch.cat([images for images, _ in loader])

    assert torch.equal(images(6, 0), images(20, 0))
    assert torch.equal(images(6, 0), images(6, 2))


def test_evaluation_keeps_the_order_and_does_not_augment():
    dataset = numbered(augment=CropAndFlip(20, 0))
    batches = list(in_order(dataset, 6))
    assert [len(target) for _, target in batches] == [6, 6, 6, 2]
    assert torch.cat([target for _, target in batches]).tolist() == list(range(20))
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), (dataset.images / 255 - mean) / std)


def test_mixed_seeds_are_reproducible_and_depend_on_every_number():
    assert mixed(1, 2) == mixed(1, 2)
    assert len({mixed(1, 2), mixed(2, 1), mixed(1, 3), mixed(1)}) == 4


SCRIPT = """
import sys, torch
from tests.data.test_loaders import Recorder, augmented
from tests.tiny import trainer

module = Recorder(augmented)
trainer(max_epochs=2, strategy="ddp", devices=2, num_sanity_val_steps=0).fit(module)
torch.save((module.seen, module.validated), f"{sys.argv[1]}/{module.global_rank}.pt")
"""


@pytest.mark.integration
def test_two_processes_share_the_samples_of_each_epoch(tmp_path: Path):
    script, root = tmp_path / "train.py", Path(__file__).parents[2]
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (one, validated), (other, validated_too) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for number in range(2):
        assert set(one[number]).isdisjoint(other[number])
        together = [sample for pair in zip(one[number], other[number], strict=True) for sample in pair]
        assert together == epoch(shuffled(numbered(), 6, 3), number)
    assert sorted(validated[:4] + validated_too[:4]) == [0, *range(7)]  # as documented: one is seen twice
