import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from kd_lightning import Distillation, DistillationModule, Outputs
from kd_lightning.callbacks import HyperparameterSchedule, TemperatureSchedule
from kd_lightning.losses import KD, HardLabel, Hint
from kd_lightning.objective import DistillationObjective
from kd_lightning.schedules import linear
from tests.tiny import (
    FEATURES,
    Network,
    assert_equal,
    good_teacher,
    loader,
    logged,
    network,
    samples,
    trainer,
    weights,
)


class Existing(LightningModule):
    """Somebody's module: a network, its own loss, its own metrics."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = Network(dropout=dropout)
        self.seen = MeanMetric()

    def forward(self, x):
        return self.net(x).softmax(-1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.seen.update(loss.detach())
        self.log("train/loss", loss)  # the name that the callback uses, too
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/acc", (self.net(x).argmax(-1) == y).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


def make(module: LightningModule | None = None, **options: Any) -> tuple[LightningModule, Distillation]:
    seed_everything(0, verbose=False)  # before the projectors; the default module too
    module = module if module is not None else Existing()
    losses = options.pop("losses", None) or {"kd": KD(temperature=4.0), "hint": Hint("act", "act", weight=2.0)}
    options.setdefault("student", "net")
    return module, Distillation(options.pop("teacher", None) or good_teacher(), losses, **options)


def fit(module: LightningModule, *callbacks: Callback, data: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    it = trainer(callbacks=list(callbacks), **options)
    it.fit(module, data or loader(shuffle=True), loader(seed=5), ckpt_path=ckpt_path)
    return it


def plain_names() -> list[str]:
    return list(Existing().state_dict())


def assert_left(module: LightningModule) -> None:
    assert list(module.state_dict()) == plain_names()
    assert "training_step" not in vars(module)
    assert not hasattr(module, "distillation")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_post_hooks")
    assert all(not getattr(part, name) for part in module.modules() for name in hooks)


# One engine.


def test_both_doors_train_the_same_weights() -> None:
    def losses():
        return {"hard_label": HardLabel(weight=0.3), "kd": KD(weight=0.7), "hint": Hint("act", weight=2.0)}

    module, callback = make(losses=losses(), task_weight=0.0)
    initial = weights(module.net)
    fit(module, callback, max_epochs=2)

    seed_everything(0, verbose=False)
    student = Network()
    assert_equal(weights(student), initial)
    other = DistillationModule(student, good_teacher(), losses(), lambda p: torch.optim.AdamW(p, lr=1e-2))
    other._scheduler = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.9)  # 4 steps an epoch
    fit(other, max_epochs=2)
    assert_equal(weights(module.net), weights(other.student))
    assert_equal(weights(callback.objective), weights(other.objective))
    assert not torch.equal(initial["head.weight"], module.net.head.weight)


def test_the_modules_own_loss_serves_as_the_hard_label_term() -> None:
    module, callback = make(losses={"kd": KD(weight=0.7)}, task_weight=0.3)
    fit(module, callback)
    other, both = make(losses={"hard_label": HardLabel(weight=0.3), "kd": KD(weight=0.7)}, task_weight=0.0)
    fit(other, both)
    torch.testing.assert_close(weights(module.net), weights(other.net))


def test_weights_of_zero_leave_the_training_as_it_was() -> None:
    ends = []
    for distilled in (True, False):
        module, callback = make(Existing(dropout=0.5), losses={"kd": KD(weight=0.0)})
        module.net.load_state_dict(network().state_dict())
        seed_everything(7, verbose=False)  # order of the samples, dropout
        fit(module, *([callback] if distilled else []), max_epochs=2)
        ends.append(weights(module.net))
    assert_equal(*ends)


def test_the_student_comes_closer_to_its_teacher() -> None:
    agreement = {}
    for task_weight, weight in ((1.0, 0.0), (0.0, 1.0)):
        noise = torch.randint(4, (256,), generator=torch.Generator().manual_seed(0))
        data = DataLoader(torch.utils.data.TensorDataset(samples(256)[0], noise), batch_size=32)
        module, callback = make(losses={"kd": KD(weight=weight)}, task_weight=task_weight, check_teacher=False)
        agreement[weight] = float(fit(module, callback, data=data, max_epochs=5).callback_metrics["val/agreement"])
    assert agreement[1.0] > 0.7 > 0.4 > agreement[0.0]


# The module afterwards, and its checkpoint.


def test_the_module_is_left_as_it_was_and_fits_again() -> None:
    module, callback = make()
    fit(module, callback)
    assert_left(module)
    trained = weights(callback.objective)

    class Notes(Callback):
        def on_train_start(self, trainer, pl_module):
            assert_equal(weights(pl_module.distillation), trained)  # goes on with the projector as it was

    fit(module, callback, Notes())
    assert_left(module)
    assert not torch.equal(
        trained["losses.hint.projector.weight"], weights(callback.objective)["losses.hint.projector.weight"]
    )


@pytest.mark.parametrize("where", ["training_step", "validation_step", "configure_optimizers", "on_train_batch_end"])
def test_the_module_is_left_as_it_was_after_an_exception(where: str, monkeypatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyError("the user's")

    module, callback = make(type("Failing", (Existing,), {} if where == "training_step" else {where: fail})())
    broken = Failure() if where == "training_step" else Callback()
    with pytest.raises(KeyError, match="the user's"):
        fit(module, callback, broken)
    assert_left(module)
    fit(Existing(), make()[1])


class Failure(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            pl_module.net.head.register_forward_hook(self.fail)

    def fail(self, layer, args, output):
        layer._forward_hooks.clear()
        raise KeyError("the user's")


def test_a_checkpoint_loads_strictly_into_the_plain_module(tmp_path: Path) -> None:
    module, callback = make()
    it = fit(module, callback, ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(content["state_dict"]) == plain_names()
    assert set(content["callbacks"]["Distillation"]["losses"]) == {
        "losses.hint.projector.weight",
        "losses.hint.projector.bias",
    }
    loaded = Existing.load_from_checkpoint(tmp_path / "last.ckpt")
    assert_equal(weights(loaded), weights(module))
    it.test(module, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)


def test_a_resumed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    def callbacks():
        return HyperparameterSchedule("losses.kd.weight", linear(0.1, 2.0)), TemperatureSchedule(linear(8.0, 1.0))

    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, enable_version_counter=False)
    module, callback = make(Existing(dropout=0.5))
    fit(module, callback, *callbacks(), save, max_epochs=3, enable_checkpointing=True)
    resumed, again = make(Existing(dropout=0.5))
    seed_everything(1, verbose=False)
    fit(resumed, again, *callbacks(), ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert_equal(weights(resumed.net), weights(module.net))
    assert_equal(weights(again.objective), weights(callback.objective))
    assert again.objective.losses["kd"].weight == callback.objective.losses["kd"].weight > 1.5


def test_a_checkpoint_of_other_losses_is_refused(tmp_path: Path) -> None:
    module, callback = make()
    fit(module, callback, ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
    module, callback = make(losses={"kd": KD()})
    with pytest.raises(
        ValueError, match=r"checkpoint's losses are not those .* unexpected losses.hint.projector.weight"
    ):
        fit(module, callback, ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    assert_left(module)


# Before the first step.


def test_looking_ahead_leaves_no_trace_in_the_module() -> None:
    class Watcher(Callback):
        def on_fit_start(self, trainer, pl_module):
            self.state = {**weights(pl_module), "rng": torch.get_rng_state()}
            self.metric = pl_module.seen.update_count
            raise StopIteration

    losses = {"kd": KD()}
    module, callback = make(Existing(dropout=0.5), losses=losses)
    before = {**weights(module), "rng": torch.get_rng_state()}
    watcher = Watcher()
    with pytest.raises(StopIteration):
        fit(module, callback, watcher)
    assert_equal(watcher.state, before)
    assert watcher.metric == 0


def test_a_network_made_in_setup_or_configure_model_is_found() -> None:
    class Late(Existing):
        def __init__(self) -> None:
            super().__init__()
            self.net = None

        def setup(self, stage: str) -> None:
            self.net = network()

    class Latest(Late):
        setup = LightningModule.setup

        def configure_model(self) -> None:
            self.net = self.net or network()

    ends = []
    for kind in (Late, Latest):
        module, callback = make(kind())
        fit(module, callback)
        ends.append(weights(module.net))
    assert_equal(*ends)


class Shown(KD):
    """Notes which networks it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.networks: list[tuple[nn.Module, nn.Module]] = []

    def attach(self, student, teacher):
        self.networks.append((student, teacher))


def test_losses_are_shown_the_student_that_is_trained_and_not_its_copy() -> None:
    class Late(Existing):
        def __init__(self) -> None:
            super().__init__()
            self.net = None

        def setup(self, stage: str) -> None:
            self.net = network()

    class Partly(Existing):
        def __init__(self) -> None:
            super().__init__()
            self.net.head = None

        def configure_model(self) -> None:
            self.net.head = self.net.head or nn.Linear(8, 4)

    loss = Shown()
    module, callback = make(losses={"kd": loss})
    fit(module, callback)
    assert [(s is module.net, t is callback.teacher.network) for s, t in loss.networks] == [(True, True)]
    fit(module, callback)
    assert len(loss.networks) == 1
    other, _ = make()
    fit(other, callback)
    assert len(loss.networks) == 2
    assert loss.networks[-1][0] is other.net
    for kind in (Late, Partly):
        module, callback = make(kind(), losses={"kd": (loss := Shown())})
        fit(module, callback)
        assert [s is module.net for s, _ in loss.networks] == [False, True]  # the copy's outputs come before


def test_a_step_that_wants_a_running_training_is_no_obstacle(tmp_path: Path) -> None:
    class Curious(Existing):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.logger is not None:
                self.logger.log_metrics({"mine": float(loss.detach())})
            self.log("lr", self.optimizers().param_groups[0]["lr"])
            return loss

    class Recorder(CSVLogger):
        def log_metrics(self, metrics, step=None):
            mine.extend(x for name, x in metrics.items() if name == "mine")

    mine: list[float] = []
    fit(*make(Curious()), logger=Recorder(tmp_path))
    assert len(mine) == 4  # one a step, and none of the rehearsal


class Parts(LightningModule):
    """Never calls a network as a whole; its ``forward`` returns probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU()), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x)).softmax(-1)

    def training_step(self, batch, batch_idx):
        return {"loss": F.cross_entropy(self.head(self.body(batch["pixels"])), batch["kind"]), "more": 1}

    def validation_step(self, batch, batch_idx):
        self(batch["pixels"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def mappings(count: int = 32) -> DataLoader:
    return DataLoader([{"pixels": x, "kind": y} for x, y in zip(*samples(count), strict=True)], batch_size=8)


@pytest.mark.parametrize(
    "arguments",
    [lambda b: b["pixels"], lambda b: (b["pixels"],), lambda b: {"x": b["pixels"]}],
    ids=["t", "tuple", "map"],
)
def test_logits_of_a_layer_and_teacher_inputs_of_the_batch(arguments) -> None:
    options = {"student": "", "logits": "head", "teacher_inputs": arguments, "target": lambda batch: batch["kind"]}
    module, callback = make(Parts(), losses={"kd": KD(), "hint": Hint("body", "act")}, **options)
    it = trainer(callbacks=[callback], max_epochs=2, log_every_n_steps=1)
    it.fit(module, mappings(), mappings())
    assert {"train/loss/kd", "train/loss/hint", "val/agreement", "val/teacher_acc"} <= set(it.callback_metrics)
    assert it.callback_metrics["val/teacher_acc"] > 0.7


REFUSED = {
    "unknown student": ({"student": "nett"}, "Existing has no layer 'nett'.*nearest: net"),
    "unknown logits": ({"logits": "haed"}, "Network has no layer 'haed'.*nearest: head"),
    "unknown layer": ({"losses": {"hint": Hint("atc", "act")}}, r"student Network has no layer 'atc'.*act \(.*8\)"),
    "unknown teacher layer": (
        {"losses": {"hint": Hint("act", "atc")}},
        r"teacher Network has no layer 'atc'.*act \(2, 16\)",
    ),
    "other classes": ({"teacher": network(classes=7)}, "student has 4 classes and the teacher 7"),
    "teacher at chance": ({"teacher": network(seed=3, width=2)}, "teacher is at chance on this loader"),
    "module does not run": ({"student": ""}, r"the student \(the Existing itself\) did not run.*student=\"\.\.\.\""),
    "NaN": (
        {
            "teacher": network().apply(
                lambda m: nn.init.constant_(m.weight, float("nan")) if isinstance(m, nn.Linear) else 0
            )
        },
        "the losses give nan",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_first_step(options: dict[str, Any], message: str) -> None:
    module, callback = make(**options)
    before = weights(module)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        fit(module, callback, data=loader(256))
    assert_equal(weights(module), before)
    assert_left(module)


def refusal(step: Any, **options: Any) -> str:
    members = options.pop("members", {})
    module, callback = make(type("Other", (Existing,), {"training_step": step, **members})(), **options)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        fit(module, callback)
    assert_left(module)
    return str(caught.value)


def test_what_cannot_work_is_refused_with_the_remedy() -> None:
    def twice(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]) + self.net(-batch[0]), batch[1])

    def probabilities(self, batch, batch_idx):
        return F.nll_loss(self(batch[0]).log(), batch[1])

    def mean(self, batch):
        return self.missing(batch)

    def only_net(self):
        return torch.optim.SGD([{"params": [p]} for p in self.net.parameters()], lr=0.1)

    def two(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]

    step = Existing.training_step
    assert "the student ('net') ran several times in training_step" in refusal(twice)
    assert "'net.head'" not in refusal(twice, losses={"kd": KD()})
    message = refusal(probabilities, student="", losses={"kd": KD()})
    assert "expected logits from the student, got probabilities" in message
    assert 'logits="..."' in message
    assert "has no attribute 'missing'" in refusal(mean)
    assert "build it from self.parameters()" in refusal(step, members={"configure_optimizers": only_net})
    assert "automatic_optimization = False" in refusal(step, members={"configure_optimizers": two})
    manual = {"automatic_optimization": property(lambda self: False)}
    message = refusal(step, members=manual)
    assert "optimizes manually" in message
    assert 'DistillationObjective there, in one line, as the README shows under "Manual optimization"' in message


def test_outputs_that_would_train_nothing_or_the_wrong_thing_are_refused() -> None:
    def without_graph(self, batch, batch_idx):
        with torch.no_grad():
            self.net(batch[0])
        return F.cross_entropy(Network.forward(self.net, batch[0]), batch[1])

    message = refusal(without_graph, losses={"kd": KD()})
    assert "the student's outputs have no graph, expected losses on them to train it" in message
    message = refusal(Existing.training_step, losses={"kd": KD()}, logits=lambda output: output[:, 0])
    assert "logits have the shape (2,), expected one a class for each sample, (B, C)" in message


def test_the_objective_in_a_manual_step_trains_as_the_callback() -> None:
    class Automatic(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Manual(Automatic):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.distillation = DistillationObjective({"kd": KD(temperature=4.0)})

        def training_step(self, batch, batch_idx):
            optimizer, logits = self.optimizers(), self.net(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            loss = loss + self.distillation(Outputs(logits), Outputs(teacher(batch[0])), batch[1])[0]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    teacher, automatic, manual = good_teacher().eval().requires_grad_(False), Automatic(), Manual()
    fit(automatic, make(automatic, losses={"kd": KD(temperature=4.0)})[1], data=loader(), limit_val_batches=0)
    fit(manual, data=loader(), limit_val_batches=0)
    assert_equal(weights(automatic.net), weights(manual.net))


def test_a_distilled_module_is_not_distilled_again() -> None:
    module = DistillationModule(network(), good_teacher(), {"kd": KD()}, torch.optim.SGD)
    with pytest.raises(ValueError, match="distilled already"):
        fit(module, make(student="student", losses={"kd": KD()})[1])


def test_an_attribute_of_the_modules_is_not_overwritten() -> None:
    module, callback = make()
    module.distillation = 1
    with pytest.raises(ValueError, match="attribute 'distillation' of its own"):
        fit(module, callback)
    assert module.distillation == 1


def test_labels_that_are_missing_for_a_loss_are_named() -> None:
    data = DataLoader(list(zip(*samples(16), range(16), strict=True)), batch_size=8)

    class Triples(Existing):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

        validation_step = LightningModule.validation_step

    module, callback = make(Triples(), losses={"hard_label": HardLabel()})
    with pytest.raises(TypeError, match=r"got a list of 3: name the target, such as Distillation\(\.\.\., target=1\)"):
        fit(module, callback, data=data)
    fit(*make(Triples(), losses={"hard_label": HardLabel()}, target=lambda batch: batch[1]), data=data)
    fit(*make(Triples(), losses={"kd": KD()}), data=data)  # needs no labels


# In the step.


def test_the_teacher_sees_what_the_student_saw() -> None:
    class Augmenting(Existing):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0] + torch.randn_like(batch[0]), batch[1]), batch_idx)

    inputs: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    teacher = good_teacher()

    class Notes(Callback):
        def on_train_start(self, trainer, pl_module):
            for name, net in (("student", pl_module.net), ("teacher", teacher)):
                net.register_forward_hook(lambda _m, args, _o, name=name: inputs[name].append(args[0].clone()))

    fit(*make(Augmenting(), teacher=teacher), Notes(), limit_val_batches=0)
    assert len(inputs["student"]) == len(inputs["teacher"]) == 4
    assert all(torch.equal(s, t) for s, t in zip(inputs["student"], inputs["teacher"], strict=True))
    assert not torch.equal(inputs["student"][0][0], inputs["student"][1][0])


def test_a_student_that_runs_twice_later_on_is_refused() -> None:
    class Later(Existing):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (self.net(batch[0]).mean() if batch_idx == 2 else 0)

    module, callback = make(Later())
    with pytest.raises(RuntimeError, match=r"student \('net'\) ran several times in training_step, expected once"):
        fit(module, callback)
    assert_left(module)


def test_a_validation_step_that_calls_training_step_has_the_modules_own_loss() -> None:
    class Sharing(Existing):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.training_step(batch, batch_idx))
            self.log("val/own", F.cross_entropy(self.net(batch[0]), batch[1]))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    module, callback = make(Sharing(), losses={"kd": KD(weight=100.0)})
    logged = fit(module, callback).callback_metrics
    assert logged["val/loss"] == logged["val/own"]


def test_skipped_batches_and_mappings_pass_through() -> None:
    class Skipping(Existing):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "extra": 7} if batch_idx != 1 else None

    outputs = []

    class Notes(Callback):
        def on_train_batch_end(self, trainer, pl_module, result, batch, batch_idx):
            outputs.append(result)

    fit(*make(Skipping()), Notes())
    assert [bool(o) for o in outputs] == [True, False, True, True]
    assert outputs[0]["extra"] == 7


def test_unlabelled_samples_are_distilled_without_the_modules_loss() -> None:
    data = DataLoader(list(zip(samples(16)[0], torch.full((16,), -100), strict=True)), batch_size=8)
    module, callback = make(losses={"kd": KD()}, task_weight=0.0)  # the module's own loss is NaN here
    metrics = fit(module, callback, data=data, log_every_n_steps=1).callback_metrics
    assert metrics["train/loss/task"].isnan()
    assert metrics["train/loss"] == metrics["train/loss/kd"] > 0


def test_logged_names_and_values() -> None:
    module, callback = make(task_weight=0.5)
    schedule = TemperatureSchedule(linear(8.0, 1.0))
    metrics = fit(module, callback, schedule, log_every_n_steps=1).callback_metrics
    expected = {f"train/{kind}/{name}" for kind in ("loss", "loss_weighted") for name in ("kd", "hint", "task")}
    assert {*expected, "train/loss", "kd/temperature", "kd/teacher_entropy", "val/agreement"} <= set(metrics)
    total = sum(metrics[f"train/loss_weighted/{name}"] for name in ("kd", "hint", "task"))
    torch.testing.assert_close(metrics["train/loss"], total)
    torch.testing.assert_close(metrics["train/loss_weighted/task"], 0.5 * metrics["train/loss/task"])
    assert metrics["kd/temperature"] == 2.75  # 8 - 7 * 3/4
    x, y = samples(32, seed=5)
    teacher = good_teacher().eval()(x).argmax(-1)
    module.eval()
    torch.testing.assert_close(metrics["val/agreement"], (module.net(x).argmax(-1) == teacher).float().mean())
    torch.testing.assert_close(metrics["val/teacher_acc"], (teacher == y).float().mean())
    tested = trainer(callbacks=[callback]).test(module, loader(seed=5), verbose=False)[0]
    assert tested["test/agreement"] == pytest.approx(float(metrics["val/agreement"]))


@pytest.mark.parametrize("task_weight", [0.5, 0.0])
def test_which_term_drives_the_student_and_how_fast_it_goes_are_logged(tmp_path, task_weight: float) -> None:
    module, callback = make(task_weight=task_weight)
    fit(module, callback, log_every_n_steps=1, logger=CSVLogger(tmp_path))
    values = logged(tmp_path)
    driving = {f"train/grad_norm/{name}" for name in ("kd", "hint", *(["task"] if task_weight else []))}
    assert {name for name in values if name.startswith("train/grad_norm")} == driving
    assert all(list(values[name]) == [0] and values[name][0] > 0 for name in driving)
    assert list(values["train/samples_per_s"]) == [1, 2, 3]  # the first step's beginning is not known
    assert 0 < values["train/teacher_share"][3] < 1
    assert {"val/kl_teacher", "val/teacher_ece"} <= set(values)


def test_mixed_precision_accumulation_and_clipping() -> None:
    options = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    module, callback = make()
    fit(module, callback, max_epochs=2, **options)
    other, _ = make(task_weight=0.0)
    assert all(x.isfinite().all() for x in weights(module).values())
    assert module.net.head.weight.dtype == callback.objective.losses["hint"].projector.weight.dtype == torch.float32
    assert not torch.equal(module.net.head.weight, other.net.head.weight)


def test_bf16_true_moves_the_teacher_too() -> None:
    module, callback = make()
    metrics = fit(module, callback, precision="bf16-true", log_every_n_steps=1).callback_metrics
    assert callback.teacher.network.head.weight.dtype == torch.bfloat16
    assert metrics["train/loss/kd"].isfinite()


@pytest.mark.parametrize("whole", [False, True], ids=["net.compile()", "torch.compile(module)"])
def test_compiled_students_with_feature_layers_train_the_same(whole: bool) -> None:
    class Quiet(Existing):
        def training_step(self, batch, batch_idx):  # torch.compile(module) cannot follow self.log
            return F.cross_entropy(self.net(batch[0]), batch[1])

    ends = []
    for how in (None, "whole" if whole else "net"):
        module, callback = make(Quiet())
        if how == "net":
            module.net.compile(backend="aot_eager")
            module.net(samples(4)[0])  # compiled once before anything is tapped
        module.net.load_state_dict(network().state_dict())
        seed_everything(7, verbose=False)
        fit(torch.compile(module, backend="aot_eager") if how == "whole" else module, callback, max_epochs=2)
        ends.append(weights(module.net))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_a_moving_average_of_the_weights(tmp_path: Path) -> None:
    def average():
        return EMAWeightAveraging(decay=0.5)

    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, enable_version_counter=False)
    module, callback = make()
    fit(module, callback, average(), save, max_epochs=3, enable_checkpointing=True)
    assert_left(module)
    Existing.load_from_checkpoint(tmp_path / "epoch=2.ckpt")
    resumed, again = make()
    fit(resumed, again, average(), ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert_equal(weights(resumed.net), weights(module.net))
    with pytest.raises(ValueError, match="put Distillation before it in callbacks"):
        fit(make()[0], average(), callback)


SCRIPT = """
import sys, torch
from tests.callbacks.test_distillation import fit, make
from tests.tiny import loader

module, callback = make()
metrics = fit(module, callback, data=loader(64), strategy="ddp", devices=2, log_every_n_steps=1).callback_metrics
rank = module.global_rank
torch.save(
    {"net": module.net.state_dict(), "losses": callback.objective.state_dict(),
     "agreement": metrics["val/agreement"], "left": not hasattr(module, "distillation")},
    f"{sys.argv[1]}/{rank}.pt",
)
"""


@pytest.mark.integration
def test_two_processes_train_the_same_weights(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for part in ("net", "losses"):
        trained = {n: x for n, x in one[part].items() if "running" not in n}
        assert_equal(trained, {n: other[part][n] for n in trained})
    assert one["agreement"] == other["agreement"]
    assert one["left"]
    assert other["left"]
    assert not torch.equal(one["net"]["head.weight"], make()[0].net.head.weight)
