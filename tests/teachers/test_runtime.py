import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from kd_lightning import Distillation
from kd_lightning.export.formats import FORMATS
from kd_lightning.losses import KD, Hint
from kd_lightning.outputs import Outputs
from kd_lightning.tasks import Batch
from kd_lightning.teachers.fastest import differences
from kd_lightning.teachers.runtime import RuntimeTeacher
from tests.tiny import (
    CLASSES,
    assert_equal,
    distillation,
    good_teacher,
    loader,
    network,
    samples,
    sgd,
    trainer,
    weights,
)

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, exc_type=ImportError)


@pytest.fixture(params=["onnxruntime", "openvino"])
def runtime(request) -> str:
    pytest.importorskip(request.param, exc_type=ImportError)
    return request.param


def batch(count: int, seed: int = 0) -> Batch:
    return Batch((samples(count, seed)[0],), {}, None)


def float_outputs(teacher: RuntimeTeacher, of: Batch) -> Tensor:
    with torch.no_grad():
        return teacher.network(*of.args, **of.kwargs)


def calibrated(net: nn.Module | None = None, **options) -> RuntimeTeacher:
    teacher = RuntimeTeacher(net or good_teacher(), calibration_samples=64, **options)
    for seed in range(2):
        given = teacher(batch(32, seed), teacher.layers)
        assert torch.equal(given.logits, float_outputs(teacher, batch(32, seed)))  # not before it has seen 64 samples
    return teacher


@pytest.mark.parametrize(("precision", "max_kl", "max_error"), [("int8", 0.01, 0.05), ("float32", 1e-9, 1e-5)])
def test_logits_and_layers_are_the_networks_for_batches_of_any_size(
    runtime: str, precision: str, max_kl: float, max_error: float
) -> None:
    teacher = calibrated(runtime=runtime, precision=precision, layers=["act"])
    for count in (32, 7, 1):
        given = teacher(batch(count, seed=5), ["act"])
        activation = dict(teacher.network.named_children())
        x = batch(count, seed=5).args[0]
        with torch.no_grad():
            expected = activation["act"](activation["norm"](activation["stem"](x)))
        kl, error = differences(given._replace(logits=float_outputs(teacher, batch(count, 5))), given)
        assert -1e-9 <= kl <= max_kl
        assert error <= max_error
        assert (given.features["act"] - expected).norm() <= max_error * expected.norm()
        if precision == "int8":
            assert kl > 1e-9  # it is another network, and not the float one under its name
        assert not given.logits.requires_grad
        assert teacher(batch(count, seed=5)).features == {}


def test_what_int8_changes_is_logged_with_what_it_saves(caplog) -> None:
    caplog.set_level(logging.INFO)
    teacher = calibrated()
    assert "teacher:" not in caplog.text
    teacher(batch(32))
    teacher(batch(32))
    (line,) = [record.message for record in caplog.records if "teacher:" in record.message]
    assert line.startswith("teacher: int8 through onnxruntime, KL ")
    assert "on the 64 samples of its calibration" in line
    expected = sum(
        differences(teacher(of)._replace(logits=float_outputs(teacher, of)), teacher(of))[0]
        for of in (batch(32, 0), batch(32, 1))
    )
    assert float(line.split("KL ")[1].split()[0]) == pytest.approx(expected / 2, rel=0.1)


def test_a_student_learns_the_same_from_it_to_what_int8_changes() -> None:
    def trained(teacher: object) -> Tensor:
        student = network()
        trainer(max_epochs=4).fit(distillation(student, teacher, losses={"kd": KD(temperature=4.0)}), loader(64))
        with torch.no_grad():
            return student.eval()(samples(256, seed=7)[0])

    int8, plain = trained(RuntimeTeacher(good_teacher(), calibration_samples=32)), trained("good")
    kl, _ = differences(Outputs(plain), Outputs(int8))
    assert 0 < kl < 2e-3


class Theirs(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.student = network()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.student(batch[0]), batch[1])

    def configure_optimizers(self):
        return sgd(self.parameters())


@pytest.mark.parametrize(
    ("door", "samples"),
    [
        pytest.param("callback", 32, id="file made"),
        pytest.param("module", 160, id="still calibrating", marks=pytest.mark.integration),
    ],
)
def test_a_resumed_training_ends_with_the_same_weights(door: str, samples: int, tmp_path: Path) -> None:
    def fit(ckpt_path: Path | None = None) -> dict[str, Tensor]:
        teacher = RuntimeTeacher(good_teacher(), calibration_samples=samples)
        options: dict[str, Any] = {"losses": {"kd": KD(temperature=4.0)}, "check_teacher": False}
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, enable_version_counter=False)
        module: LightningModule = Theirs()
        callbacks = [Distillation(teacher, student="student", **options), saving]
        if door == "module":
            module, callbacks = distillation(network(), teacher, **options), [saving]
        it = trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=2)
        it.fit(module, loader(128), ckpt_path=ckpt_path)  # 128 samples an epoch
        return weights(module)

    expected = fit()
    assert_equal(fit(tmp_path / "epoch=0.ckpt"), expected)


def test_layers_that_the_file_will_not_have_are_refused_before_the_first_step() -> None:
    module = distillation(
        network(), RuntimeTeacher(good_teacher()), losses={"hint": Hint(student_layer="act", teacher_layer="act")}
    )
    with pytest.raises(ValueError, match=r"layers \['act'\], .* give \[\]: pass RuntimeTeacher\(layers=\['act'\]\)"):
        trainer().fit(module, loader())


class Keyword(nn.Module):
    """Called as Hugging Face networks are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 16), nn.Linear(16, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        states = self.embedding(input_ids) * attention_mask.unsqueeze(-1)
        return {"logits": self.head(states.sum(1))}


def test_keyword_arguments_and_integers_get_through(runtime: str) -> None:
    torch.manual_seed(0)
    teacher = RuntimeTeacher(Keyword(), runtime=runtime, calibration_samples=8, max_kl=0.1)

    def tokens(count: int) -> Batch:
        return Batch((), {"input_ids": torch.randint(10, (count, 5)), "attention_mask": torch.ones(count, 5)}, None)

    teacher(tokens(8))
    of = tokens(3)
    expected = float_outputs(teacher, of)["logits"]
    assert (teacher(of).logits - expected).norm() < 0.05 * expected.norm()


def test_a_teacher_that_int8_makes_another_is_refused_with_the_remedy() -> None:
    teacher = calibrated(max_kl=1e-12)
    with pytest.raises(
        ValueError, match=r"diverges .* by a KL of .* on 64 samples, expected 1e-12 at most: raise calib"
    ):
        teacher(batch(8))


def test_what_cannot_be_is_refused(monkeypatch) -> None:
    with pytest.raises(ValueError, match="expected runtime to be one of onnxruntime, openvino, got 'tensorrt'"):
        RuntimeTeacher(good_teacher(), runtime="tensorrt")
    with pytest.raises(ValueError, match="expected precision to be int8 or float32, got 'int4'"):
        RuntimeTeacher(good_teacher(), precision="int4")
    with pytest.raises(ValueError, match="expects tensors alone, got Tensor, bool"):
        RuntimeTeacher(good_teacher())(Batch((torch.ones(2, 6),), {"flag": True}, None))
    monkeypatch.setitem(FORMATS, "openvino", FORMATS["openvino"]._replace(packages=("onnx", "not_there")))
    with pytest.raises(ImportError, match=r"got none of the name not_there: pip install 'kd-lightning\[openvino\]'"):
        RuntimeTeacher(good_teacher(), runtime="openvino")
