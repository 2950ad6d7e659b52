"""Targets that somebody's loader gives in its own way."""

import pickle
import re
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning import Distillation
from kd_lightning.losses import KD, HardLabel
from kd_lightning.tasks import Classification
from tests.tiny import CLASSES, Network, assert_equal, good_teacher, samples, trainer, weights

Point = namedtuple("Point", ["x", "y", "kind"])


class Reading(LightningModule):
    """Somebody's module, which reads its batches itself."""

    def __init__(self, read: Any, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.read = net if net is not None else Network(), read

    def training_step(self, batch, batch_idx):
        x, y = self.read(batch)
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.net(self.read(batch)[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(made: Any) -> DataLoader:
    return DataLoader([made(x, y) for x, y in zip(*samples(32), strict=True)], batch_size=8)


def fit(made: Any, read: Any, losses: Any = None, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    seed_everything(0, verbose=False)
    module = Reading(read)
    losses = losses or {"kd": KD(), "hard_label": HardLabel()}
    callback = Distillation(good_teacher(), losses, student="net", **options)
    it = trainer(callbacks=[pickle.loads(pickle.dumps(callback)) if options.pop("pickled", False) else callback])
    it.fit(module, data(made), data(made))
    return weights(module), it.callback_metrics


NAMED = {
    "key": (lambda x, y: {"image": x, "mask": y}, lambda b: (b["image"], b["mask"]), "mask"),
    "index": (lambda x, y: (x, 0.0, y), lambda b: (b[0], b[2]), 2),
    "index from the end": (lambda x, y: (x, 0.0, y), lambda b: (b[0], b[2]), -1),
    "attribute": (lambda x, y: Point(x, 1.0, y), lambda b: (b.x, b.kind), "kind"),
    "function": (lambda x, y: (x, (0.0, y)), lambda b: (b[0], b[1][1]), lambda b: b[1][1]),
    "one column": (lambda x, y: (x, y[None]), lambda b: (b[0], b[1][:, 0]), lambda b: b[1].squeeze(1)),
}


@pytest.mark.parametrize(("made", "read", "target"), NAMED.values(), ids=NAMED)
def test_a_target_is_named_by_key_index_attribute_or_function(made: Any, read: Any, target: Any) -> None:
    plain, logged = fit(lambda x, y: (x, y), lambda b: b)
    found, other = fit(made, read, target=target)
    assert_equal(found, plain)
    assert other["val/teacher_acc"] == logged["val/teacher_acc"] > 0.6


def test_the_teachers_inputs_are_named_likewise_and_such_a_callback_can_be_pickled() -> None:
    plain, _ = fit(lambda x, y: (x, y), lambda b: b)
    made, read = (lambda x, y: {"image": x, "mask": y}), (lambda b: (b["image"], b["mask"]))
    callback = Distillation(
        good_teacher(), {"kd": KD(), "hard_label": HardLabel()}, "net", teacher_inputs="image", target="mask"
    )
    seed_everything(0, verbose=False)
    module = Reading(read)
    trainer(callbacks=[pickle.loads(pickle.dumps(callback))]).fit(module, data(made), data(made))
    assert_equal(weights(module), plain)


MISSED = {
    "classes": (
        lambda x, y: {"image": x, "weight": 1.0, "classes": y},
        lambda b: (b["image"], b["classes"]),
        r"need labels, got none .* such as Distillation(..., target='classes'), by a key, .* a dict with 'image'",
    ),
    "two that may be it": (
        lambda x, y: {"image": x, "y": y, "targets": y},
        lambda b: (b["image"], b["y"]),
        r"need labels, got none .* such as Distillation(..., target='y'), by a key, .* a dict with 'image' (8, 6)",
    ),
    "three parts": (
        lambda x, y: (x, y, 0.0),
        lambda b: b[:2],
        r"got a list of 3: .*target=1).* a list with 0 (8, 6), 1",
    ),
    "pair": (
        lambda x, y: (x, (y, y)),
        lambda b: (b[0], b[1][0]),
        r"the target is a list of Tensor, expected a tensor of .*target=lambda batch: batch[1][0]).* a list with 0",
    ),
    "two columns": (
        lambda x, y: (x, y.expand(2)),
        lambda b: (b[0], b[1][:, 0]),
        r"the target is int64 of shape (8, 2), expected class indices (N,) .*pass one class index for each.*target=",
    ),
    "twice as many": (
        lambda x, y: (x, y),
        lambda b: (b[0][:4], b[1][:4]),
        r"the targets (8,) and the student's inputs (4 samples) differ in the number of samples.*target=",
    ),
}


@pytest.mark.parametrize(("made", "read", "message"), MISSED.values(), ids=MISSED)
def test_a_target_that_is_not_found_or_does_not_fit_is_explained(made: Any, read: Any, message: str) -> None:
    pattern = re.sub(r"[()[\]]", lambda m: "\\" + m[0], message)
    with pytest.raises((ValueError, TypeError), match=pattern):
        fit(made, read)
    fit(made, read, {"kd": KD()})  # which reads none


def test_a_selector_that_finds_nothing_is_explained() -> None:
    made, read = (lambda x, y: {"image": x, "mask": y}), (lambda b: (b["image"], b["mask"]))
    with pytest.raises(ValueError, match=r"target='msk' is no part of a dict with 'image' \(8, 6\), 'mask' \(8,\)"):
        fit(made, read, target="msk")
    with pytest.raises(ValueError, match=r"target=2 is no part of a dict with 'image'"):
        fit(made, read, target=2)
    with pytest.raises(ValueError, match=r"target= failed with KeyError: 'labels'; .* a dict with 'image'"):
        fit(made, read, target=lambda batch: batch["labels"])
    with pytest.raises(ValueError, match=r"teacher_inputs='pixels' is no part of a dict with 'image'"):
        fit(made, read, target="mask", teacher_inputs="pixels")
    with pytest.raises(TypeError, match=r"expected target= to be a key, .* got a list"):
        fit(made, read, target=["mask"])


class Quarter(nn.Module):
    """Logits of a quarter of the image's size, as Segformer gives them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, width, 4, stride=4)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


class Segmenting(Reading):
    def __init__(self) -> None:
        super().__init__(None, Quarter(4))

    def training_step(self, batch, batch_idx):
        logits = F.interpolate(self.net(batch["pixels"]), scale_factor=4.0)
        return F.cross_entropy(logits, batch["labels"])

    def validation_step(self, batch, batch_idx):
        self.net(batch["pixels"])


def images() -> DataLoader:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randn(16, 3, 16, 16, generator=random)
    labels = pixels[:, :1].mul(2).round().clamp(0, CLASSES - 1).long()[:, 0]
    return DataLoader([{"pixels": x, "labels": y} for x, y in zip(pixels, labels, strict=True)], batch_size=8)


def test_logits_of_a_quarter_of_the_labels_size() -> None:
    losses = {"kd": KD(), "hard_label": HardLabel()}

    def distill(named: dict[str, Any], **options: Any) -> Any:
        callback = Distillation(Quarter(8), named, student="net", **options)
        it = trainer(callbacks=[callback], log_every_n_steps=1)
        it.fit(Segmenting(), images(), images())
        return it.callback_metrics

    message = r"the target is int64 of shape \(8, 16, 16\), expected class indices \(N, 4, 4\) .*::4, ::4.*target="
    with pytest.raises(ValueError, match=message):
        distill(losses)
    logged = distill({"kd": KD()})  # reads no labels, of whatever size
    assert "val/agreement" in logged
    assert "val/teacher_acc" not in logged
    assert "val/teacher_acc" in distill(losses, target=lambda b: b["labels"][:, ::4, ::4], check_teacher=False)


def test_labels_of_another_number_than_the_outputs_in_a_later_step_are_explained() -> None:
    class Halving(Reading):
        def training_step(self, batch, batch_idx):
            return super().training_step([x[: 4 if batch_idx == 2 else 8] for x in batch], batch_idx)

    callback = Distillation(good_teacher(), {"hard_label": HardLabel()}, student="net", check_teacher=False)
    message = r"the targets \(8,\) and the student's logits \(4, 4\) differ in the number.* target="
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[callback]).fit(Halving(lambda b: b), data(lambda x, y: (x, y)))


class Speech(Reading):
    """Frames (B, T, F) to logits of symbols (B, T, C), learnt by the CTC loss from texts (B, S) of another length."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(None, nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, CLASSES)))

    def training_step(self, batch, batch_idx):
        frames, texts, long, lengths = batch
        return F.ctc_loss(self.net(frames).log_softmax(-1).transpose(0, 1), texts, long, lengths)

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])


def test_texts_of_another_length_than_the_logits() -> None:
    random = torch.Generator().manual_seed(0)
    frames, texts = torch.randn(16, 12, 3, generator=random), torch.randint(1, CLASSES, (16, 5), generator=random)
    rows = list(zip(frames, texts, torch.full((16,), 12), torch.full((16,), 5), strict=True))

    def distill(losses: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
        seed_everything(0, verbose=False)
        callback = Distillation(Speech(8).net, losses, student="net", task=Classification(class_dim=2), **options)
        it = trainer(callbacks=[callback], log_every_n_steps=1)
        it.fit(Speech(), DataLoader(rows, batch_size=8), DataLoader(rows, batch_size=8))
        return dict(it.callback_metrics)

    for options in ({}, {"target": 1}):  # what reads no labels takes whatever they are
        logged = distill({"kd": KD(temperature=2.0)}, **options)
        assert logged["train/loss/kd"] > 0
        assert "val/agreement" in logged
        assert "val/teacher_acc" not in logged
    message = r"the target is int64 of shape \(8, 5\), expected class indices \(N, 12\) for logits \(N, 12, 4\)"
    with pytest.raises(ValueError, match=message):
        distill({"hard_label": HardLabel()}, target=1)
    with pytest.raises(TypeError, match=r"got a list of 4: .*target=1\), by a key"):
        distill({"hard_label": HardLabel()})
