"""The same training through each of the two front doors."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from kd_lightning import Distillation, DistillationModule
from tests.tiny import good_teacher, network, sgd, trainer

Fit = Callable[..., Trainer]


class Existing(LightningModule):
    """Somebody's module, with a student ``net``."""

    def __init__(self, net: nn.Module, optimizer: Any) -> None:
        super().__init__()
        self.net, self.make_optimizer = net, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]).float(), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


def through_module(
    data: Any, losses: Any, student: Any = None, teacher: Any = None, optimizer: Any = sgd, **options: Any
) -> Trainer:
    student, teacher = network() if student is None else student, good_teacher() if teacher is None else teacher
    fit = trainer(**options)
    fit.fit(DistillationModule(student, teacher, losses, optimizer, check_teacher=False), data)
    return fit


def through_callback(
    data: Any, losses: Any, student: Any = None, teacher: Any = None, optimizer: Any = sgd, **options: Any
) -> Trainer:
    student, teacher = network() if student is None else student, good_teacher() if teacher is None else teacher
    callback = Distillation(teacher, losses, student="net", check_teacher=False)
    fit = trainer(callbacks=[callback, *options.pop("callbacks", [])], **options)
    fit.fit(Existing(student, optimizer), data)
    return fit


DOORS = [through_module, through_callback]
