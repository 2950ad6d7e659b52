"""A moving average of the student teaches it, and is the same after a resume and in each process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Distillation, DistillationModule, load_student
from kd_lightning.losses import CATKD, KD, HardLabel, Hint
from kd_lightning.schedules import linear
from kd_lightning.tasks import Batch
from kd_lightning.teachers import Momentum
from tests.tiny import assert_equal, distillation, loader, network, samples, sgd, trainer, weights

ROOT = Path(__file__).parents[2]


class Existing(LightningModule):
    """Somebody's module; ``late`` makes the network when the Trainer asks for it, ``bare`` is a network itself."""

    def __init__(self, late: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.late, self.dropout = late, dropout
        self.net = nn.Identity() if late else network(dropout=dropout)

    def configure_model(self):
        if isinstance(self.net, nn.Identity):
            self.net = network(dropout=self.dropout)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return sgd(self.parameters())


def losses() -> dict[str, Any]:
    return {"kd": KD(2.0, weight=3.0)}


class Door:
    """One of the two ways to a training."""

    def __init__(self, kind: str, decay: Any = 0.8, dropout: float = 0.0) -> None:
        self.kind, self.teacher = kind, Momentum(decay)
        self.callbacks: list[Callback] = []
        if kind == "module":
            terms = {"hard_label": HardLabel(), **losses()}
            self.fitted: Any = distillation(network(dropout=dropout), self.teacher, losses=terms)
        else:
            self.fitted = Existing(late=kind == "late", dropout=dropout)
            name = "" if kind == "bare" else "net"
            self.callbacks = [Distillation(self.teacher, losses(), student=name)]

    def fit(self, data: DataLoader | None = None, ckpt_path: Any = None, callbacks: Any = (), **options: Any) -> Any:
        torch.manual_seed(0)
        self.trainer = trainer(callbacks=[*self.callbacks, *callbacks], **options)
        self.trainer.fit(self.fitted, data or loader(), loader(seed=5), ckpt_path=ckpt_path)
        return self

    def student(self) -> dict[str, Tensor]:
        return weights(self.fitted.student if self.kind == "module" else self.fitted.net)

    def average(self) -> dict[str, Tensor]:
        return {name.removeprefix("net."): x for name, x in weights(self.teacher.network).items()}


def parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[name] for name, _ in network().named_parameters()}


DOORS = pytest.mark.parametrize("kind", ["module", "callback", "late", "bare"])


def by_hand(decays: list[float], every: int = 1, epochs: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean teacher, written out: parameters and batch statistics averaged after each optimizer step."""
    student, average = network(), network().eval()
    optimizer, step = sgd(student.parameters()), 0
    batches = [batch for _ in range(epochs) for batch in loader()]
    for i, (x, y) in enumerate(batches):
        with torch.no_grad():
            p = (average(x) / 2).softmax(-1)
        z = student(x)
        divergence = (p * (p.log() - (z / 2).log_softmax(-1))).sum(-1).mean()
        ((nn.functional.cross_entropy(z, y) + 3 * 4 * divergence) / every).backward()
        if (i + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
            for name, mean in average.state_dict().items():
                now = student.state_dict()[name]
                mean.copy_(decays[step] * mean + (1 - decays[step]) * now if mean.is_floating_point() else now)
            step += 1
    return weights(student), weights(average)


@DOORS
def test_both_are_what_a_hand_written_loop_gives(kind: str) -> None:
    door = Door(kind).fit()
    student, average = by_hand([0.8] * 4)
    torch.testing.assert_close(door.student(), student, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(door.average(), average, rtol=1e-4, atol=1e-5)
    assert not torch.equal(average["head.weight"], student["head.weight"])


@DOORS
def test_it_moves_with_optimizer_steps_not_batches_and_its_decay_follows_a_schedule(kind: str) -> None:
    door = Door(kind, linear(0.0, 0.8)).fit(accumulate_grad_batches=2, max_epochs=2)
    student, average = by_hand([0.0, 0.2, 0.4, 0.6], every=2, epochs=2)
    torch.testing.assert_close(door.student(), student, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(door.average(), average, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_ends_are_the_student_itself_and_its_beginning(decay: float) -> None:
    door = Door("module", decay).fit()
    expected = door.student() if decay == 0 else weights(network())
    assert_equal(parameters(door.average()), parameters(expected))


def test_it_is_frozen_in_eval_mode_and_no_part_of_the_module() -> None:
    door = Door("module", dropout=0.5).fit()
    averaged = door.teacher.network
    x = Batch((samples(4)[0],), {}, None)
    averaged.train()
    assert torch.equal(door.teacher(x).logits, door.teacher(x).logits)
    assert not any(p.requires_grad for p in averaged.parameters())
    assert all(module is not averaged for module in door.fitted.modules())
    assert len(door.trainer.optimizers[0].param_groups[0]["params"]) == len(list(network().parameters()))


# What is saved


@DOORS
@pytest.mark.parametrize("when", ["epoch", "step"])
def test_a_resumed_training_gives_bitwise_what_an_uninterrupted_one_gives(kind: str, when: str, tmp_path: Path) -> None:
    decay = linear(0.5, 0.9)
    whole = Door(kind, decay, dropout=0.3).fit(max_epochs=3)
    every = {"every_n_epochs": 1} if when == "epoch" else {"every_n_train_steps": 4}
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **every)

    class Cut(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 9:
                raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        Door(kind, decay, dropout=0.3).fit(max_epochs=3, callbacks=[save, Cut()], enable_checkpointing=True)
    last = max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    resumed = Door(kind, decay, dropout=0.3).fit(max_epochs=3, ckpt_path=last)
    assert_equal(resumed.average(), whole.average())
    assert_equal(resumed.student(), whole.student())


def test_the_checkpoint_holds_the_plain_student_and_the_average_beside_it(tmp_path: Path) -> None:
    door = Door("module").fit()
    door.trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert_equal(load_student(tmp_path / "last.ckpt"), door.student())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    averaged = network(3)
    averaged.load_state_dict(saved["teacher"])
    assert_equal(weights(averaged), door.average())

    door = Door("callback").fit()
    door.trainer.save_checkpoint(tmp_path / "plain.ckpt")
    Existing().load_state_dict(torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"], strict=True)


def test_a_checkpoint_is_validated_against_its_average(tmp_path: Path) -> None:
    door = Door("module").fit()
    door.trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Door("module")
    scores = trainer().validate(again.fitted, loader(seed=5), ckpt_path=tmp_path / "last.ckpt")
    x = samples(32, seed=5)[0]
    student, average = network(), network()
    student.load_state_dict(door.student())
    average.load_state_dict(door.average())
    same = student.eval()(x).argmax(-1) == average.eval()(x).argmax(-1)
    assert scores[0]["val/agreement"] == pytest.approx(same.float().mean().item())


@pytest.mark.parametrize("kind", ["module", "callback"])
def test_without_a_training_there_is_nothing_to_agree_with(kind: str) -> None:
    door = Door(kind)
    trainer(callbacks=door.callbacks).validate(door.fitted, loader(seed=5))
    assert "val/agreement" not in (door.trainer.callback_metrics if hasattr(door, "trainer") else {})


@pytest.mark.parametrize("kind", ["module", "callback"])
def test_a_second_fit_goes_on_with_it_and_another_student_begins_anew(kind: str) -> None:
    door = Door(kind, 1.0).fit()
    assert_equal(parameters(door.fit().average()), parameters(weights(network())))
    other = Door(kind)
    if kind == "module":
        other.fitted = distillation(network(7), door.teacher, losses=losses())
    else:
        other.callbacks, other.fitted.net = door.callbacks, network(7)
    other.teacher = door.teacher
    assert_equal(parameters(other.fit().average()), parameters(weights(network(7))))


# Precision and processes


def test_half_precision_weights_are_averaged_in_float32() -> None:
    """With a decay near 1, each step is too small for bfloat16 to show."""
    student = nn.Linear(2, 2, bias=False).bfloat16()
    nn.init.ones_(student.weight)
    teacher = Momentum(0.999)
    teacher.start(student)
    nn.init.constant_(student.weight, 2.0)
    for _ in range(1000):
        teacher.after_step(student, 0.0)
    expected = 2 - 0.999**1000
    assert teacher.network.weight.dtype == torch.bfloat16
    assert teacher.network.weight[0, 0].item() == pytest.approx(expected, rel=4e-3)
    assert teacher.state_dict()["weight"][0, 0].item() == pytest.approx(expected, rel=1e-4)
    other = Momentum(0.999)
    other.prepare(student)
    other.load_state_dict(teacher.state_dict())
    for each in (teacher, other):
        each.after_step(student, 0.0)
    assert_equal(other.state_dict(), teacher.state_dict())
    teacher.to(torch.device("cpu"), torch.float32)
    assert_equal(weights(teacher.network), other.state_dict())


@pytest.mark.parametrize("kind", ["module", "callback"])
def test_a_training_in_bfloat16_learns_nearly_the_same(kind: str) -> None:
    half, full = Door(kind).fit(precision="bf16-true"), Door(kind).fit()
    assert half.average()["head.weight"].dtype == torch.bfloat16
    floats = {name: x for name, x in full.average().items() if x.is_floating_point()}
    torch.testing.assert_close({n: half.average()[n].float() for n in floats}, floats, rtol=0.1, atol=0.06)


SCRIPT = """
import sys, torch, tests.teachers.test_momentum as t

folder, kind = sys.argv[1:]
door = t.Door(kind)
rank = int(__import__("os").environ.get("LOCAL_RANK", 0))
if rank:  # what is not the first process's is not to count
    torch.nn.init.ones_((door.fitted.student if kind == "module" else door.fitted.net).head.weight)
door.fit(t.data(32), devices=2, strategy="ddp", max_epochs=3)
torch.save({"average": door.average(), "student": door.student()}, f"{folder}/rank{door.trainer.global_rank}.pt")
"""


def data(batch_size: int) -> DataLoader:
    return DataLoader(TensorDataset(*samples(64)), batch_size=batch_size)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["module", "callback"])
def test_all_processes_have_the_same_one(kind: str, tmp_path: Path) -> None:
    """Batch statistics, too, which differ between processes after each forward pass."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, tmp_path, kind], check=True, timeout=180, env=environment, cwd=tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_equal(ranks[0]["average"], ranks[1]["average"])
    assert not torch.equal(ranks[0]["average"]["head.weight"], ranks[0]["student"]["head.weight"])
    assert not torch.equal(ranks[0]["average"]["head.weight"], network().head.weight)


# What is logged, and refused


@pytest.mark.parametrize("kind", ["module", "callback"])
def test_it_is_not_judged_before_training_and_scored_in_each_validation(kind: str) -> None:
    """The student begins at chance; see :func:`test_a_teacher_at_chance_is_refused` of the batches' outputs."""
    scores = []

    class Look(Callback):
        def on_validation_end(self, trainer, pl_module) -> None:
            if not trainer.sanity_checking:
                scores.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")})

    door = Door(kind, 0.5).fit(data(16), max_epochs=3, callbacks=[Look()])
    assert len(scores) == 3
    x, y = samples(32, seed=5)
    average = network()
    average.load_state_dict(door.average())
    hits = average.eval()(x).argmax(-1) == y
    assert scores[-1]["val/teacher_acc"] == pytest.approx(hits.float().mean().item())
    assert len({score["val/teacher_acc"] for score in scores}) > 1
    assert all("val/agreement" in score for score in scores)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"expected a decay in \[0, 1\], got"):
        Momentum(decay)
    with pytest.raises(ValueError, match=r"expected a decay in \[0, 1\], got"):
        Door("module", lambda progress: decay).fit()


@pytest.mark.parametrize("kind", ["module", "callback"])
def test_a_schedule_needs_the_length_of_the_training(kind: str) -> None:
    with pytest.raises(ValueError, match="a schedule needs the number of optimizer steps, got an unknown one"):
        Door(kind, linear(0.5, 0.9)).fit(max_epochs=-1)


def test_losses_that_look_into_the_teacher_are_refused() -> None:
    """They take what they read from it once, before it has learnt anything."""
    terms = {"cat": CATKD("act", student_classifier="head")}
    with pytest.raises(ValueError, match=r"losses \['cat'\] look into the teacher's network, .*got Momentum"):
        distillation(teacher=Momentum(), losses=terms)
    with pytest.raises(ValueError, match=r"losses \['cat'\] look into the teacher's network, .*got Momentum"):
        Distillation(Momentum(), terms, student="net")


def test_the_copy_gives_its_logits_where_the_student_does() -> None:
    callback = Distillation(Momentum(), losses(), student="net", logits="head", check_teacher=False)
    door = Door("callback")
    door.callbacks = [callback]
    door.fit()
    batch = Batch((torch.zeros(2, 6),), {}, None)
    assert callback.teacher(batch).logits.shape == (2, 4)
    with pytest.raises(ValueError, match="leave teacher_logits= out"):
        Distillation(Momentum(), losses(), student="net", teacher_logits="head")


@pytest.mark.parametrize("kind", ["module", "callback"])
def test_a_checkpoint_without_an_average_is_refused(kind: str, tmp_path: Path) -> None:
    door = Door(kind)
    if kind == "module":
        door.fitted.teacher = None
        door.fitted = distillation(losses={"hard_label": HardLabel(), **losses()})
    else:
        door.callbacks = [Distillation(network(3), losses(), student="net", check_teacher=False)]
    door.fit().trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(
        ValueError, match="moving average does not fit Momentum: it holds none; resume with the teacher"
    ):
        Door(kind).fit(ckpt_path=tmp_path / "last.ckpt", max_epochs=2)


def test_a_student_that_is_changed_in_training_is_refused() -> None:
    class Change(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            pl_module.student.head = nn.Linear(8, 4, bias=False)

    with pytest.raises(ValueError, match=r"the student's 'head.bias' is not what it was when its average began"):
        Door("module").fit(callbacks=[Change()])


def test_layers_can_be_read() -> None:
    module: DistillationModule = distillation(network(), Momentum(0.5), losses={"hint": Hint("act"), "kd": KD()})
    trainer().fit(module, loader())
    assert not torch.equal(module.student.head.weight, network().head.weight)
