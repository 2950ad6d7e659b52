"""Texts that the student or the teacher writes during a training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule, Teacher
from kd_lightning.callbacks import OnPolicy, SequenceLevel
from kd_lightning.data import WithIds
from kd_lightning.losses import DistillationLoss, ForwardKL, HardLabel, ReverseKL
from kd_lightning.models import GPT
from kd_lightning.outputs import Outputs
from kd_lightning.schedules import linear
from kd_lightning.tasks import Batch, LanguageModelling
from kd_lightning.teachers import Momentum
from kd_lightning.writing import write
from tests.tiny import sgd, trainer

VOCABULARY, LENGTH = 7, 8


def gpt(seed: int = 0, dropout: float = 0.0) -> GPT:
    torch.manual_seed(seed)
    return GPT(VOCABULARY, LENGTH, 1, 2, 8, dropout)


def texts() -> TensorDataset:
    longer = torch.randint(VOCABULARY, (24, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    target = longer[:, 1:].clone()
    target[0, 6:] = -100
    return TensorDataset(longer[:, :-1], target)


def module(losses: Any = None, student: nn.Module | None = None, teacher: Any = "live") -> DistillationModule:
    return DistillationModule(
        gpt(1) if student is None else student,
        Teacher(gpt(2)) if teacher == "live" else teacher,
        {"kl": ReverseKL()} if losses is None else losses,
        sgd,
        task=LanguageModelling(),
        check_teacher=False,
    )


class Sees(DistillationLoss):
    """Takes down what it is computed on."""

    needs_teacher = False

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[Tensor] = []

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        if self.training:
            self.targets.append(target)
        return student.logits.square().mean()


def fitted(callback: Any, made: DistillationModule, data: Any = None, **options: Any) -> Any:
    loader = DataLoader(texts() if data is None else data, batch_size=8)
    fit = trainer(callbacks=[callback, *options.pop("callbacks", [])], **{"max_epochs": 1, **options})
    fit.fit(made, loader)
    return fit


def test_a_share_of_one_has_each_text_written_by_the_student_and_of_none_no_one() -> None:
    plain, seen = texts().tensors[1], {}
    for share in (0.0, 1.0):
        loss = Sees()
        fitted(OnPolicy(share), module({"kl": ForwardKL(), "sees": loss}))
        seen[share] = torch.cat(loss.targets)
    assert torch.equal(seen[0.0], plain)
    written = seen[1.0]
    assert torch.equal(written == -100, plain == -100)
    # Half of the 8 tokens are kept: the targets of the first three are the text's own.
    assert torch.equal(written[:, :3], plain[:, :3])
    assert (written[:, 3:] != plain[:, 3:]).float().mean() > 0.5


def test_the_networks_get_the_written_text_and_its_next_tokens() -> None:
    made, callback = module(), OnPolicy(1.0)
    made._trainer = trainer()
    made.trainer.fit_loop.max_epochs = 1
    tokens, target = texts().tensors
    torch.manual_seed(5)
    batch = Batch((tokens,), {}, target)
    progress_of = pytest.MonkeyPatch()
    progress_of.setattr("kd_lightning.callbacks.written_texts.progress", lambda _: 0.0)
    progress_of.setattr("kd_lightning.callbacks.written_texts.logs_this_step", lambda _: False)
    with progress_of.context():
        found = callback._rewrite(made, batch)
    progress_of.undo()
    torch.manual_seed(5)
    torch.rand(())
    expected = write(made.student, tokens[:, :4], torch.rand(24, 5))
    assert torch.equal(found.args[0], expected[:, :-1])
    assert torch.equal(found.target[1:], expected[1:, 1:])
    assert torch.equal(tokens, texts().tensors[0])  # the data set's own are left alone


def test_a_scheduled_share_is_logged_and_decides_how_many_texts_are_written() -> None:
    loss = Sees()
    made = module({"kl": ForwardKL(), "sees": loss})
    fit = fitted(OnPolicy(linear(0.0, 1.0)), made, max_epochs=40, log_every_n_steps=1)
    assert 0.9 < float(fit.callback_metrics["kd/on_policy_share"]) < 1
    plain = texts().tensors[1].split(8)
    changed = [not torch.equal(target, plain[i % 3]) for i, target in enumerate(loss.targets)]
    assert sum(changed[:40]) < 20 < sum(changed[-40:])


def test_a_resumed_training_writes_the_same_texts(tmp_path: Path) -> None:
    def weights(callback: Any, epochs: int, start: Path | None = None) -> Any:
        torch.manual_seed(3)
        made = module(
            {"kl": ReverseKL()} if isinstance(callback, OnPolicy) else {"hard_label": HardLabel()}, gpt(1, 0.1)
        )
        data, saved = (
            WithIds(texts()),
            ModelCheckpoint(tmp_path, f"{type(callback).__name__}-{epochs}", save_last=False),
        )
        fit = trainer(callbacks=[callback, saved], max_epochs=epochs, enable_checkpointing=True)
        fit.fit(made, DataLoader(data, batch_size=8), ckpt_path=start, weights_only=True if start else None)
        return made.student.state_dict(), Path(saved.best_model_path)

    for make in (lambda: OnPolicy(0.5), SequenceLevel):
        whole, _ = weights(make(), 4)
        _, checkpoint = weights(make(), 2)
        resumed, _ = weights(make(), 4, checkpoint)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_teacher_writes_each_text_once() -> None:
    loss, made, callback = Sees(), module({"hard_label": HardLabel()}), SequenceLevel()
    made.objective.losses["sees"] = loss
    fitted(callback, made, WithIds(texts()), max_epochs=2)
    first, second = torch.cat(loss.targets[:3]), torch.cat(loss.targets[3:])
    assert torch.equal(first, second)
    assert torch.equal(first[:, :3], texts().tensors[1][:, :3])
    assert callback._written is not None
    assert bool(callback._written.all())
    # By the teacher: its own texts are likelier to it than the data set's.
    task, teacher = LanguageModelling(), made.teacher.network
    tokens = torch.cat([texts().tensors[0][:, :1], first.clamp_min(0)[:, :-1]], 1)
    bits = [task.headline.value(task.scores(Outputs(teacher(x)), y)) for x, y in ((tokens, first), texts().tensors)]
    assert bits[0] < bits[1]


def test_another_seed_writes_another_text() -> None:
    found = []
    for seed in (0, 0, 1):
        loss = Sees()
        fitted(SequenceLevel(seed=seed), module({"hard_label": HardLabel(), "sees": loss}), WithIds(texts()))
        found.append(torch.cat(loss.targets))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_mapping_with_padding_at_its_end_is_written_on() -> None:
    loss, tokens = Sees(), texts().tensors[0]
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0

    class Mapped(GPT):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Any = None) -> Tensor:
            return super().forward(input_ids, cache)

    torch.manual_seed(0)
    student, teacher = Mapped(VOCABULARY, LENGTH, 1, 2, 8), Mapped(VOCABULARY, LENGTH, 1, 2, 8)
    data = [{"input_ids": tokens[i], "attention_mask": mask[i]} for i in range(24)]
    fitted(OnPolicy(1.0), module({"kl": ForwardKL(), "sees": loss}, student, Teacher(teacher)), data)
    target = torch.cat(loss.targets)
    assert bool((target[1, 4:] == -100).all())
    assert bool((target[0, :7] >= 0).all())
    assert bool((target[:, 7] == -100).all())


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        (
            OnPolicy(),
            {"losses": {"kl": ForwardKL(), "hard_label": HardLabel()}},
            r"losses \['hard_label'\] read labels",
        ),
        (OnPolicy(), {"teacher": Momentum()}, "expected a teacher that runs beside the student.*got Momentum"),
        (SequenceLevel(), {"losses": {"hard_label": HardLabel()}, "teacher": None}, "got none: take teachers=live"),
        (OnPolicy(linear(0.0, 2.0)), {}, "expected share from 0 to 1.*got 1.0"),
        (SequenceLevel(), {}, "does not say which samples it holds: put kd_lightning.data.WithIds"),
    ],
)
def test_what_cannot_be_is_an_error_before_the_first_step(callback: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(callback, module(**options))


def test_a_module_that_reads_its_batch_itself_is_refused() -> None:
    class Own(LightningModule):
        def training_step(self, batch: Any) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(ValueError, match="OnPolicy changes the batch that the networks get, which Own reads itself"):
        fitted(OnPolicy(), Own())  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"prompt": 0.0}, {"prompt": 1.0}, {"temperature": 0.0}])
def test_settings_out_of_range_are_refused(options: Any) -> None:
    for make in (OnPolicy, SequenceLevel):
        with pytest.raises(ValueError, match=f"expected {next(iter(options))}"):
            make(**options)
    with pytest.raises(ValueError, match="expected share from 0 to 1"):
        OnPolicy(1.5)
