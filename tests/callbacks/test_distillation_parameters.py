"""Projectors in an optimizer that is made from the network's parameters alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from kd_lightning import Distillation
from kd_lightning.losses import KD, Hint
from tests.tiny import Network, assert_equal, good_teacher, loader, trainer, weights


class Ours(LightningModule):
    """Two groups of the network's parameters, and a scheduler that sets each group's rate and momentum."""

    optimizer: Any = torch.optim.AdamW
    everything = False

    def __init__(self) -> None:
        super().__init__()
        self.net = Network()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        head = list(self.net.head.parameters())
        rest = [p for p in (self if self.everything else self.net).parameters() if all(p is not q for q in head)]
        optimizer = self.optimizer([{"params": rest, "weight_decay": 0.3}, {"params": head}], lr=0.01)
        if self.optimizer is not torch.optim.AdamW:
            return optimizer
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.05, 0.01], total_steps=16)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class FromSelf(Ours):
    everything = True


class OneGroup(Ours):
    def configure_optimizers(self):
        return torch.optim.AdamW((self if self.everything else self.net).parameters(), lr=0.01, weight_decay=0.3)


class OneGroupFromSelf(OneGroup):
    everything = True


def fit(kind: type[Ours], ckpt_path: Any = None, callbacks: Any = (), epochs: int = 4, **options: Any) -> Any:
    teacher = good_teacher()
    seed_everything(0, verbose=False)
    module = kind()
    callback = Distillation(teacher, {"kd": KD(), "hint": Hint("act", "act")}, student="net", **options)
    it = trainer(callbacks=[callback, *callbacks], max_epochs=epochs, enable_checkpointing=bool(callbacks))
    it.fit(module, loader(shuffle=True), ckpt_path=ckpt_path)
    state: dict[str, Tensor] = {**weights(module), **weights(callback.objective)}
    return state, it


def test_they_are_trained_as_from_self_parameters() -> None:
    found, it = fit(Ours, add_parameters=True)
    expected, other = fit(FromSelf)
    assert_equal(found, expected)
    groups, others = it.optimizers[0].param_groups, other.optimizers[0].param_groups
    assert [{**g, "params": len(g["params"])} for g in groups] == [{**g, "params": len(g["params"])} for g in others]


def test_a_single_group_gets_them_without_being_told() -> None:
    found, it = fit(OneGroup)
    expected, other = fit(OneGroupFromSelf)
    assert_equal(found, expected)
    assert [len(o.param_groups[0]["params"]) for o in (it.optimizers[0], other.optimizers[0])] == [8, 8]


def test_a_resumed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    expected, _ = fit(Ours, add_parameters=True)
    save = ModelCheckpoint(tmp_path, save_last=True)
    seed_everything(0, verbose=False)
    fit(Ours, callbacks=[save], epochs=2, add_parameters=True)
    found, it = fit(Ours, ckpt_path=tmp_path / "last.ckpt", add_parameters=True)
    assert_equal(found, expected)
    assert len(it.optimizers[0].state) == len(list(Network().parameters())) + 2  # the projector's weight and bias


def test_the_option_is_named_and_an_optimizer_that_cannot_take_them_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leaves out \d parameters of the losses .*has 2 groups.*add_parameters=True"):
        fit(Ours)
    with pytest.raises(
        ValueError, match=r"cannot be added to Adagrad as it has made its state already.*from self.para"
    ):
        fit(type("WithState", (Ours,), {"optimizer": torch.optim.Adagrad}), add_parameters=True)
    fit(FromSelf, add_parameters=True)  # nothing is missing
