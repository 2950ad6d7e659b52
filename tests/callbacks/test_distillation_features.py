"""Losses on layers alone, which ask for no logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Distillation
from kd_lightning.losses import KD, RKD, Hint
from kd_lightning.outputs import Outputs
from kd_lightning.teachers import Ensemble
from tests.tiny import FEATURES, good_teacher, network, samples, trainer, weights


class VAE(nn.Module):
    """Returns its reconstruction in [0, 1], and mean and log-variance of the code."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh())
        self.mean, self.log_variance = nn.Linear(width, 2), nn.Linear(width, 2)
        self.decoder = nn.Sequential(nn.Linear(2, FEATURES), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.body(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        return self.decoder(mean), mean, log_variance


class Autoencoding(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        x = batch[0].sigmoid()
        reconstruction, mean, log_variance = self.net(x)
        kl = (mean**2 + log_variance.exp() - 1 - log_variance).sum(-1).mean() / 2
        return F.binary_cross_entropy(reconstruction, x) + 0.1 * kl

    def validation_step(self, batch, batch_idx):
        self.net(batch[0].sigmoid())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(targets: bool = True) -> DataLoader:
    x, y = samples(32)
    return DataLoader(TensorDataset(x, y) if targets else TensorDataset(x), batch_size=8)


def fit(losses: Any, teacher: Any = None, module: Any = None, targets: bool = True, **options: Any) -> Any:
    teacher = VAE(16, seed=1) if teacher is None else teacher
    seed_everything(0, verbose=False)
    module = Autoencoding(VAE(4)) if module is None else module
    callback = Distillation(teacher, losses, student="net", **options)
    it = trainer(callbacks=[callback], log_every_n_steps=1, max_epochs=2)
    it.fit(module, data(targets), data(targets))
    logged = dict(it.callback_metrics)
    it.validate(module, data(targets), verbose=False)  # without a training's preflight
    return module, callback, logged | it.callback_metrics


@pytest.mark.parametrize("targets", [True, False])
def test_a_tuple_of_tensors_is_no_obstacle_to_a_hint(targets: bool) -> None:
    losses = {"hint": Hint("body", "body", weight=3.0), "rkd": RKD("mean", "mean")}
    _, _, logged = fit(losses, targets=targets)
    assert {"train/loss/hint", "train/loss/rkd"} <= set(logged)
    assert not {"val/agreement", "val/teacher_acc", "kd/teacher_entropy"} & set(logged)


def test_the_weights_are_those_of_the_same_loss_by_hand() -> None:
    class ByHand(Autoencoding):
        def training_step(self, batch, batch_idx):
            tapped: dict[str, Tensor] = {}
            hooks = [
                net.body.register_forward_hook(lambda _m, _i, out, name=name: tapped.update({name: out}))
                for name, net in (("student", self.net), ("teacher", teacher))
            ]
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                teacher(batch[0].sigmoid())
            for hook in hooks:
                hook.remove()
            logits = torch.zeros(8, 1)
            return loss + 2.0 * rkd(
                Outputs(logits, {"body": tapped["student"]}), Outputs(logits, {"body": tapped["teacher"]}), None
            )

    rkd, teacher = RKD("body", "body"), VAE(16, seed=1)
    by_hand = ByHand(VAE(4))
    trainer(max_epochs=2).fit(by_hand, data())
    module, _, _ = fit({"rkd": RKD("body", "body", weight=2.0)})
    torch.testing.assert_close(weights(module), weights(by_hand))


def test_a_student_that_never_runs_as_a_whole_needs_no_logits_either() -> None:
    class Parts(Autoencoding):
        def training_step(self, batch, batch_idx):
            return self.net.decoder(self.net.mean(self.net.body(batch[0]))).square().mean()

        def validation_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

    _, _, logged = fit({"hint": Hint("body", "body")}, module=Parts(VAE(4)), teacher_inputs=0)
    assert logged["train/loss/hint"] > 0


def test_classifiers_are_compared_all_the_same_and_other_losses_ask_for_logits() -> None:
    class Classifying(Autoencoding):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.net(batch[0])

    losses = {"hint": Hint("act", "act")}
    _, _, logged = fit(losses, good_teacher(), Classifying(network()))
    assert logged["val/teacher_acc"] > 0.6
    assert "val/agreement" in logged
    _, _, logged = fit({"hint": Hint("act", "body")}, Ensemble([VAE(16, 1), VAE(8, 1)]), Classifying(network()))
    assert "val/agreement" not in logged
    with pytest.raises(ValueError, match=r"got a tuple with 0 \(\d, 6\), 1 \(\d, 2\), .*: name .* logits="):
        fit({"hint": Hint("body", "body"), "kd": KD()})
