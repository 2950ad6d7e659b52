"""A LightningModule as it came with somebody else's package: chemprop's message-passing network on molecules.

Its ``training_step`` never calls ``forward``, and ``forward`` returns probabilities. Runs where chemprop is installed:
``pip install -c tests/constraints.txt -e '.[test,test-integrations]'``.
"""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from kd_lightning import Distillation, Teacher
from kd_lightning.callbacks import QuantizationAwareTraining, TemperatureSchedule
from kd_lightning.losses import KD, Hint
from kd_lightning.quantization import float_weights, quantized_share
from kd_lightning.schedules import linear
from tests.third_party import Observer
from tests.tiny import assert_equal, trainer, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # theirs
]
pytest.importorskip("chemprop", reason="chemprop is not installed: pip install -e '.[test-integrations]'")

from chemprop import data, models  # noqa: E402
from chemprop import nn as chemprop_nn  # noqa: E402

# Chains of carbon, by what is at their end: an alcohol, an amine, a chloride.
ENDS = ("O", "N", "Cl")


def molecules(batch_size: int = 16):
    points = [
        data.MoleculeDatapoint.from_smi(middle * length + start * (length % 2) + end, [float(label)])
        for length in range(1, 13)
        for middle in ("C", "CC(C)")
        for start in ("", "C")
        for label, end in enumerate(ENDS)
    ]
    return data.build_dataloader(data.MoleculeDataset(points), batch_size=batch_size, shuffle=False)


def network(width: int, seed: int = 0, **options) -> models.MPNN:
    seed_everything(seed, verbose=False)
    return models.MPNN(
        chemprop_nn.BondMessagePassing(d_h=width, depth=3),
        chemprop_nn.MeanAggregation(),
        chemprop_nn.MulticlassClassificationFFN(n_classes=len(ENDS), input_dim=width, hidden_dim=width),
        **options,
    )


class Logits(nn.Module):
    """The teacher's logits, which its ``forward`` does not give."""

    def __init__(self, module: models.MPNN) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs) -> Tensor:
        return self.module.predictor.ffn(self.module.fingerprint(*inputs))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    module = network(64, init_lr=1e-3, max_lr=5e-3, final_lr=1e-3)
    trainer(max_epochs=15).fit(module, molecules())
    return Teacher(Logits(module))


def distillation(teacher: Teacher, **losses) -> Distillation:
    return Distillation(
        teacher,
        losses,
        logits="predictor.ffn",
        teacher_inputs=lambda batch: (batch.bmg, batch.V_d, batch.X_d),
        target=lambda batch: batch.Y[:, 0].long(),
        task_weight=0.0,
    )


def test_it_learns_from_its_teacher_and_its_checkpoint_stays_its_own(teacher: Teacher, tmp_path: Path) -> None:
    student = network(32, init_lr=1e-3, max_lr=5e-3, final_lr=1e-3)
    names, before = list(student.state_dict()), weights(student)
    callback = distillation(teacher, kd=KD(), hint=Hint("agg", "module.agg"))
    save = ModelCheckpoint(tmp_path, save_last=True)
    it = trainer(
        callbacks=[callback, TemperatureSchedule(linear(4.0, 1.0)), save], max_epochs=20, enable_checkpointing=True
    )
    it.fit(student, molecules(), molecules())
    assert float(it.callback_metrics["val/teacher_acc"]) > 0.9
    assert float(it.callback_metrics["val/agreement"]) > 0.8  # with a task_weight of 0: from the teacher alone
    assert not torch.equal(before["predictor.ffn.0.0.weight"], student.predictor.ffn[0][0].weight)

    assert (
        list(torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"])
        == names
        == list(student.state_dict())
    )
    loaded = models.MPNN.load_from_checkpoint(tmp_path / "last.ckpt")  # strict
    assert type(loaded) is models.MPNN
    assert_equal(weights(loaded), weights(student))


def test_it_is_rounded_while_it_is_distilled(teacher: Teacher) -> None:
    student = network(32)
    callbacks = [distillation(teacher, kd=KD()), QuantizationAwareTraining()]
    trainer(callbacks=callbacks).fit(student, molecules(), molecules())
    found = quantized_share(student)
    print(f"{found.quantized} of {found.total} parameters rounded; in float: {found.in_float}")
    assert found.quantized / found.total > 0.9
    network(32).load_state_dict(float_weights(student.state_dict()))


def test_atoms_are_distilled_with_the_students_name_alone(teacher: Teacher) -> None:
    student, seen = network(32), Observer()
    layer, encoder = "W_o", teacher.network.module.message_passing
    callback = Distillation(encoder, {"hint": Hint(layer, layer)}, student="message_passing", task_weight=0.0)
    trainer(callbacks=[callback, seen], log_every_n_steps=1).fit(student, molecules(), molecules())
    seen.assert_trained_by("hint", student="message_passing.")
    seen.assert_clean(network(32))


def test_a_forgotten_logits_argument_is_explained(teacher: Teacher) -> None:
    with pytest.raises(ValueError, match=r'did not run in training_step.*logits="\.\.\."'):
        trainer(callbacks=[Distillation(teacher, {"kd": KD()})]).fit(network(16), molecules())


def test_nothing_is_left_in_it_after_an_exception(teacher: Teacher) -> None:
    class Failing(Callback):
        def on_train_batch_end(self, *args) -> None:
            raise KeyError("later")

    student = network(16)
    with pytest.raises(KeyError, match="later"):
        trainer(callbacks=[distillation(teacher, kd=KD()), Failing()]).fit(student, molecules())
    assert list(student.state_dict()) == list(network(16).state_dict())
    assert "training_step" not in vars(student)
