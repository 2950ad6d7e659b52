"""Training with stored outputs is training with the teacher that wrote them, through both front doors."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Distillation, DistillationModule
from kd_lightning.losses import KD, HardLabel, Hint
from kd_lightning.stored_outputs import StoredOutputs, Views
from kd_lightning.stored_outputs.replay import ReplayedViews
from kd_lightning.tasks import Taught
from kd_lightning.teachers.stored import Stored
from tests.stored_outputs.data import Augmented, store
from tests.tiny import assert_equal, good_teacher, loader, network, samples, sgd, trainer, weights

VIEWS = 2
COUNT = 40


class Plain(LightningModule):
    """An existing project's module; notes what its student is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self._trainer is not None and self.trainer.training:
            self.seen.append(x.clone())
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def configure_optimizers(self):
        return sgd(self.parameters())


class Replayed(Augmented):
    """The views without outputs: what a live teacher is trained with."""

    def __init__(self) -> None:
        super().__init__(COUNT)
        self.views = ReplayedViews(Augmented(COUNT), seed=0)

    def __getitem__(self, key):
        return self.views[key._replace(epoch=key.epoch % VIEWS)]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("outputs")
    store(path, Augmented(COUNT), views=VIEWS, format="float16", layers=["act"])
    return path


def stored_loader(path, workers: int = 0, **options) -> DataLoader:
    stored = StoredOutputs(Augmented(COUNT), path)
    return DataLoader(stored, 8, sampler=Views(stored), num_workers=workers, persistent_workers=workers > 0, **options)


def live_loader() -> DataLoader:
    dataset = Replayed()
    return DataLoader(dataset, 8, sampler=Views(dataset))


def losses(door: str) -> dict:
    distilling = {"kd": KD(temperature=4.0, weight=0.7), "hint": Hint("act", weight=0.1)}
    return distilling if door == "callback" else {"hard_label": HardLabel(weight=0.3), **distilling}


def fit(door: str, teacher, data: DataLoader, epochs: int = 3, validation=None, checkpoint=None, **options):
    torch.manual_seed(1)  # of the projector
    if door == "module":
        module: LightningModule = DistillationModule(network(), teacher, losses(door), sgd)
    else:
        module = Plain()
        callback = Distillation(teacher, losses(door), student="net")
        options["callbacks"] = [callback, *options.get("callbacks", [])]
    run = trainer(max_epochs=epochs, **options)
    run.fit(module, data, validation, ckpt_path=checkpoint)
    return run, module


@pytest.mark.parametrize("door", ["module", "callback"])
def test_float16_learns_what_the_live_teacher_teaches(outputs, door: str) -> None:
    _, live = fit(door, good_teacher(), live_loader())
    _, read = fit(door, Stored(), stored_loader(outputs))
    before = weights(network())
    one, two = (weights(m.student if door == "module" else m.net) for m in (live, read))
    torch.testing.assert_close(one, two, rtol=2e-3, atol=2e-3)
    assert (one["stem.weight"] - before["stem.weight"]).abs().max() > 0.1


@pytest.mark.parametrize("door", ["module", "callback"])
def test_workers_change_nothing(outputs, door: str) -> None:
    _, alone = fit(door, Stored(), stored_loader(outputs))
    _, workers = fit(door, Stored(), stored_loader(outputs, workers=2))
    assert_equal(weights(alone), weights(workers))


@pytest.mark.parametrize("door", ["module", "callback"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_sees_the_same_views(outputs, tmp_path, door: str, workers: int) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    options = {"callbacks": [saving], "enable_checkpointing": True}
    _, whole = fit(door, Stored(), stored_loader(outputs), **options)
    _, resumed = fit(door, Stored(), stored_loader(outputs, workers), checkpoint=tmp_path / "epoch=0.ckpt")
    assert_equal(weights(whole), weights(resumed))
    if door == "callback":
        assert torch.equal(torch.cat(resumed.seen), torch.cat(whole.seen[COUNT // 8 :]))


def test_batches_of_validation_are_not_compared_with_a_teacher_that_is_not_there(outputs) -> None:
    run, _ = fit("module", Stored(), stored_loader(outputs), 1, loader())
    assert "val/acc" in run.callback_metrics
    assert "val/agreement" not in run.callback_metrics


@pytest.mark.parametrize("door", ["module", "callback"])
def test_a_training_set_without_outputs_is_refused_before_the_first_step(door: str) -> None:
    plain = DataLoader(TensorDataset(*samples(16)), batch_size=8)
    with pytest.raises(ValueError, match=r"got one without: wrap the training set, StoredOutputs\(dataset, path\)"):
        fit(door, Stored(), plain)


def test_a_layer_that_was_not_stored_is_named(outputs) -> None:
    module = DistillationModule(network(), Stored(), {"hint": Hint("act", "stem")}, sgd)
    with pytest.raises(ValueError, match=r"layers \['stem'\] were not stored, got \['act'\]: call store_outputs"):
        trainer().fit(module, stored_loader(outputs))


def mixed(x: torch.Tensor) -> torch.Tensor:
    return 0.7 * x + 0.3 * x.flip(0)


class MixesInStep(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step((mixed(batch[0]), batch[1]), batch_idx)


class MixesOnDevice(DistillationModule):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch._replace(batch=(mixed(batch.batch[0]), batch.batch[1])) if isinstance(batch, Taught) else batch


@pytest.mark.parametrize("door", ["module", "callback"])
def test_mixup_after_the_outputs_were_read_is_refused_before_the_first_step(outputs, door: str) -> None:
    callbacks = []
    if door == "module":
        module: LightningModule = MixesOnDevice(network(), Stored(), losses(door), sgd)
    else:
        module = MixesInStep()
        callbacks = [Distillation(Stored(), losses(door), student="net")]
    with pytest.raises(
        ValueError, match=r"inputs are not those that the teacher saw, for samples \[0, 1\].* MixUp, CutMix"
    ):
        trainer(callbacks=callbacks).fit(module, stored_loader(outputs))


def test_in_bfloat16_the_outputs_still_fit_their_inputs_and_teach_the_same(outputs) -> None:
    _, half = fit("module", Stored(), stored_loader(outputs), precision="bf16-true")
    _, full = fit("module", Stored(), stored_loader(outputs))
    found, expected = (
        {name: x.float() for name, x in weights(m.student).items() if x.is_floating_point()} for m in (half, full)
    )
    assert half.student.head.weight.dtype == torch.bfloat16
    assert (found["head.weight"] - network().head.weight).abs().max() > 0.1
    # bfloat16 has 8 bits: products are off by some 0.4 %, over 15 steps.
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.06)


def test_the_best_classes_teach_too(tmp_path) -> None:
    store(tmp_path, Augmented(COUNT), views=VIEWS, format="top3")
    module = DistillationModule(network(), Stored(), {"kd": KD(temperature=2.0)}, sgd)
    trainer(max_epochs=20).fit(module, stored_loader(tmp_path))
    inputs, labels = samples(200, seed=7)
    assert (module.student.eval()(inputs).argmax(-1) == labels).float().mean() > 0.6
