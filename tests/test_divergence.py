"""A training that has diverged ends in an error that says where, before anything that it gave is used."""

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Outputs
from kd_lightning.divergence import Divergence
from kd_lightning.losses import KD, DistillationLoss, HardLabel
from kd_lightning.tasks import Taught
from kd_lightning.teachers import FromBatch, Peers
from tests.doors import DOORS, Fit
from tests.tiny import CLASSES, loader, network, samples, trainer


class Mine(DistillationLoss):
    """Zero for two steps; then of a value, or with a gradient, that is not finite."""

    needs_teacher = False
    steps = 0

    def __init__(self, gradient_only: bool = False) -> None:
        super().__init__()
        self.gradient_only = gradient_only

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        zero = 0.0 * student.logits.sum()
        self.steps += self.training
        if self.steps <= 2:
            return zero
        return zero.sqrt() if self.gradient_only else zero / zero


def with_nan_at(position: int) -> DataLoader:
    x, y = samples(32)
    x[position, 2] = torch.nan
    return DataLoader(TensorDataset(x, y), batch_size=8)


@pytest.mark.parametrize("fit", DOORS)
def test_a_learning_rate_that_is_far_too_high(fit: Fit) -> None:
    def optimizer(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e30)

    found = r"diverged at step [23]: the student's (weights '[\w.]+'.*|logits) hold NaN or infinite values.*: lower the"
    with pytest.raises(FloatingPointError, match=found):
        fit(loader(80), {"kd": KD()}, optimizer=optimizer)


@pytest.mark.parametrize("fit", DOORS)
@pytest.mark.parametrize("position", [8, 31])
def test_nan_in_a_later_batch(fit: Fit, position: int) -> None:
    step = position // 8 + 1
    found = (
        rf"diverged at step {step}: the inputs hold NaN or infinite values \(and the losses 'kd'.*\), .*broken sample"
    )
    student = network()
    with pytest.raises(FloatingPointError, match=found):
        fit(with_nan_at(position), {"kd": KD()}, student=student)
    assert all(x.isfinite().all() for x in student.parameters())


@pytest.mark.parametrize("fit", DOORS)
def test_nan_from_a_teacher_whose_outputs_come_with_the_batch(fit: Fit) -> None:
    x, y = samples(32)
    logits = torch.randn(32, CLASSES)
    logits[20, 1] = torch.nan
    parts = [part.split(8) for part in (x, y, logits)]
    batches = [Taught((a, b), {"logits": c}) for a, b, c in zip(*parts, strict=True)]
    with pytest.raises(FloatingPointError, match=r"at step 3: the teacher's logits hold NaN .*stored or given outputs"):
        fit(DataLoader(batches, batch_size=None), {"kd": KD()}, teacher=FromBatch())


@pytest.mark.parametrize("fit", DOORS)
def test_a_loss_of_ones_own_is_named(fit: Fit) -> None:
    with pytest.raises(FloatingPointError, match="at step 3: the loss 'mine' is NaN or infinite"):
        fit(loader(), {"kd": KD(), "mine": Mine()})


@pytest.mark.parametrize("fit", DOORS)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_weights_that_the_last_step_spoiled_are_neither_saved_nor_taken_for_a_result(
    fit: Fit, checkpoint: bool, tmp_path
) -> None:
    options = {"enable_checkpointing": checkpoint, "default_root_dir": tmp_path, "max_steps": 3}
    with pytest.raises(FloatingPointError, match=r"diverged: the student's weights '[\w.]+' and \d+ others hold NaN"):
        fit(loader(), {"kd": KD(), "mine": Mine(gradient_only=True)}, **options)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("fit", DOORS)
def test_a_step_that_the_gradient_scaler_leaves_out_is_none(fit: Fit) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=1000)
    fit(loader(24), {"kd": KD()}, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() < 2.0**60  # it has left out some


@pytest.mark.parametrize("fit", DOORS)
def test_networks_that_teach_each_other(fit: Fit) -> None:
    losses = {"hard_label": HardLabel(), "kd": KD()}
    with pytest.raises(FloatingPointError, match=r"diverged at step [23]: the peer 'b''s logits hold"):
        fit(loader(), losses, teacher=Peers({"b": network(1)}), optimizer=lambda p: torch.optim.SGD(p, lr=1e30))


@pytest.mark.parametrize("fit", DOORS)
def test_a_peer_that_has_diverged_in_the_last_step(fit: Fit) -> None:
    peer, losses = network(1), {"hard_label": HardLabel(), "kd": KD()}

    def last(parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        own = {id(p) for p in peer.parameters()}
        groups = [{"params": [p for p in parameters if (id(p) in own) == flag]} for flag in (False, True)]
        return torch.optim.SGD([groups[0], {**groups[1], "lr": torch.inf}], lr=0.01)

    with pytest.raises(FloatingPointError, match=r"has diverged: the peer 'b''s weights 'stem.weight' and \d+ others"):
        fit(loader(8), losses, teacher=Peers({"b": peer}), optimizer=last)


class Elsewhere(Tensor):
    """Says that it lies on a GPU, and counts how often somebody waits for its value."""

    read = 0
    device = torch.device("cuda")

    def item(self) -> float:
        Elsewhere.read += 1
        return super().item()


def test_on_another_device_only_steps_that_are_logged_wait_for_it() -> None:
    fit, watch = trainer(log_every_n_steps=4), Divergence()
    values = [1.0, 2.0, torch.inf, 3.0]
    Elsewhere.read = 0
    steps = fit.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    for step, value in enumerate(values[:3]):
        steps.completed = step
        watch.watch(fit, torch.tensor(value).as_subclass(Elsewhere), list)
    assert Elsewhere.read == 0
    steps.completed = 3
    with pytest.raises(FloatingPointError, match="diverged between steps 1 and 4"):
        watch.watch(fit, torch.tensor(values[3]).as_subclass(Elsewhere), list)
    assert Elsewhere.read == 1
