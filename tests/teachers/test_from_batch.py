"""Outputs that come with the batches teach what the network that gave them teaches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Distillation, Teacher
from kd_lightning.data import WithIds
from kd_lightning.losses import DKD, KD, OFD, HardLabel, Hint, SimKD, TopKKL, WKDLogits
from kd_lightning.tasks import Batch, Taught
from kd_lightning.teachers import FromBatch
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

X, Y = samples(32)


def outputs(classes: int = CLASSES, k: int | None = None) -> dict[str, Tensor]:
    given = Teacher(good_teacher())(Batch((X,), {}, None), ["act"])
    if k is None:
        return {"logits": given.logits[:, :classes], "features.act": given.features["act"]}
    best = given.logits.log_softmax(-1).topk(k)
    return {"indices": best.indices, "log_probs": best.values}


class Rows:
    """A data set of the rows of tensors, made into samples by a function."""

    def __init__(self, make: Callable[..., Any], taught: dict[str, Tensor], labels: Tensor = Y) -> None:
        self.make, self.taught, self.labels = make, taught, labels

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> Any:
        return self.make(X[i], self.labels[i], {name: x[i] for name, x in self.taught.items()})


FORMS = {
    "tuple": lambda x, y, t: (x, y, t),
    "mapping": lambda x, y, t: {"x": x, "labels": y, **{f"teacher_{name}": value for name, value in t.items()}},
    "taught": lambda x, y, t: Taught((x, y), t),
}


def batches(form: str = "tuple", taught: dict[str, Tensor] | None = None, **options: Any) -> DataLoader:
    return DataLoader(Rows(FORMS[form], outputs() if taught is None else taught, **options), batch_size=8)


class Existing(LightningModule):
    """Somebody's module, that knows nothing of a teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        if isinstance(batch, dict):
            labels = batch.pop("labels")
            return nn.functional.cross_entropy(self.net(**batch), labels)
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def configure_optimizers(self):
        return sgd(self.parameters())


def through_module(teacher: Any, losses: dict, data: Any) -> dict[str, Tensor]:
    module = distillation(teacher=teacher, losses={"hard_label": HardLabel(), **losses})
    torch.manual_seed(0)  # projectors
    trainer(max_epochs=2).fit(module, data, loader(seed=5))
    return weights(module.student)


def through_callback(teacher: Any, losses: dict, data: Any) -> dict[str, Tensor]:
    module = Existing()
    torch.manual_seed(0)
    trainer(max_epochs=2, callbacks=[Distillation(teacher, losses, student="net")]).fit(module, data, loader(seed=5))
    return weights(module.net)


DOORS = pytest.mark.parametrize("door", [through_module, through_callback])


@DOORS
@pytest.mark.parametrize("form", FORMS)
def test_logits_and_features_teach_what_the_live_network_teaches(door: Any, form: str) -> None:
    live = door(Teacher(good_teacher()), {"kd": KD(), "hint": Hint("act")}, loader())
    assert_equal(door(FromBatch(), {"kd": KD(), "hint": Hint("act")}, batches(form)), live)
    assert_equal(
        door(FromBatch(), {"kd": KD(), "hint": Hint("act")}, DataLoader(WithIds(Rows(FORMS[form], outputs())), 8)), live
    )


@DOORS
@pytest.mark.parametrize("form", FORMS)
def test_the_best_classes_teach_what_the_live_networks_best_classes_teach(door: Any, form: str) -> None:
    live = door(Teacher(good_teacher()), {"top": TopKKL(2, temperature=2.0)}, loader())
    for loss in (TopKKL(2, temperature=2.0), KD(2.0)):
        torch.testing.assert_close(
            door(FromBatch(), {"top": loss}, batches(form, outputs(k=2))), live, rtol=1e-5, atol=1e-6
        )


@DOORS
def test_bare_logits_are_the_third_part(door: Any) -> None:
    data = DataLoader(TensorDataset(X, Y, outputs()["logits"]), batch_size=8)
    assert_equal(door(FromBatch(), {"kd": KD()}, data), door(Teacher(good_teacher()), {"kd": KD()}, loader()))


def test_unlabelled_samples_are_taught_too() -> None:
    none = torch.full_like(Y, -100)
    module = distillation(teacher=FromBatch(), losses={"kd": KD()})
    trainer().fit(module, batches(labels=none))
    assert not torch.equal(module.student.head.weight, network().head.weight)


@DOORS
@pytest.mark.parametrize("k", [None, 2])
def test_what_is_logged_where_some_batches_bring_a_teacher(door: Any, k: int | None, tmp_path) -> None:
    """The training batches and the second validation loader do."""
    losses = {"kd": KD()}
    taught = outputs(k=k)
    options = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
    if door is through_module:
        fit = trainer(**options)
        fit.fit(distillation(teacher=FromBatch(), losses=losses), batches(taught=taught), batches(taught=taught))
    else:
        fit = trainer(callbacks=[Distillation(FromBatch(), losses, student="net")], **options)
        fit.fit(Existing(), batches(taught=taught), batches(taught=taught))
    hits = outputs()["logits"].argmax(-1) == Y
    assert fit.callback_metrics["val/teacher_acc"] == pytest.approx(hits.float().mean().item())
    assert 0 < fit.callback_metrics["val/agreement"] <= 1
    # The entropy of two classes of four is not known.
    assert ("kd/teacher_entropy" in fit.logged_metrics) == (k is None)


def test_validation_without_a_teacher_scores_the_student_alone() -> None:
    fit = trainer()
    fit.fit(distillation(teacher=FromBatch(), losses={"kd": KD()}), batches(), loader(seed=5))
    assert fit.callback_metrics["val/acc"] > 0
    assert "val/agreement" not in fit.callback_metrics
    assert "val/teacher_acc" not in fit.callback_metrics


# Refused


def refused(
    message: str, losses: dict, data: Any, teacher: Any = None, doors: tuple = (through_module, through_callback)
):
    for door in doors:
        with pytest.raises(ValueError, match=message):
            door(teacher or FromBatch(), losses, data)


def test_batches_that_bring_nothing_are_refused_before_training() -> None:
    refused(r"the batch brings no outputs of a teacher, expected \(input, target, logits\)", {"kd": KD()}, loader())


def test_a_layer_that_does_not_come_along_is_refused() -> None:
    hint = {"hint": Hint("act", "stem")}
    refused(r"teacher's layers \['stem'\], expected 'features.stem' .*got \['features.act'\]", hint, batches())
    refused(r"layers \['stem'\].*got no features", hint, batches(taught=outputs(k=2)))


@pytest.mark.parametrize("loss", [SimKD("act"), OFD(["norm"]), WKDLogits("head")])
def test_losses_that_look_into_the_network_are_refused_when_they_are_put_together(loss: Any) -> None:
    message = r"losses \['mine'\] look into the teacher's network.*got FromBatch: pass Tea"
    with pytest.raises(ValueError, match=message):
        Distillation(FromBatch(), {"mine": loss}, student="net")
    with pytest.raises(ValueError, match=message):
        distillation(teacher=FromBatch(), losses={"mine": loss})


def test_other_classes_are_refused() -> None:
    refused("the student has 4 classes and the teacher 3", {"kd": KD()}, batches(taught=outputs(classes=3)))
    far = outputs(k=2)
    refused(
        "best classes hold 4, expected 0 to 3", {"kd": KD()}, batches(taught={**far, "indices": far["indices"] + 1})
    )


def test_losses_on_all_logits_are_refused_for_the_best() -> None:
    refused(
        r"losses \['dkd'\] read the teacher's logits of all classes, got its 2 best",
        {"dkd": DKD()},
        batches(taught=outputs(k=2)),
    )


@pytest.mark.parametrize("k", [None, 2])
def test_a_teacher_at_chance_is_refused(k: int | None) -> None:
    x, y = samples(128)
    taught = {"logits": torch.randn(128, CLASSES, generator=torch.Generator().manual_seed(0))}
    if k:
        best = taught["logits"].log_softmax(-1).topk(k)
        taught = {"indices": best.indices, "log_probs": best.values}
    rows = [(x[i], y[i], {name: value[i] for name, value in taught.items()}) for i in range(128)]
    refused(
        "teacher is at chance on this loader: .* well above 25.0 %",
        {"kd": KD()},
        DataLoader(rows, batch_size=32),
    )


def test_outputs_that_a_live_teacher_would_not_read_are_refused() -> None:
    for door, form in ((through_module, "tuple"), (through_callback, "taught")):
        with pytest.raises(ValueError, match=r"bring a teacher's outputs, which the network .*pass teacher=FromBatch"):
            door(Teacher(good_teacher()), {"kd": KD()}, batches(form))
