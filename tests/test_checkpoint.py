"""A checkpoint is the bare student, no file runs code, and a resumed training is the uninterrupted one, bit by bit."""

import os
import pickle
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DistributedSampler, TensorDataset

from kd_lightning import DistillationModule, Teacher, load_student
from kd_lightning.callbacks import HyperparameterSchedule, TemperatureSchedule
from kd_lightning.checkpoint import Unread, load_checkpoint, load_weights
from kd_lightning.losses import KD, HardLabel, Hint
from kd_lightning.schedules import linear, warmup
from tests.tiny import assert_equal, distillation, good_teacher, loader, network, samples, sgd, trainer, weights


@pytest.fixture
def trained(tmp_path: Path) -> tuple[DistillationModule, Path]:
    module = distillation(losses={"kd": KD(), "hint": Hint("stem")})
    fit = trainer()
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "student.ckpt")
    return module, tmp_path / "student.ckpt"


def test_a_checkpoint_is_the_bare_student(trained) -> None:
    module, path = trained
    plain = network(seed=5)
    plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    assert_equal(weights(plain), weights(module.student))
    assert_equal(load_student(path), weights(module.student))


def test_the_losses_parameters_are_beside_it(trained) -> None:
    module, path = trained
    losses = torch.load(path, weights_only=True)["losses"]
    assert_equal(losses, weights(module.objective))
    assert set(losses) == {"losses.hint.projector.weight", "losses.hint.projector.bias"}


def test_neither_the_teacher_nor_anything_of_its_size_is_in_the_file(trained) -> None:
    module, path = trained
    content = torch.load(path, weights_only=True)

    def tensors(part: object) -> list[torch.Tensor]:
        if isinstance(part, torch.Tensor):
            return [part]
        children = part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()
        return [tensor for child in children for tensor in tensors(child)]

    theirs = {tuple(value.shape) for value in module.teacher.network.parameters()}
    own = {tuple(value.shape) for value in (*module.student.parameters(), *module.objective.parameters())}
    assert not (theirs - own) & {tuple(tensor.shape) for tensor in tensors(content)}


def test_load_from_checkpoint_gives_the_student_without_a_trainer(trained) -> None:
    module, path = trained
    loaded = DistillationModule.load_from_checkpoint(
        path,
        student=network(seed=5),
        teacher=Teacher(good_teacher()),
        losses={"kd": KD(), "hint": Hint("stem")},
        optimizer=sgd,
    )
    assert_equal(weights(loaded.student), weights(module.student))


def test_validate_and_test_read_the_file(trained) -> None:
    module, path = trained
    other = distillation(network(seed=5), losses={"kd": KD(), "hint": Hint("stem")})
    (scores,) = trainer().validate(other, loader(), ckpt_path=path, verbose=False)
    assert_equal(weights(other.student), weights(module.student))
    (expected,) = trainer().validate(module, loader(), verbose=False)
    assert scores == expected


def test_a_network_is_loaded_from_a_file_in_one_line(trained) -> None:
    module, path = trained
    net = network(seed=5)
    load_weights(net, path)
    assert_equal(weights(net), weights(module.student))


class Wrapped(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"net": good_teacher(), "probe": nn.Linear(2, 2)})

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.inner["net"](batch[0]), batch[1])

    def configure_optimizers(self):
        return sgd(self.parameters())


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_teacher_comes_from_anybodys_lightning_checkpoint_under_any_prefix(tmp_path, weights_only: bool) -> None:
    module, fit = Wrapped(), trainer()
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "theirs.ckpt", weights_only=weights_only)
    teacher = Teacher(network(width=16), tmp_path / "theirs.ckpt")
    assert_equal(weights(teacher.network), weights(module.inner["net"]))


def test_a_student_becomes_the_next_teacher(trained) -> None:
    module, path = trained
    assert_equal(weights(Teacher(network(seed=5), path).network), weights(module.student))


# Files that do not fit


def test_a_mismatch_names_what_differs_and_loads_nothing(tmp_path) -> None:
    torch.save(network(classes=7).state_dict(), tmp_path / "seven.pt")
    net = network(classes=4)
    before = weights(net)
    with pytest.raises(
        ValueError, match=r"head\.weight: \(7, 8\) in the file, \(4, 8\) in the network.*number of classes"
    ):
        load_weights(net, tmp_path / "seven.pt")
    assert_equal(weights(net), before)


def test_missing_and_surplus_names_are_named(tmp_path) -> None:
    state = network().state_dict()
    state["extra.weight"] = state.pop("stem.weight")
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"missing stem\.weight; unexpected extra\.weight; expected a checkpoint of this"
    ):
        load_weights(network(), tmp_path / "other.pt")


def test_long_lists_of_names_are_cut(tmp_path) -> None:
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"missing stem\.weight, stem\.bias, norm\.weight and 6 more; unexpected other;"
    ):
        load_weights(network(), tmp_path / "other.pt")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_torn_file_is_refused(tmp_path, share: float, legacy: bool) -> None:
    path = tmp_path / "torn.ckpt"
    torch.save({"state_dict": network().state_dict()}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        ValueError, match=r"torn\.ckpt cannot be read as a checkpoint: .*is it damaged, or of another program"
    ):
        load_student(path)


@pytest.mark.parametrize("first", [1, 5, 22])
def test_every_flipped_bit_that_changes_a_weight_is_named(tmp_path, first: int) -> None:
    path = tmp_path / "flipped.ckpt"
    torch.save({"state_dict": network().state_dict()}, path)
    whole, expected = path.read_bytes(), weights(network())
    said = []
    for position in range(first, len(whole), 23):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(bytes(damaged))
        try:
            found = load_student(path)
        except ValueError as error:
            said.append(str(error))
        else:  # in what fills up the file
            assert_equal(found, expected)
    assert len(said) > 30
    assert all("flipped.ckpt cannot be read as a checkpoint" in text and "\n" not in text for text in said)


@pytest.mark.parametrize(
    "content", [b"hello", b"\x89PNG\r\n\x1a\n" + bytes(99), b"<html></html>", bytes(1000), b"{}\n"]
)
def test_a_file_of_another_program_is_refused(tmp_path, content: bytes) -> None:
    (tmp_path / "other.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.ckpt cannot be read as a checkpoint"):
        load_student(tmp_path / "other.ckpt")


class Touch:
    """Unpickled, it makes a file: what a malicious checkpoint does, with a worse command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_brings_code_is_refused_and_its_code_not_run(tmp_path) -> None:
    victim = tmp_path / "victim"
    torch.save({"state_dict": network().state_dict(), "hyper_parameters": Touch(victim)}, tmp_path / "evil.ckpt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"state_dict": Touch(victim)}))
    for name, text in {
        "evil.ckpt": "it holds posix.mkdir, and reading that could run any code",
        "evil.pkl": "",
    }.items():
        with pytest.raises(ValueError, match=rf"{name} cannot be read as a checkpoint: {text}") as caught:
            Teacher(network(), tmp_path / name)
        assert "weights_only" not in str(caught.value)  # PyTorch's advice is to read it without
        assert "\n" not in str(caught.value)
    assert not victim.exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)  # it would have worked
    assert victim.exists()


def make(path: str) -> None:
    Path(path).mkdir()


class Scaler:
    """A hyperparameter as other people's modules have: an object with arrays and a class; unpickled, this one acts."""

    def __init__(self, path: Path) -> None:
        self.mean, self.kind, self.acting = np.ones(3), Path, Acting(path)


class Acting(Touch):
    def __reduce__(self):
        return make, (str(self.path),)


def test_hyperparameters_of_other_classes_are_passed_over_and_their_code_not_run(tmp_path) -> None:
    path, victim, expected = tmp_path / "theirs.ckpt", tmp_path / "victim", network(seed=3).state_dict()
    torch.save({"state_dict": expected, "hyper_parameters": {"scaler": Scaler(victim), "width": 8}}, path)
    assert_equal(load_student(path), expected)
    assert_equal(weights(Teacher(network(), path).network), expected)
    found = load_checkpoint(path)["hyper_parameters"]
    assert isinstance(found["scaler"], Unread)
    assert found["width"] == 8
    with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):
        torch.load(path, weights_only=True)  # what PyTorch allows is as it was
    assert not victim.exists()
    torch.load(path, weights_only=False)  # it would have worked
    assert victim.exists()

    for content, named in (({"state_dict": {**expected, "scaler": Scaler(victim)}}, "Scaler"), (network(), "Network")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"theirs\.ckpt holds \S+\.{named} in the place of weights, and reading"):
            load_student(path)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": 3}, {"epoch": 3}, torch.ones(2)])
def test_a_file_without_weights_is_refused(tmp_path, content: object) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt holds no state dict"):
        load_student(tmp_path / "other.pt")


def test_a_missing_file_is_a_missing_file(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt"):
        load_student(tmp_path / "nothing.ckpt")


# Resume

EPOCHS = 3


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.02)


def whole(optimizer=sgd, **options) -> DistillationModule:
    """Everything that has a state: dropout, batch statistics, a projector, schedules, momentum, a learning rate."""
    return distillation(
        network(dropout=0.3),
        losses={"hard_label": HardLabel(0.3), "kd": KD(4.0, weight=0.7), "hint": Hint("stem", weight=0.1)},
        optimizer=optimizer,
        scheduler=partial(OneCycleLR, max_lr=0.1),
        **options,
    )


def shuffled(kind: str):
    data = TensorDataset(*samples(44))
    if kind == "sampler":  # Lightning calls its set_epoch
        return loader(44, sampler=DistributedSampler(data, num_replicas=1, rank=0, seed=3))
    return loader(44, shuffle=True)


def run(kind: str, folder: Path, optimizer=sgd, every: int = 1, resume: Path | None = None, seed: int = 7, **options):
    """Train with a checkpoint after each epoch; another seed and other initial weights must not matter to a resume."""
    seed_everything(seed)
    module = whole(optimizer)
    module.student.load_state_dict(network(seed=seed).state_dict())
    save = options.pop("save", {"every_n_epochs": 1})
    callbacks = [
        ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **save),
        TemperatureSchedule(linear(8.0, 1.0)),
        HyperparameterSchedule("losses.hint.weight", warmup(0.5, duration=0.4)),
        *options.pop("callbacks", []),
    ]
    options = {"max_epochs": EPOCHS, **options}
    fit = trainer(callbacks=callbacks, enable_checkpointing=True, accumulate_grad_batches=every, **options)
    val = loader(20, seed=4) if options.get("limit_val_batches", 1.0) else None
    fit.fit(module, shuffled(kind), val, ckpt_path=resume, weights_only=True if resume else None)
    return module, fit


def state(module: DistillationModule) -> dict[str, torch.Tensor]:
    return {**weights(module.student), **weights(module.objective)}


def moments(fit) -> list:
    return [list(group.values()) for group in fit.optimizers[0].state_dict()["state"].values()]


AFTER_THE_EPOCH = {"every_n_epochs": 1}
AFTER_THE_VALIDATION = {"every_n_epochs": 1, "save_on_train_epoch_end": False}
AFTER_THE_LAST_BATCH = {"every_n_train_steps": 6}  # 44 samples in batches of 8


def assert_resumes_exactly(kind: str, folder: Path, **options) -> None:
    straight, fit = run(kind, folder / "whole", **options)
    *checkpoints, last = sorted((folder / "whole").glob("*.ckpt"), key=os.path.getmtime)
    assert len(checkpoints) >= EPOCHS - 1
    for checkpoint in checkpoints:
        resumed, again = run(kind, folder / checkpoint.stem, resume=checkpoint, seed=8, **options)
        assert again.global_step == fit.global_step
        assert_equal(state(resumed), state(straight))
        torch.testing.assert_close(moments(again), moments(fit), rtol=0, atol=0)
        assert again.lr_scheduler_configs[0].scheduler.last_epoch == fit.global_step
        # So are the checkpoints that it writes itself.
        assert_equal(load_student(folder / checkpoint.stem / last.name), load_student(last))


@pytest.mark.parametrize("kind", ["sampler", "shuffle"])
@pytest.mark.parametrize("save", [AFTER_THE_EPOCH, AFTER_THE_VALIDATION, AFTER_THE_LAST_BATCH])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, kind: str, save: dict) -> None:
    assert_resumes_exactly(kind, tmp_path, save=save)


@pytest.mark.parametrize("save", [AFTER_THE_EPOCH, AFTER_THE_VALIDATION, AFTER_THE_LAST_BATCH])
def test_so_it_is_when_its_length_is_given_in_steps(tmp_path, save: dict) -> None:
    assert_resumes_exactly("sampler", tmp_path, save=save, max_epochs=-1, max_steps=6 * EPOCHS)


@pytest.mark.parametrize("kind", ["sampler", "shuffle"])
@pytest.mark.parametrize("validation", [1.0, 0])
def test_so_it_is_with_adam_and_accumulated_gradients(tmp_path, kind: str, validation: float) -> None:
    assert_resumes_exactly(kind, tmp_path, optimizer=adam, every=2, limit_val_batches=validation)


def test_the_generators_of_numpy_and_python_go_on_where_they_were(tmp_path) -> None:
    fit, module = trainer(), distillation()
    seed_everything(3)
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    expected = (np.random.rand(3), random.random())
    seed_everything(4)
    seen = []

    class Draw(Callback):
        def on_train_batch_start(self, *_) -> None:
            seen.append((np.random.rand(3), random.random()))

    again = trainer(max_epochs=2, limit_train_batches=1, callbacks=[Draw()])
    again.fit(distillation(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert seen[0][0].tolist() == expected[0].tolist()
    assert seen[0][1] == expected[1]


def test_another_seed_gives_other_weights(tmp_path) -> None:
    """Otherwise the test above could not fail."""
    one, other = run("sampler", tmp_path / "a")[0], run("sampler", tmp_path / "b", seed=8)[0]
    assert not torch.equal(one.student.stem.weight, other.student.stem.weight)


def test_a_checkpoint_that_does_not_fit_is_refused_before_the_first_step(trained) -> None:
    _, path = trained
    wider = distillation(network(width=9), losses={"kd": KD(), "hint": Hint("stem")})
    before, fit = weights(wider.student), trainer(max_epochs=2)
    with pytest.raises(
        ValueError, match=r"does not fit the student Network: of another shape stem\.weight: \(8, 6\) in"
    ):
        fit.fit(wider, loader(), ckpt_path=path)
    assert fit.global_step == 0
    assert_equal(weights(wider.student), before)
