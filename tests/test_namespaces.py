"""The callbacks and the logger, in a project that imports ``lightning.pytorch`` and in one with ``pytorch_lightning``.

The projects are one source, made for each of the two: they differ in the imported name alone.
"""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F

from kd_lightning import Distillation, DistillationModule, load_student
from kd_lightning.callbacks import HyperparameterSchedule, QuantizationAwareTraining, TemperatureSchedule
from kd_lightning.losses import KD, HardLabel, Hint
from kd_lightning.schedules import linear
from kd_lightning.tracking import MLFlowLogger
from tests.tiny import Network, assert_equal, good_teacher, loader, network, weights

BOTH = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}


@pytest.fixture(params=BOTH.values(), ids=BOTH)
def pl(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    return request.param


def existing(pl: ModuleType, **options: Any) -> Any:
    """Somebody's module, with parts that are LightningModules themselves, and with hooks that make what it needs."""

    class Part(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Network(**options)

        def forward(self, x):
            return self.net(x)

    class Existing(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

        def setup(self, stage: str) -> None:
            self.smoothing = 0.1

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = F.cross_entropy(self.part(x), y, label_smoothing=self.smoothing)
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            x, y = batch
            self.log("val/acc", (self.part.net(x).argmax(-1) == y).float().mean())

        test_step = validation_step

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}

    pl.seed_everything(0, verbose=False)
    module = Existing()
    module.part.net.load_state_dict(network(**options).state_dict())
    return module


def distillation(losses: Any = None, **options: Any) -> Distillation:
    losses = losses or {"kd": KD(temperature=4.0), "hint": Hint("act", "act", weight=2.0)}
    return Distillation(good_teacher(), losses, "part.net", **options)


def fit(pl: ModuleType, module: Any, callbacks: Any, ckpt_path: Any = None, data: Any = None, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet["enable_checkpointing"] = any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in _list(callbacks))
    settings = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet, **options}
    trainer = pl.Trainer(callbacks=callbacks, **settings)
    trainer.fit(module, data if data is not None else loader(shuffle=True), loader(seed=5), ckpt_path=ckpt_path)
    return trainer


def _list(callbacks: Any) -> list[Any]:
    return callbacks if isinstance(callbacks, list) else [callbacks]


def schedules() -> list[Any]:
    return [
        TemperatureSchedule(linear(8.0, 1.0)),
        HyperparameterSchedule("losses.kd.weight", linear(0.1, 2.0)),
        HyperparameterSchedule("losses.hint.weight", linear(1.0, 0.0)),
    ]


def saving(pl: ModuleType, folder: Path) -> Any:
    return pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, enable_version_counter=False)


def test_both_train_the_same_weights_and_log_the_same_values() -> None:
    ends, logged = [], []
    for pl in BOTH.values():
        module, callback = existing(pl, dropout=0.5), distillation()
        found = fit(pl, module, [callback, *schedules()], max_epochs=2, log_every_n_steps=1).callback_metrics
        logged.append({name: float(value) for name, value in found.items()})
        ends.append({**weights(module), **weights(callback.objective)})
        assert not hasattr(module, "distillation")
        assert "training_step" not in vars(module)
    assert_equal(*ends)
    assert logged[0] == logged[1]
    assert {"train/loss/kd", "train/loss/hint", "kd/temperature", "val/agreement", "val/teacher_acc"} <= set(logged[0])
    assert not torch.equal(ends[0]["part.net.head.weight"], network().head.weight)


def test_a_checkpoint_holds_the_plain_module_and_resumes_in_either(tmp_path: Path) -> None:
    for name, pl in BOTH.items():
        module = existing(pl, dropout=0.5)
        fit(pl, module, [distillation(), *schedules(), saving(pl, tmp_path / name)], max_epochs=3)
        state = torch.load(tmp_path / name / "epoch=2.ckpt", weights_only=True)["state_dict"]
        assert list(state) == list(existing(pl).state_dict())
        existing(pl).load_state_dict(state)
        for of in BOTH.values():
            resumed = existing(of, dropout=0.5)
            of.seed_everything(1, verbose=False)
            fit(of, resumed, [distillation(), *schedules()], tmp_path / name / "epoch=1.ckpt", max_epochs=3)
            assert_equal(weights(resumed), weights(module))


def test_a_network_is_rounded_while_it_is_distilled(pl: ModuleType, tmp_path: Path) -> None:
    ends = []
    for of in (lightning.pytorch, pl):
        module = existing(of)
        qat = QuantizationAwareTraining(start=0.5, learning_rate_factor=0.5)
        trainer = fit(of, module, [distillation(), qat, saving(of, tmp_path)], max_epochs=2, log_every_n_steps=1)
        assert trainer.callback_metrics["quantization/fake_quantize"] == 1
        tested = of.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[distillation(), qat]
        ).test(existing(of), loader(seed=5), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
        assert 0 < tested[0]["test/agreement"] <= 1
        ends.append(weights(module))
    assert_equal(*ends)
    existing(pl).load_state_dict(load_student(tmp_path / "epoch=1.ckpt"))


def test_a_callback_needs_no_list(pl: ModuleType) -> None:
    module = existing(pl)
    fit(pl, module, distillation())
    assert not torch.equal(module.part.net.head.weight, network().head.weight)
    for callback in (distillation(), *schedules(), QuantizationAwareTraining()):
        assert isinstance(callback, pl.Callback)


def test_what_cannot_work_is_refused_before_the_first_step(pl: ModuleType) -> None:
    def refused(match: str, *callbacks: Any, module: Any = None, **options: Any) -> None:
        module = module or existing(pl)
        before = weights(module)
        with pytest.raises(ValueError, match=match):
            fit(pl, module, list(callbacks), **options)
        assert_equal(weights(module), before)

    teacher = good_teacher()
    refused("no layer 'prat'", Distillation(teacher, {"kd": KD()}, "prat"))
    refused("no layer 'atc'", distillation({"hint": Hint("atc", "act")}))
    refused("4 classes and the teacher 3", Distillation(Network(classes=3), {"kd": KD()}, "part.net"))
    refused(
        "schedule path 'losses.dk.weight'", distillation(), HyperparameterSchedule("losses.dk.weight", linear(0, 1))
    )
    by_hand = existing(pl)
    by_hand.automatic_optimization = False
    refused("expected automatic optimization", distillation(), module=by_hand)
    average = pl.callbacks.EMAWeightAveraging(decay=0.5)
    refused("put Distillation before it", average, distillation())
    refused("averages weights", QuantizationAwareTraining(), pl.callbacks.EMAWeightAveraging(decay=0.5))
    refused("the training loader is empty", distillation(), data=[])


def test_a_module_of_one_and_a_trainer_of_the_other_is_lightnings_own_error() -> None:
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        fit(lightning.pytorch, existing(pytorch_lightning), distillation())
    module = DistillationModule(network(), good_teacher(), {"hard": HardLabel()}, torch.optim.SGD)
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        fit(pytorch_lightning, module, [])


def test_the_data_may_be_a_data_module_and_several_loaders(pl: ModuleType) -> None:
    class Data(pl.LightningDataModule):
        class_names = "abc"

        def train_dataloader(self):
            return pl.utilities.CombinedLoader([loader()], "max_size_cycle")

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0]

    labelled = distillation({"hard_label": HardLabel()})
    trainer = pl.Trainer(accelerator="cpu", callbacks=[labelled], logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="4 outputs and the data 3 classes"):
        trainer.fit(existing(pl), Data())


def test_the_logger_takes_what_either_trainer_says(pl: ModuleType, tmp_path: Path) -> None:
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert isinstance(logger, pl.loggers.Logger)
    fit(pl, existing(pl), [distillation(), saving(pl, tmp_path)], logger=logger, log_every_n_steps=1)
    assert logger.shipper.flush(30)
    run = logger.experiment.get_run(logger.run_id)
    assert {"train/loss/kd", "val/agreement"} <= set(run.data.metrics)
    assert run.info.status == "FINISHED"


def test_a_command_line_reads_the_arguments_and_takes_either(pl: ModuleType) -> None:
    assert list(inspect.signature(QuantizationAwareTraining).parameters)[:2] == ["spec", "start"]
    assert list(inspect.signature(Distillation).parameters)[:3] == ["teacher", "losses", "student"]
    for kind in (Distillation, TemperatureSchedule, HyperparameterSchedule, QuantizationAwareTraining):
        assert issubclass(kind, pl.Callback)
    assert issubclass(MLFlowLogger, pl.loggers.Logger)


ORDER = """
import {first}
import {second}
import sys
pl = sys.modules["pytorch_lightning"]
from kd_lightning import Distillation
from kd_lightning.losses import KD
from tests.tiny import good_teacher
assert isinstance(Distillation(good_teacher(), {{"kd": KD()}}), pl.Callback)
"""


@pytest.mark.parametrize("names", [("kd_lightning", "pytorch_lightning"), ("pytorch_lightning", "kd_lightning")])
def test_the_order_of_the_imports_does_not_matter(names: tuple[str, str]) -> None:
    root = Path(__file__).parents[1]
    code = ORDER.format(first=names[0], second=names[1])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_package_does_not_import_the_other_by_itself() -> None:
    code = "import kd_lightning, sys; assert 'pytorch_lightning' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
