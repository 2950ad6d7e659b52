"""A network is rounded while it is trained, from when it was told to, whatever else goes on."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kd_lightning import Distillation, DistillationModule, load_student
from kd_lightning.callbacks import HyperparameterSchedule, QuantizationAwareTraining, TemperatureSchedule
from kd_lightning.checkpoint import load_weights
from kd_lightning.losses import KD, HardLabel, Hint, SimKD
from kd_lightning.quantization import (
    QuantizationSpec,
    calibrate,
    exportable,
    is_prepared,
    prepare,
    quantized_layers,
    set_fake_quantization,
)
from kd_lightning.quantization.prepare import quantizers
from kd_lightning.schedules import linear
from kd_lightning.teachers import Momentum, Peers
from tests.tiny import assert_equal, distillation, good_teacher, loader, network, samples, sgd, trainer, weights

ROOT = Path(__file__).parents[2]


class Existing(LightningModule):
    """Somebody's module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/acc", (self.net(batch[0]).argmax(-1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Whole(Existing):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def distilled(**options: Any) -> Any:
    """With a loss of logits, and one of a layer that is quantised."""
    losses = {"hard_label": HardLabel(0.3), "kd": KD(4.0, weight=0.7), "hint": Hint("stem", "stem", weight=0.5)}
    return distillation(losses=losses, **options)


def qat(**options: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(**options)


def fit(module: LightningModule, *callbacks: Callback, data: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    it = trainer(callbacks=list(callbacks), **options)
    it.fit(module, loader(shuffle=True) if data is None else data, loader(seed=5), ckpt_path=ckpt_path)
    return it


class Notes(Callback):
    """What holds while each batch is trained on."""

    def __init__(self, name: str = "student") -> None:
        self.name = name
        self.rounding: list[bool] = []
        self.observing: list[bool] = []
        self.norms: list[bool] = []
        self.rates: list[float] = []
        self.states: list[dict[str, torch.Tensor]] = []

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        net = pl_module.get_submodule(self.name)
        found = quantizers(net).values()
        self.rounding.append(all(q.enabled for q in found))
        self.observing.append(all(q.observing and q.training for q in found))
        self.norms.append(net.norm.training)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.states.append(weights(pl_module.get_submodule(self.name)))


def ranges(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name.endswith((".low", ".high"))}


# When.


@pytest.mark.parametrize("every", [1, 2])
def test_phases_begin_at_shares_of_the_optimizer_steps(every: int) -> None:
    notes = Notes()
    callback = qat(start=0.25, freeze_observers=0.5, freeze_batch_norm=0.75, learning_rate_factor=0.5)
    it = fit(
        module := distilled(), callback, notes, max_epochs=2, data=loader(32 * every), accumulate_grad_batches=every
    )
    assert it.global_step == 8
    assert notes.rounding == [step >= 2 for step in range(8) for _ in range(every)]
    assert notes.observing == [step < 4 for step in range(8) for _ in range(every)]
    assert notes.norms == [step < 6 for step in range(8) for _ in range(every)]
    before, frozen, last = (ranges(notes.states[every * step - 1]) for step in (3, 4, 8))
    assert_equal(last, frozen)
    assert all(not torch.equal(before[name], frozen[name]) for name in frozen if frozen[name] != 0)
    assert module.student.norm.training  # as before, for the next fit


def test_phases_begin_with_epochs() -> None:
    notes = Notes()
    fit(distilled(), qat(start=1, freeze_observers=2, freeze_batch_norm=3), notes, max_epochs=4)
    assert notes.rounding == [False] * 4 + [True] * 12
    assert notes.observing == [True] * 8 + [False] * 8
    assert notes.norms == [True] * 12 + [False] * 4


class Copies(Callback):
    def __init__(self) -> None:
        self.copies: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.copies.append({name: x.detach().clone() for name, x in pl_module.named_parameters()})


def test_before_the_start_the_training_is_that_in_float() -> None:
    runs = []
    for callbacks in ([], [qat(start=1, student="net")]):
        seed_everything(0, verbose=False)
        fit(Existing(), *callbacks, copies := Copies(), max_epochs=2)
        runs.append(copies.copies)
    same = [all(torch.equal(one[name], other[name]) for name in one) for one, other in zip(*runs, strict=True)]
    assert same == [True] * 4 + [False] * 4


def test_the_learning_rate_is_less_from_the_start_on_whatever_the_scheduler_does() -> None:
    notes = Notes("net")
    it = fit(Existing(), qat(start=0.5, learning_rate_factor=0.25, student="net"), notes, max_epochs=2)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    expected = []
    for step in range(8):
        expected.append(optimizer.param_groups[0]["lr"] * (1.0 if step < 4 else 0.25))
        optimizer.step()
        scheduler.step()
    assert notes.rates == expected
    assert it.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]  # the scheduler's own


def test_the_factor_is_in_no_checkpoint_when_a_step_breaks_off() -> None:
    class Broken(Existing):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                raise KeyError("the user's")
            return super().training_step(batch, batch_idx)

    class Rate(Callback):
        def on_exception(self, trainer, pl_module, exception) -> None:
            self.rate = trainer.optimizers[0].param_groups[0]["lr"]

    rate = Rate()
    with pytest.raises(KeyError, match="the user's"):
        fit(module := Broken(), qat(student="net", learning_rate_factor=0.1), rate)
    scheduler = module.lr_schedulers()
    assert rate.rate == scheduler.get_last_lr()[0] > 5e-3


def test_a_factor_of_a_half_is_half_the_learning_rate() -> None:
    ends = []
    for rate, factor in ((0.1, 0.5), (0.05, 1.0)):
        module = distilled(optimizer=lambda parameters, rate=rate: torch.optim.SGD(parameters, lr=rate))
        seed_everything(0, verbose=False)
        fit(module, qat(learning_rate_factor=factor))
        ends.append(weights(module.student))
    assert_equal(*ends)


def test_what_a_person_sees(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = qat(spec=QuantizationSpec(skip=("head",)), start=0.5)
    with caplog.at_level("INFO"):
        fit(distilled(), callback, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert (
        "1 of 2 convolutions and linear layers are quantised; head (stays in float: left out); "
        "these are 48 of 108 parameters (44.4%); in float stay: Linear 36, BatchNorm1d 16, bias 8"
    ) in caplog.text
    text = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    names = text[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in text[1:]]
    assert [float(x) for row in rows if (x := row["quantization/fake_quantize"])] == [0, 0, 1, 1]


def test_a_training_that_ends_before_the_start_warns() -> None:
    with pytest.warns(UserWarning, match="ended before start=3: nothing was rounded"):
        fit(distilled(), qat(start=3), max_epochs=5, max_steps=8)


# What, and beside what.


@pytest.mark.parametrize("student", ["net", ""])
def test_beside_distillation_in_either_order(student: str) -> None:
    ends = []
    for first in (True, False):
        seed_everything(0, verbose=False)
        module = Existing() if student else Whole()
        losses = {"kd": KD(4.0), "hint": Hint("net.stem" if not student else "stem", "stem")}
        callback = Distillation(good_teacher(), losses, student=student)
        both = [qat(start=0.5), callback] if first else [callback, qat(start=0.5)]
        notes = Notes("net")
        it = fit(module, *both, notes, max_epochs=2, log_every_n_steps=1)
        assert notes.rounding == [False] * 4 + [True] * 4
        assert {"train/loss/kd", "train/loss/hint"} <= set(it.callback_metrics)
        assert [layer.name.removeprefix("net.") for layer in quantized_layers(module)] == ["stem", "head"]
        assert type(callback.objective.losses["hint"].projector) is nn.Linear
        ends.append({**weights(module), **weights(callback.objective)})
    assert_equal(*ends)


def test_temperature_and_weights_are_scheduled_at_the_same_time() -> None:
    class Values(Callback):
        def on_before_backward(self, trainer, pl_module, loss) -> None:
            seen.append((pl_module.losses.kd.temperature, pl_module.losses.hint.weight))

    seen: list[tuple[float, float]] = []
    notes = Notes()
    schedules = [TemperatureSchedule(linear(8, 4)), HyperparameterSchedule("losses.hint.weight", linear(1, 0))]
    module = distilled()
    it = fit(module, *schedules, qat(start=0.5), notes, Values(), log_every_n_steps=1)
    assert seen == [(8, 1), (7, 0.75), (6, 0.5), (5, 0.25)]
    assert notes.rounding == [False, False, True, True]
    assert it.callback_metrics["train/loss/hint"] > 0


def test_alone_all_layers_of_a_module_are_quantised_but_those_of_losses() -> None:
    module = Existing()
    fit(module, qat())
    assert [(layer.name, layer.weight_bits) for layer in quantized_layers(module)] == [("net.stem", 8), ("net.head", 8)]
    module.eval()
    rounded = module.net(samples(8)[0])
    set_fake_quantization(module, False)
    assert not torch.equal(rounded, module.net(samples(8)[0]))


def test_a_network_made_in_configure_model_is_prepared() -> None:
    class Late(Existing):
        def __init__(self) -> None:
            super().__init__()
            self.net = None

        def configure_model(self) -> None:
            self.net = self.net or network()

    ends = []
    for kind in (Late, Existing):
        seed_everything(0, verbose=False)
        module = kind()
        fit(module, qat(student="net"))
        ends.append(weights(module.net))
    assert_equal(*ends)


def test_a_student_that_a_loss_changes_is_changed_first(tmp_path: Path) -> None:
    def loss() -> SimKD:
        return SimKD("act", student_classifier="head")

    module = distillation(losses={"simkd": loss()})
    it = fit(module, qat(), max_epochs=2)
    names = [layer.name for layer in quantized_layers(module.student) if layer.weight_bits == 8]
    assert names == ["stem", *(f"act.projector.{i}" for i in (0, 3, 6)), "head.0"]
    assert all(q.observed for q in quantizers(module.student).values())  # the classifier is always in eval mode
    exportable(module.student)
    it.save_checkpoint(tmp_path / "last.ckpt")
    expected = it.test(module, loader(seed=5), verbose=False)

    student = loss().change(network(), good_teacher(), samples(8)[0])
    other = distillation(student, losses={"simkd": loss()})
    tested = trainer(callbacks=[qat()]).test(other, loader(seed=5), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert tested == expected

    untouched = distillation(losses={"simkd": loss()})
    trainer(callbacks=[qat()]).validate(untouched, loader(), verbose=False)
    with pytest.raises(ValueError, match=r"a loss has changed the student after it was prepared.*SimKD.change"):
        fit(untouched, qat())


def test_learned_scales_are_trained() -> None:
    module = distilled()
    callback = qat(spec=QuantizationSpec(learned_scales=True), start=0.5)
    fit(module, callback, copies := Copies(), max_epochs=2)
    moved = [copy["student.stem.weight_quantizer.scale"] for copy in copies.copies]
    assert torch.equal(moved[0], moved[3])  # not yet used
    assert not torch.equal(moved[3], moved[-1])


def test_parts_in_eval_mode_have_their_ranges_watched_too() -> None:
    module = distilled()
    module.student.stem.eval()
    fit(module, qat())
    assert all(q.observed for q in quantizers(module.student).values())
    assert not module.student.stem.training


def test_ranges_of_a_calibrated_network_may_stay() -> None:
    student = calibrate(prepare(network()), loader())
    before = ranges(weights(student))
    module = distillation(student)
    fit(module, qat(freeze_observers=0.0))
    assert_equal(ranges(weights(module.student)), before)
    assert not torch.equal(module.student.head.weight, network().head.weight)


@pytest.mark.parametrize("door", ["module", "qat first", "distillation first"])
def test_a_moving_average_as_teacher_is_one_in_float(door: str, tmp_path: Path) -> None:
    def run(ckpt_path: Path | None = None, epochs: int = 2) -> tuple[LightningModule, Any, Momentum]:
        teacher, callback = Momentum(0.5), qat(freeze_observers=1, freeze_batch_norm=1)
        if door == "module":
            module, callbacks = (
                distillation(teacher=teacher, losses={"kd": KD(), "hard_label": HardLabel()}),
                [callback],
            )
        else:
            module = Existing()
            callbacks = [callback, Distillation(teacher, {"kd": KD(4.0)}, student="net")]
            callbacks = callbacks if door == "qat first" else callbacks[::-1]
        it = fit(module, *callbacks, data=loader(), ckpt_path=ckpt_path, max_epochs=epochs)
        return module, it, teacher

    module, _, teacher = run()
    assert not is_prepared(teacher.network)
    assert not torch.equal(teacher.network.stem.weight, network().stem.weight)
    run(epochs=1)[1].save_checkpoint(tmp_path / "one.ckpt")
    other, again, average = run(tmp_path / "one.ckpt")
    assert_equal(weights(average.network), weights(teacher.network))
    assert_equal(weights(other), weights(module))
    if door == "module":
        fresh = distillation(teacher=Momentum(0.5), losses={"kd": KD(), "hard_label": HardLabel()})
        again = trainer(callbacks=[qat()])
        tested = again.test(fresh, loader(seed=5), ckpt_path=tmp_path / "one.ckpt", verbose=False)
        assert tested[0]["test/agreement"] > 0.5


def test_two_networks_of_a_module_each_with_a_spec_of_its_own(tmp_path: Path) -> None:
    def run(ckpt_path: Path | None = None) -> DistillationModule:
        losses = {"hard_label": HardLabel(), "kd": KD(1.0)}
        module = DistillationModule(network(), Peers({"b": network(seed=1)}), losses, optimizer=sgd)
        four, eight = (QuantizationSpec(weight_bits=bits) for bits in (4, 8))
        both = [qat(spec=four), qat(spec=eight, student="objective.peers.b", start=0.5)]
        save = [] if ckpt_path else [ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)]
        fit(module, *both, *save, enable_checkpointing=not ckpt_path, ckpt_path=ckpt_path, max_epochs=2)
        return module

    module = run()
    assert [layer.weight_bits for layer in quantized_layers(module.student)] == [4, 4]
    assert [layer.weight_bits for layer in quantized_layers(module.teacher.peers["b"])] == [8, 8]
    assert_equal(weights(run(tmp_path / "epoch=0.ckpt")), weights(module))


# Resume and checkpoints.


def make(door: str) -> tuple[LightningModule, list[Callback]]:
    """A module whose training depends on the generators, and its callbacks."""
    seed_everything(0, verbose=False)
    callback = qat(start=0.5, freeze_observers=0.75, freeze_batch_norm=0.75, learning_rate_factor=0.5)
    if door.startswith("module"):
        if door == "module, learned scales":
            callback.spec = QuantizationSpec(weight_bits=4, observer="mse", learned_scales=True)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR
        return distillation(network(dropout=0.3), scheduler=cosine, losses={"kd": KD(), "hint": Hint("stem")}), [
            callback
        ]
    module = Existing()
    module.net.drop.p = 0.3
    hints = Distillation(good_teacher(), {"kd": KD(4.0), "hint": Hint("stem")}, student="net")
    if door == "alone":
        module.net.drop.p = 0.0  # Lightning puts no generators back by itself
        callback.student = "net"
        return module, [callback]
    return module, [callback, hints] if door == "qat first" else [hints, callback]


def everything(module: LightningModule, it: Any) -> dict[str, Any]:
    states = it.optimizers[0].state_dict()
    moments = {f"{i}.{name}": torch.as_tensor(x) for i, s in states["state"].items() for name, x in s.items()}
    return {**weights(module), **moments, "lr": torch.tensor(states["param_groups"][0]["lr"])}


@pytest.mark.parametrize("door", ["module", "module, learned scales", "qat first", "distillation first", "alone"])
def test_a_resumed_training_is_the_uninterrupted_one_bit_by_bit(door: str, tmp_path: Path) -> None:
    """Epochs: one in float, one before the switch, the switch; then observers and batch norm are frozen."""
    options = {"max_epochs": 4, "data": loader(shuffle=door != "alone")}
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, enable_version_counter=False)
    module, callbacks = make(door)
    expected = everything(module, fit(module, *callbacks, save, enable_checkpointing=True, **options))
    assert any(name.endswith(".low") for name in expected)
    for epoch in range(3):
        again, callbacks = make(door)
        seed_everything(1, verbose=False)
        it = fit(again, *callbacks, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", **options)
        assert_equal(everything(again, it), expected)


def test_a_resume_within_an_epoch(tmp_path: Path) -> None:
    """Of 8 steps the 4th is the first that is rounded; checkpoints around it. All batches are the same.

    Lightning begins a plain loader anew after a resume.
    """
    x, y = samples(8)
    data = DataLoader(TensorDataset(x.repeat(4, 1), y.repeat(4)), batch_size=8)

    def run(resume: Path | None = None) -> dict[str, Any]:
        seed_everything(0, verbose=False)
        save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1, enable_version_counter=False)
        module = distilled()
        callbacks = [qat(start=0.375, learning_rate_factor=0.1), *([] if resume else [save])]
        it = fit(module, *callbacks, data=data, max_epochs=2, enable_checkpointing=resume is None, ckpt_path=resume)
        return everything(module, it)

    expected = run()
    for step in (2, 3, 4, 7):
        assert_equal(run(tmp_path / f"step={step}.ckpt"), expected)


def trained(module: LightningModule) -> nn.Module:
    return module.net if isinstance(module, Existing) else module.student


@pytest.mark.parametrize("door", ["module", "alone"])
def test_a_checkpoint_is_tested_as_it_was_trained(door: str, tmp_path: Path) -> None:
    module, callbacks = make(door)
    it = fit(module, *callbacks, max_epochs=2)
    it.save_checkpoint(tmp_path / "last.ckpt")
    expected = weights(trained(module))
    other, callbacks = make(door)
    for x in other.parameters():
        nn.init.zeros_(x)
    again = trainer(callbacks=callbacks)
    (scores,) = again.test(other, loader(seed=5), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert_equal(weights(trained(other)), expected)
    assert all(q.enabled for q in quantizers(other).values())
    name = "test/acc" if door == "module" else "val/acc"
    assert scores[name] == pytest.approx(it.test(module, loader(seed=5), verbose=False)[0][name])


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Of a training in float, and of one that is quantisation-aware."""
    paths = {}
    for door, name in ((distilled, "distilled"), (Existing, "alone")):
        for kind, callbacks in (("float", []), ("quantised", [qat(**({"student": "net"} if name == "alone" else {}))])):
            paths[f"{name} {kind}"] = tmp_path / f"{name}-{kind}.ckpt"
            fit(door(), *callbacks).save_checkpoint(paths[f"{name} {kind}"])
    return paths


FLOAT = "it is of a network in float, expected one prepared for quantisation: load it before prepare"
PREPARED = r"it is of a network prepared for quantisation, expected one in float: call .*prepare\(network, spec\)"


def test_a_checkpoint_of_the_other_kind_is_refused(files: dict[str, Path]) -> None:
    for name, module, callback in (("distilled", distilled(), qat()), ("alone", Existing(), qat(student="net"))):
        with pytest.raises(ValueError, match=FLOAT):
            fit(module, callback, ckpt_path=files[f"{name} float"], max_epochs=2)
        with pytest.raises(ValueError, match=FLOAT):
            trainer(callbacks=[callback]).test(module, loader(), ckpt_path=files[f"{name} float"], verbose=False)
    with pytest.raises(ValueError, match=PREPARED):
        trainer().test(distilled(), loader(), ckpt_path=files["distilled quantised"], verbose=False)
    with pytest.raises(ValueError, match=PREPARED):
        DistillationModule.load_from_checkpoint(
            files["distilled quantised"],
            student=network(),
            teacher=None,
            losses={"hard_label": HardLabel()},
            optimizer=sgd,
        )
    with pytest.raises(ValueError, match=PREPARED):
        load_weights(network(), files["alone quantised"])
    with pytest.raises(ValueError, match=FLOAT):
        load_weights(prepare(network()), files["distilled float"])


def test_its_weights_load_into_a_prepared_network(files: dict[str, Path]) -> None:
    one, other = (prepare(network(seed=seed)) for seed in (5, 6))
    one.load_state_dict(load_student(files["distilled quantised"], quantizers=True))
    load_weights(other, files["distilled quantised"])
    assert all(q.enabled and q.observed for q in quantizers(one).values())
    x = samples(16)[0]
    assert torch.equal(one.eval()(x), other.eval()(x))


def test_its_weights_in_float_load_into_the_plain_network(files: dict[str, Path]) -> None:
    """They predict what the network that was trained predicts before it is rounded."""
    x = samples(64)[0]
    for name, plain, prefix in (("distilled", network(seed=5), ""), ("alone", Existing(), "net.")):
        plain.load_state_dict(load_student(files[f"{name} quantised"]))
        trained = prepare(network(seed=6))
        load_weights(trained, files[f"{name} quantised"])
        plain, trained = plain.get_submodule(prefix.rstrip(".")).eval(), trained.eval()
        assert not torch.equal(plain(x), trained(x))
        set_fake_quantization(trained, False)
        assert torch.equal(plain(x), trained(x))


def test_another_spec_is_refused(files: dict[str, Path]) -> None:
    four = QuantizationSpec(weight_bits=4)
    with pytest.raises(ValueError, match=r"checkpoint was trained with .*weight_bits=8.*, expected .*weight_bits=4"):
        fit(distilled(), qat(spec=four), ckpt_path=files["distilled quantised"], max_epochs=2)
    with pytest.raises(ValueError, match=r"network was prepared with .*weight_bits=4.*, expected .*weight_bits=8"):
        fit(distillation(prepare(network(), four)), qat())


# Refused before the first step.

REFUSED = {
    "share": ({"start": 1.5}, r"expected start to be a share of the training in \[0.0, 1.0\] or an epoch .* got 1.5"),
    "negative": ({"freeze_observers": -1}, "expected freeze_observers to be a share .* got -1"),
    "flag": ({"freeze_batch_norm": True}, "expected freeze_batch_norm to be a share .* got True"),
    "end": ({"start": 1.0}, r"expected start before the end, got 1.0: 0.0 rounds from the first step; epoch 1 is 1"),
    "factor": ({"learning_rate_factor": 0}, "expected learning_rate_factor > 0, got 0"),
    "epoch": ({"start": 2}, "expected start before the end of 2 epochs, got epoch 2: nothing would be rounded"),
    "ranges": ({"freeze_observers": 0.0}, "got some that have seen no data: calibrate"),
    "student": ({"student": "studnet"}, "has no layer 'studnet'.*nearest: student.*makes in setup.. comes too late"),
    "skip": ({"spec": QuantizationSpec(skip=("stem", "head"))}, "expected a convolution or linear layer to quantise"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work(options: dict, message: str) -> None:
    module = distilled()
    with pytest.raises(ValueError, match=message):
        fit(module, qat(**options), max_epochs=2)
    for name, x in network().named_parameters():
        assert torch.equal(module.student.get_parameter(name), x)


@pytest.mark.parametrize("average", [WeightAveraging, lambda: StochasticWeightAveraging(0.01)])
@pytest.mark.parametrize("first", [True, False])
def test_averages_of_weights_are_refused(average, first: bool) -> None:
    both = [average(), qat()]
    with pytest.raises(
        ValueError, match=r"WeightAveraging averages weights from before rounding .* with those from aft"
    ):
        fit(distilled(), *(both if first else reversed(both)))


def test_replaced_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="sync_batchnorm=True replaces batch norm"):
        qat().setup(trainer(strategy="ddp", sync_batchnorm=True), distilled(), "fit")


def test_a_network_that_setup_makes_anew_is_refused() -> None:
    class Late(Existing):
        def setup(self, stage: str) -> None:
            self.net = network()

    with pytest.raises(ValueError, match=r"setup\(\) has made the network anew after it was prepared"):
        fit(Late(), qat(student="net"))


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from zip(*samples(8), strict=True)


def test_a_share_of_an_unknown_length_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the number of optimizer steps, got an unknown one"):
        fit(distilled(check_teacher=False), qat(), data=DataLoader(Endless(), batch_size=4))


def test_with_max_epochs_a_share_is_one_of_the_epochs() -> None:
    class Finite(IterableDataset):
        def __iter__(self):
            yield from zip(*samples(8), strict=True)

    rounding: list[bool] = []

    class Notes(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rounding.append(bool(callback._phase and callback._phase[0]))

    callback = qat(start=0.5)
    fit(distilled(check_teacher=False), callback, Notes(), data=DataLoader(Finite(), batch_size=4), max_epochs=4)
    assert rounding == [False] * 4 + [True] * 4


# At scale.


def test_half_precision_and_accumulated_gradients() -> None:
    states = []
    for precision in ("32-true", "bf16-mixed"):
        module = distilled()
        seed_everything(0, verbose=False)
        fit(module, qat(start=0.25), data=loader(64), precision=precision, accumulate_grad_batches=2, max_epochs=2)
        states.append({name: x for name, x in weights(module.student).items() if x.is_floating_point()})
    full, mixed = states
    assert all(x.dtype == torch.float32 for x in mixed.values())
    # bfloat16 has 8 bits: products are off by some 0.4 %, over 8 steps.
    torch.testing.assert_close(mixed, full, rtol=0.05, atol=0.05)
    assert all(x != 0 for name, x in ranges(mixed).items() if name.endswith("high"))


@pytest.mark.parametrize("whole", [False, True], ids=["student.compile()", "torch.compile(module)"])
def test_compiled_networks_train_the_same(whole: bool) -> None:
    ends = []
    for compiled in (False, True):
        module = Existing()
        if compiled and not whole:
            module.net.compile(backend="aot_eager")
            module.net(samples(4)[0])  # compiled in float, before it is prepared
        module.net.load_state_dict(network().state_dict())
        given = torch.compile(module, backend="aot_eager") if compiled and whole else module
        seed_everything(0, verbose=False)
        fit(given, qat(start=0.5, student="net"), notes := Notes("net"), max_epochs=2)
        assert notes.rounding == [False] * 4 + [True] * 4
        ends.append(weights(module.net))
    # The compiler may fuse operations, and so round otherwise.
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


SCRIPT = """
import sys, torch
import tests.callbacks.test_quantization_aware_training as t

module = t.distilled()
seen, lows = [], []
class Look(t.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        seen.append(t.ranges(t.weights(pl_module.student)))
        lows.append(batch[0].min().item())

callbacks = [t.qat(start=0.25, freeze_observers=0.75), Look()]
it = t.fit(module, *callbacks, data=t.loader(64), strategy="ddp", devices=2, max_epochs=2)
torch.save({"ranges": seen, "lows": lows, "student": t.weights(module.student)}, f"{sys.argv[1]}/{it.global_rank}.pt")
"""


@pytest.mark.integration
def test_two_processes_have_the_same_ranges(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for mine, theirs in zip(one["ranges"], other["ranges"], strict=True):
        assert_equal(mine, theirs)
    trained = {name: x for name, x in one["student"].items() if "running" not in name}
    assert_equal(trained, {name: other["student"][name] for name in trained})
    assert_equal(one["ranges"][5], one["ranges"][-1])
    # After the first batch, the mean of what both have seen.
    seen = sum(part["lows"][0] for part in (one, other)) / 2
    assert one["ranges"][0]["stem.input_quantizer.low"].item() == pytest.approx(seen)
    assert one["lows"][0] != other["lows"][0]
