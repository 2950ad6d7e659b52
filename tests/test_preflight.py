"""What can be known to be wrong is said before the first step, and finding it out leaves no trace."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from kd_lightning import DistillationModule, Outputs, Teacher
from kd_lightning.losses import KD, DistillationLoss, HardLabel, Hint
from tests.tiny import (
    CLASSES,
    assert_equal,
    distillation,
    good_teacher,
    loader,
    network,
    samples,
    sgd,
    trainer,
    weights,
)


def refused(module: DistillationModule, data: object, message: str, error: type[Exception] = ValueError) -> None:
    """Fit raises the message, no step was taken and no weight has moved."""
    before, fit = weights(module.student), trainer()
    with pytest.raises(error, match=message):
        fit.fit(module, data)
    assert fit.global_step == 0
    assert_equal(weights(module.student), before)


def labelled(labels: Tensor, batch_size: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(samples(len(labels))[0], labels), batch_size=batch_size)


# Layers


def test_an_unknown_layer_of_the_student_names_the_nearest_with_their_shapes() -> None:
    refused(
        distillation(losses={"hint": Hint("steam", "stem")}),
        loader(),
        r"the student Network has no layer 'steam', expected a name of named_modules\(\); nearest, with their outputs "
        r"for 2 samples: stem \(2, 8\), .*norm \(2, 8\)",
    )


def test_an_unknown_layer_of_the_teacher_names_the_nearest_with_their_shapes() -> None:
    refused(
        distillation(losses={"hint": Hint("stem", "blocks.3")}),
        loader(),
        r"the teacher Network has no layer 'blocks\.3'.*stem \(2, 16\)",
    )


@pytest.mark.parametrize("layer", ["act", "pair", "unused"])
def test_a_layer_that_cannot_be_tapped_is_refused_with_its_role(layer: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.act, self.pair, self.unused = network(), nn.ReLU(), nn.LSTM(4, 4), nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(self.act(self.act(self.stem(x))))[0]

    told = {"act": "ran several times", "pair": "returns tuple", "unused": "did not run"}[layer]
    refused(distillation(Odd(), losses={"hint": Hint(layer, "stem")}), loader(), rf"student: layer '{layer}' {told}")


def test_layers_of_different_kinds_are_refused() -> None:
    teacher = nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 4, 1), nn.Flatten())
    refused(
        distillation(teacher=teacher, losses={"hint": Hint("stem", "1")}, check_teacher=False),
        loader(),
        r"loss 'hint' \(student 'stem'; teacher '1'\): .* gives \(2, 8\) and the teacher's \(2, 4, 1, 1\)",
    )


# Classes and labels


def test_other_numbers_of_classes_are_refused() -> None:
    refused(
        distillation(network(classes=7)),
        loader(),
        "the student has 7 classes and the teacher 4, expected the same classes in the same order",
    )


@pytest.mark.parametrize("data", [labelled(torch.full((24,), -100)), DataLoader(samples(24)[0], batch_size=8)])
def test_no_label_for_a_loss_that_needs_one_is_refused(data: DataLoader) -> None:
    refused(
        distillation(),
        data,
        r"losses \['hard_label'\] need labels, got none in the first 100 training batches.*leave these",
    )


def test_no_label_is_no_matter_where_no_loss_counts_it() -> None:
    losses = {"hard_label": HardLabel(weight=0.0), "kd": KD()}
    fit = trainer()
    fit.fit(distillation(losses=losses), labelled(torch.full((24,), -100)))
    assert fit.global_step == 3


def test_a_few_labels_somewhere_are_enough() -> None:
    labels = torch.full((48,), -100)
    labels[40] = 2
    fit = trainer()
    fit.fit(distillation(), labelled(labels))
    assert fit.global_step == 6


@pytest.mark.parametrize("position", [0, 5, 23])
@pytest.mark.parametrize("label", [CLASSES, -1, 255])
@pytest.mark.parametrize("alone", [False, True])
def test_a_label_out_of_range_is_refused_wherever_it_is_in_the_first_batch(
    position: int, label: int, alone: bool
) -> None:
    labels = samples(24)[1].clone()
    labels[position] = label
    options = {"teacher": None, "losses": {"hard_label": HardLabel()}} if alone else {}
    refused(distillation(**options), labelled(labels, batch_size=24), f"label {label} is out of range, expected 0 to 3")


def test_probabilities_over_other_classes_are_refused() -> None:
    refused(distillation(), labelled(torch.full((8, 5), 0.2)), "probabilities over 5 classes, expected 4")


# The teacher


@pytest.mark.parametrize("seed", [3, 4])
def test_a_teacher_at_chance_is_refused(seed: int) -> None:
    refused(
        distillation(teacher=network(seed, width=16)),
        loader(200),
        r"the teacher is at chance on this loader: accuracy \d\d\.\d % on 200 images, expected well above 25\.0 %.*"
        "check_teacher=False",
    )


def test_wrong_normalisation_and_permuted_classes_are_found() -> None:
    x, y = samples(200)
    for data in (TensorDataset(torch.zeros_like(x), y), TensorDataset(x, (y + 1) % CLASSES)):
        refused(distillation(), DataLoader(data, batch_size=32), "the teacher is at chance on this loader")


def test_it_may_be_at_chance_where_that_is_wanted() -> None:
    fit = trainer()
    fit.fit(distillation(teacher=network(3, width=16), check_teacher=False), loader(200))
    assert fit.global_step == 25


def test_a_good_teachers_accuracy_is_told(caplog) -> None:
    with caplog.at_level("INFO"):
        trainer(max_steps=1).fit(distillation(), loader(400))
    x, y = samples(256)
    accuracy = (good_teacher().eval()(x).argmax(-1) == y).float().mean()
    assert f"teacher: accuracy {100 * accuracy:.1f} % on 256 training images (chance is 25.0 %)" in caplog.text


# Data


def test_a_batch_of_another_shape_is_refused() -> None:
    wide = DataLoader(TensorDataset(torch.zeros(8, 9), samples(8)[1]), batch_size=4)
    refused(
        distillation(), wide, r"the student Network cannot take a batch of shape \(2, 9\): .*check channels, image size"
    )
    student = nn.Sequential(nn.Linear(9, FEATURES := 6), network())
    assert FEATURES == 6
    refused(distillation(student), wide, r"the teacher Network cannot take a batch of shape \(2, 9\)")


def test_missing_arguments_are_refused() -> None:
    refused(
        distillation(), DataLoader([{"pixels": samples(8)[0], "labels": samples(8)[1]}], batch_size=None), "cannot take"
    )


@pytest.mark.parametrize(
    "data", [DataLoader(TensorDataset(*samples(5)), batch_size=8, drop_last=True), DataLoader([], batch_size=8), []]
)
def test_an_empty_loader_is_refused(data: object) -> None:
    refused(distillation(), data, "the training loader is empty, expected at least one batch: .*drop_last=True")


class Pairs(DistillationLoss):
    min_batch_size = 3

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        assert len(student.logits) >= self.min_batch_size
        return torch.cdist(student.logits, student.logits).mean()


def test_a_batch_that_is_too_small_for_a_loss_is_refused() -> None:
    losses = {"kd": KD(), "pairs": Pairs()}
    refused(
        distillation(losses=losses),
        loader(batch_size=2),
        "loss 'pairs' compares samples and needs a batch of at least 3, got 2",
    )
    trainer().fit(distillation(losses={"kd": KD(), "pairs": Pairs()}), loader(batch_size=3, drop_last=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    x, y = samples(24)
    x[6, 1] = value
    refused(
        distillation(),
        DataLoader(TensorDataset(x, y), batch_size=8),
        r"the training inputs hold 1 NaN or infinite values in a batch of shape \(8, 6\)",
    )


def test_weights_that_are_not_finite_are_refused() -> None:
    teacher = good_teacher()
    teacher.head.bias.data[0] = float("nan")
    refused(distillation(teacher=teacher, check_teacher=False), loader(), "the losses give nan before the first step")


def test_a_batch_that_nobody_can_read_is_refused() -> None:
    data = DataLoader(TensorDataset(*samples(8), samples(8)[1]))
    refused(distillation(), data, r"expected a batch \(input, target\)", TypeError)


# No trace


class NoPreflight(DistillationModule):
    def setup(self, stage: str) -> None:
        """Without the dry run."""

    def configure_model(self) -> None:
        pass


class Noisy(Dataset):
    """Augments with every global random number generator."""

    def __len__(self) -> int:
        return 44

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = (part[index] for part in samples(44))
        return x + 0.1 * torch.randn(6) + float(np.random.rand()) + random.random(), y


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from (Noisy()[i] for i in range(44))


def plain() -> DataLoader:
    return DataLoader(Noisy(), batch_size=8, shuffle=True)


def with_generator() -> DataLoader:
    return DataLoader(Noisy(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(5))


def with_sampler() -> DataLoader:
    sampler = RandomSampler(Noisy(), replacement=True, generator=torch.Generator().manual_seed(5))
    return DataLoader(Noisy(), batch_size=8, sampler=sampler)


def stream() -> DataLoader:
    return DataLoader(Stream(), batch_size=8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("data", [plain, with_generator, with_sampler, stream])
def test_training_is_the_same_with_and_without_it(data) -> None:
    results = []
    for kind, check in ((DistillationModule, True), (NoPreflight, False)):
        loader = data()
        seed_everything(7)
        module = kind(
            network(dropout=0.5), good_teacher(), {"hard_label": HardLabel(), "kd": KD()}, sgd, check_teacher=check
        )
        trainer(max_epochs=2).fit(module, loader)
        generators = [
            g.get_state() for g in (loader.generator, getattr(loader.sampler, "generator", None)) if g is not None
        ]
        results.append((weights(module.student), torch.get_rng_state(), random.random(), np.random.rand(), generators))
    (one, *rest), (other, *others) = results
    assert_equal(one, other)
    assert torch.equal(rest[0], others[0])
    assert rest[1:3] == others[1:3]
    assert all(torch.equal(a, b) for a, b in zip(rest[3], others[3], strict=True))


def test_a_data_module_that_draws_while_it_makes_its_loader_is_not_disturbed() -> None:
    class Split(LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            order = torch.randperm(44)
            return DataLoader(TensorDataset(*(part[order] for part in samples(44))), batch_size=8)

    results = []
    for kind in (DistillationModule, NoPreflight):
        seed_everything(7)
        module = kind(network(), good_teacher(), {"kd": KD()}, sgd, check_teacher=False)
        trainer().fit(module, datamodule=Split())
        results.append(weights(module.student))
    assert_equal(*results)


def test_networks_are_left_as_they_were() -> None:
    student, teacher = network(dropout=0.5), good_teacher(dropout=0.5)
    student.norm.eval()  # as somebody fine-tunes with frozen statistics
    before, states = (weights(student), weights(teacher)), []

    class First(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            states.extend([weights(student), weights(teacher)])
            modes = {name: part.training for name, part in student.named_modules()}
            assert modes == {"": True, "stem": True, "norm": False, "act": True, "drop": True, "head": True}
            assert not any(len(part._forward_hooks) for net in (student, teacher) for part in net.modules())
            assert all(p.grad is None for net in (student, teacher) for p in net.parameters())

    losses = {"kd": KD(), "hint": Hint("stem")}
    trainer(callbacks=[First()]).fit(distillation(student, teacher=teacher, losses=losses), loader(128))
    assert_equal(states[0], before[0])
    assert_equal(states[1], before[1])


def test_batches_are_read_as_training_reads_them() -> None:
    """A hook that moves channels or normalises on the device is part of what the networks see."""

    class Hooked(DistillationModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0][:, :6], batch[1]

    x, y = samples(16)
    wide = DataLoader(TensorDataset(torch.cat([x, x], 1), y), batch_size=8)
    fit = trainer()
    fit.fit(Hooked(network(), Teacher(good_teacher()), {"kd": KD()}, sgd), wide)
    assert fit.global_step == 2


def test_a_second_fit_trains_the_projectors_on() -> None:
    module, fit = distillation(losses={"kd": KD(), "hint": Hint("stem")}), trainer()
    fit.fit(module, loader())
    projector = module.losses.hint.projector
    trainer().fit(module, loader())
    assert module.losses.hint.projector is projector
