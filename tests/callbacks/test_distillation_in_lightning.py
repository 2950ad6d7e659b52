"""The callback beside what else Lightning brings: its command line, its tuner, other callbacks, and sharded weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, EarlyStopping, LearningRateFinder
from lightning.pytorch.strategies import FSDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Distillation
from kd_lightning.attachment import check_strategy
from kd_lightning.callbacks import TemperatureSchedule
from kd_lightning.losses import KD, Hint
from kd_lightning.objective import DistillationObjective
from kd_lightning.schedules import linear
from tests.tiny import Network, assert_equal, good_teacher, loader, samples, trainer, weights


class Theirs(LightningModule):
    def __init__(self, width: int = 8, lr: float = 0.1, batch_size: int = 4) -> None:
        super().__init__()
        self.net, self.lr, self.batch_size = Network(width), lr, batch_size

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def train_dataloader(self):
        return DataLoader(TensorDataset(*samples(64)), batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(seed=5)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=self.lr)


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(seed=5)


def distillation(**options: Any) -> Distillation:
    losses = {"kd": KD(temperature=4.0), "hint": Hint("act", "act")}
    return Distillation(good_teacher(), losses, student="net", **options)


CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  log_every_n_steps: 1
  callbacks:
    - class_path: kd_lightning.Distillation
      init_args:
        teacher: {class_path: tests.tiny.Network, init_args: {width: 16}}
        losses:
          kd: {class_path: kd_lightning.losses.KD, init_args: {temperature: 4.0}}
          hint: {class_path: kd_lightning.losses.Hint, init_args: {student_layer: act, teacher_layer: act}}
        student: net
        logits: head
        target: 1
        task_weight: 0.5
        check_teacher: false
        calls: first
        task: {class_path: kd_lightning.tasks.Classification, init_args: {class_dim: 1}}
    - class_path: kd_lightning.callbacks.TemperatureSchedule
      init_args:
        schedule: {class_path: kd_lightning.schedules.linear, init_args: {start: 4.0, end: 1.0}}
    - class_path: kd_lightning.callbacks.QuantizationAwareTraining
      init_args:
        spec: {weight_bits: 4, skip: [first]}
        start: 0.5
model:
  width: 8
"""


def test_the_command_line_makes_the_callbacks_of_a_file_and_trains(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "config.yaml").write_text(CONFIG)
    arguments = ["fit", "--config", str(tmp_path / "config.yaml")]
    it = LightningCLI(Theirs, Data, args=arguments, save_config_callback=None).trainer
    logged = {name: float(value) for name, value in it.callback_metrics.items()}
    assert logged["kd/temperature"] == 1.75  # of the last of four steps
    assert logged["quantization/fake_quantize"] == 1
    weighted = [value for name, value in logged.items() if name.startswith("train/loss_weighted/")]
    assert logged["train/loss"] == pytest.approx(sum(weighted), rel=1e-5)
    assert logged["train/loss_weighted/task"] == pytest.approx(logged["train/loss/task"] / 2)
    assert {"train/loss/kd", "train/loss/hint", "val/agreement", "val_loss"} <= set(logged)


def test_a_tuner_tries_steps_of_the_whole_loss_and_leaves_no_trace() -> None:
    """They run a fit within the fit, from a checkpoint to which they return."""

    class Notes(Callback):
        def on_train_start(self, trainer, pl_module):
            self.found = pl_module.lr, pl_module.batch_size
            self.weights = weights(pl_module)

    seen, module, callback = Notes(), Theirs(), distillation()
    before = weights(module)
    rates = LearningRateFinder(min_lr=1e-3, max_lr=0.5, num_training_steps=14)
    sizes = BatchSizeFinder(mode="power", steps_per_trial=1, init_val=8, max_trials=2)
    trainer(callbacks=[callback, rates, sizes, seen], max_epochs=1, log_every_n_steps=1).fit(module)
    assert rates.optimal_lr is not None
    assert len(rates.optimal_lr.results["loss"]) == 14
    assert seen.found[0] == rates.optimal_lr.suggestion() != 0.1
    assert seen.found[1] == 16
    assert_equal({n: x for n, x in seen.weights.items() if n.startswith("net.")}, before)
    assert not hasattr(module, "distillation")


def test_training_stops_early_by_the_agreement() -> None:
    stop = EarlyStopping("val/agreement", mode="max", patience=0, min_delta=1.0)
    it = trainer(callbacks=[distillation(), stop], max_epochs=9, log_every_n_steps=1)
    it.fit(Theirs())
    assert it.current_epoch == 2
    assert stop.best_score == it.callback_metrics["val/agreement"] or stop.wait_count == 1


def test_validate_test_and_predict_before_and_after() -> None:
    seed_everything(0, verbose=False)
    module, plain = Theirs(), Theirs()
    plain.load_state_dict(module.state_dict())
    it = trainer(callbacks=[distillation(), TemperatureSchedule(linear(4.0, 1.0))], log_every_n_steps=1)
    data = loader(seed=5)
    before = it.validate(module, data, verbose=False)[0]
    alone = trainer().validate(plain, data, verbose=False)[0]
    assert before["val_loss"] == alone["val_loss"]
    assert {"val/agreement", "val/teacher_acc"} <= set(before)
    torch.testing.assert_close(it.predict(module, data), trainer().predict(plain, data))
    assert_equal(weights(module), weights(plain))

    it.fit(module, loader(seed=1), data)
    after = it.validate(module, data, verbose=False)[0]
    assert after["val/agreement"] == pytest.approx(float(it.callback_metrics["val/agreement"]))
    tested = it.test(module, data, verbose=False)[0]
    assert tested["test/agreement"] == after["val/agreement"]
    plain.load_state_dict(module.state_dict())  # strictly
    torch.testing.assert_close(it.predict(module, data), trainer().predict(plain, data))


def test_a_student_that_is_split_over_processes_has_no_projectors() -> None:
    """Lightning takes FSDP on GPUs alone, so that the strategy is asked for by itself here."""
    without = DistillationObjective({"kd": KD()})
    check_strategy(FSDPStrategy(), without)
    module, callback = Theirs(), distillation()
    trainer(callbacks=[callback], log_every_n_steps=1).fit(module)
    check_strategy(trainer().strategy, callback.objective)
    message = r"FSDPStrategy .*\['hint'\] have parameters of their own.*ddp.*losses that have none"
    with pytest.raises(ValueError, match=message):
        check_strategy(FSDPStrategy(), callback.objective)
