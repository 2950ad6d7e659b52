"""Wrong calls: each is answered before the first step, with what was expected, what came and what to do."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import kd_lightning
from kd_lightning import Distillation
from kd_lightning.callbacks import HyperparameterSchedule, QuantizationAwareTraining, TemperatureSchedule
from kd_lightning.losses import AT, KD, RKD, HardLabel, Hint
from kd_lightning.losses.base import DistillationLoss
from kd_lightning.schedules import linear
from kd_lightning.tasks import Classification, Regression
from kd_lightning.teachers import Ensemble, FromBatch, Stored
from tests.tiny import Network, good_teacher, loader, network, samples, trainer

X, Y = samples(32)


class Theirs(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.other, self.width, self.steps = network(), nn.Linear(2, 2), 8, 0

    def training_step(self, batch, batch_idx):
        self.steps += self.trainer.training
        return self.loss(batch)

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def callback(teacher: Any = None, losses: Any = None, student: Any = "net", **options: Any) -> Distillation:
    losses = {"kd": KD()} if losses is None else losses
    return Distillation(good_teacher() if teacher is None else teacher, losses, student, **options)


def labelled(**options: Any) -> Distillation:
    return callback(losses={"hard_label": HardLabel()}, **options)


class ALoss(DistillationLoss):
    def __init__(self, compute: Any) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, student, teacher, target):
        return self.compute(student.logits, teacher.logits)


class ATeacher(nn.Module):
    """Gives what is made of a good teacher's logits, of inputs that are read in some way."""

    def __init__(self, made: Any = lambda z: z, read: Any = lambda x: x) -> None:
        super().__init__()
        self.network, self.made, self.read = good_teacher(), made, read

    def forward(self, x):
        return self.made(self.network(self.read(x)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = good_teacher()

    def forward(self, x, mask):
        return self.network(x * mask)


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


def nan() -> nn.Module:
    teacher = good_teacher()
    nn.init.constant_(teacher.head.weight, float("nan"))
    return teacher


def pairs(*parts: Any) -> DataLoader:
    return DataLoader(list(zip(*parts, strict=True)), batch_size=8)


def of_the_student(module: Theirs) -> Distillation:
    return callback(module.net)


Call = Callable[[], Any]
TEACHERS: dict[str, tuple[Call, str]] = {
    "a class": (lambda: callback(Network), r"expected a network .* got a type: make one, Network\(\.\.\.\)"),
    "a path": (lambda: callback("teacher.ckpt"), r"got 'teacher.ckpt': make the network, and load"),
    "a state dict": (lambda: callback(good_teacher().state_dict()), r"got a OrderedDict: make the network, and load"),
    "a function": (lambda: callback(lambda x: x), "got a function: wrap it in a module"),
    "a list": (lambda: callback([good_teacher(), good_teacher()]), r"got a list: several teach as Ensemble"),
    "none": (lambda: Distillation(None, {"kd": KD()}, "net"), r"losses \['kd'\] need a teacher, got teacher=None"),
    "no member": (lambda: callback(Ensemble([])), "expected at least one teacher, got none: pass for instance"),
    "not made yet": (
        lambda: callback(nn.LazyLinear(4)),
        "'weight' has no values, .*lazy.*expected a network that is r",
    ),
    "without memory": (lambda: callback(Network().to("meta")), r"'stem.weight' has no values, on the meta device"),
    "other channels": (lambda: callback(nn.Linear(3, 4)), r"cannot take a batch of shape \(2, 6\).*teacher_inputs=\)"),
    "other keys": (lambda: callback(ATeacher(read=lambda x: x["x"])), "cannot take a batch .*teacher_inputs="),
    "other attributes": (lambda: callback(ATeacher(read=lambda x: x.pixels)), "AttributeError: .*teacher_inputs="),
    "another argument": (lambda: callback(TwoInputs()), "missing 1 required positional argument.*teacher_inputs="),
    "tokens": (lambda: callback(nn.Sequential(nn.Embedding(9, 4))), "cannot take a batch .*teacher_inputs="),
    "a mapping": (lambda: callback(ATeacher(lambda z: {"a": z})), r"a dict with 'a' \(2, 4\): .*teacher_logits="),
    "a mean": (
        lambda: callback(ATeacher(lambda z: z.mean(0))),
        r"outputs \(4,\) .* student \(2, 4\), expected as many",
    ),
    "half": (lambda: callback(ATeacher(lambda z: z[::2])), r"outputs \(1, 4\) .* student \(2, 4\), expected as many"),
    "other classes": (lambda: callback(Network(classes=7)), "4 classes and the teacher 7, expected the same"),
    "probabilities": (lambda: callback(ATeacher(lambda z: z.softmax(-1))), "expected logits .* leave the softmax out"),
    "NaN": (lambda: callback(nan()), "the losses give nan before the first step, expected a finite value"),
    "not in the batch": (
        lambda: callback(FromBatch()),
        "the batch brings no outputs .* expected .*: add them in the data",
    ),
    "not stored": (lambda: callback(Stored()), "expected batches that bring .* got one without: wrap the training set"),
}
LOSSES: dict[str, tuple[Call, str]] = {
    "a list": (lambda: callback(losses=[KD()]), "expected losses by name, got a list: pass {'kd'"),
    "one": (lambda: callback(losses=KD()), "expected losses by name, got a KD: pass {'kd'"),
    "none": (lambda: callback(losses={}), "expected at least one loss, got none: pass"),
    "a class": (lambda: callback(losses={"kd": KD}), r"the class KD, expected a DistillationLoss: call it, KD\(\)"),
    "torch's": (lambda: callback(losses={"kd": nn.KLDivLoss()}), "is a KLDivLoss, expected a DistillationLoss: subcl"),
    "a dotted name": (lambda: callback(losses={"a.b": KD()}), "a word without dots, got 'a.b': rename it"),
    "no name": (lambda: callback(losses={1: KD()}), "a word without dots, got 1: rename it"),
    "an unknown layer": (
        lambda: callback(losses={"h": Hint("atc", "act")}),
        r"no layer 'atc', expected .*act \(8, 8\)",
    ),
    "an unknown layer there": (lambda: callback(losses={"h": Hint("act", "atc")}), r"teacher Network .*act \(2, 16\)"),
    "a layer's number": (
        lambda: callback(losses={"h": Hint(3, "act")}),
        "has the layer 3, expected a name: pass",
    ),
    "one layer for several": (lambda: callback(losses={"a": AT("act", "act")}), "expected lists of layers, got 'act'"),
    "a tensor": (
        lambda: callback(losses={"own": ALoss(lambda s, t: s - t)}),
        r"one number, .* got a tensor \(2, 4\): t",
    ),
    "a word": (lambda: callback(losses={"own": ALoss(lambda s, t: "x")}), "one number, .* got a str: take its mean"),
    "that fails": (
        lambda: callback(losses={"own": ALoss(lambda s, t: s @ t)}),
        r"loss 'own' \(ALoss\) fails on outputs of the student \(2, 4\) and of the teacher \(2, 4\).*RuntimeError",
    ),
    "small batches": (
        lambda: (callback(losses={"rkd": RKD()}), None, loader(8, batch_size=2)),
        "at least 3, got 2: rai",
    ),
}
PLACES: dict[str, tuple[Call, str]] = {
    "unknown student": (lambda: callback(student="nett"), "no layer 'nett': expected a name .*nearest: net"),
    "a network as student": (lambda: callback(student=network()), "the name of a network .*, got a Network: pass stud"),
    "no student": (lambda: callback(student=None), "the name of a network .*, got a NoneType: pass student="),
    "an attribute": (lambda: callback(student="width"), "no layer 'width': expected a name of named_modules"),
    "one that rests": (lambda: callback(student="other"), r"'other'\) did not run .* expected once: name the network"),
    "the whole": (lambda: callback(student=""), r"\(the Theirs itself\) did not run .* student=\"\.\.\.\""),
    "the teacher itself": (lambda: (of_the_student, None, None), "are the same network, expected two"),
    "the whole as teacher": (lambda: (lambda module: callback(module), None, None), "student is a part of the teacher"),
    "a layer of others": (lambda: callback(logits="layer:other"), "Network has no layer 'other': expected a name"),
    "a flag": (lambda: callback(logits=True), "expected logits= to be a key, .* got a bool"),
    "a number of calls": (lambda: callback(calls="twice"), "expected calls to be one of once, first, all, got 'twice'"),
    "inputs that fail": (
        lambda: callback(teacher_inputs=lambda b: b["x"]),
        "teacher_inputs= failed with TypeError: .*r",
    ),
    "no inputs": (lambda: callback(teacher_inputs=lambda b: None), r"gives None, expected a tensor.*a list with 0 \(8"),
    "unknown inputs": (lambda: callback(teacher_inputs="x"), "teacher_inputs='x' is no part of a list with 0"),
    "two callbacks of one loss": (lambda: ([callback(), callback()], None, None), "more than one stateful callback"),
}
TARGETS: dict[str, tuple[Call, str]] = {
    "a word": (lambda: labelled(target=lambda b: "cat"), "the target is a str.* expected a tensor of class indices"),
    "a number": (lambda: labelled(target=lambda b: b[1][0]), r"the targets \(\) and .* expected one each"),
    "an array": (lambda: labelled(target=lambda b: b[1].numpy()), "the target is a ndarray, expected a tensor"),
    "none": (lambda: labelled(target=lambda b: None), r"losses \['hard_label'\] need labels, got none .*: give the la"),
    "fewer": (lambda: labelled(target=lambda b: b[1][:3]), r"targets \(3,\) and .*\(8 samples\) differ in the number"),
    "above": (
        lambda: (labelled(check_teacher=False), summed, pairs(X, Y + 3)),
        "label 4 is out of range, expected 0 to",
    ),
    "floats": (lambda: (labelled(), summed, pairs(X, Y / 3)), r"float32 of shape \(8,\), expected class .*task=Regr"),
    "names": (lambda: (labelled(), summed, pairs(X, list("abcd" * 8))), "a tuple of str, expected .*: map each label"),
    "a word as task": (lambda: callback(task="regression"), r"expected a task as task=, got 'regression': pass"),
    "a class as task": (lambda: callback(task=Regression), r"expected a task as task=, .*: .*task=Regression\(\)"),
    "a task without classes": (lambda: callback(task=Regression()), "reads a softmax .*: take label_regression"),
    "a wrong dimension": (lambda: callback(task=Classification(class_dim=5)), "expected class_dim to be 1 for"),
    "a weight in words": (lambda: callback(task_weight="1"), "expected task_weight >= 0, got '1': 0 leaves"),
}


def summed(self: Theirs, batch: Any) -> Tensor:
    return self.net(batch[0]).sum()


def of_step(made: Any) -> Any:
    return lambda self, batch: made(F.cross_entropy(self.net(batch[0]), batch[1], reduction="none"))


def by_hand(self: Theirs, batch: Any) -> Tensor:
    raise AssertionError("is not called")


STEPS: dict[str, tuple[Call, str]] = {
    "a tuple": (
        lambda: (callback(), of_step(lambda v: (v.mean(), 1)), None),
        r"returns a tuple with 0 \(\), .*: return",
    ),
    "a vector": (lambda: (callback(), of_step(lambda v: v), None), r"returns a tensor \(2,\), expected its loss"),
    "a float": (lambda: (callback(), of_step(lambda v: float(v.mean())), None), "returns a float, expected its loss"),
    "no graph": (lambda: (callback(), of_step(lambda v: v.mean().detach()), None), "has no graph, .*task_weight=0 lea"),
    "no batch": (lambda: (callback(), None, []), "the training loader is empty, expected at least one batch: is"),
    "no sample": (lambda: (callback(), None, DataLoader(Nothing(), batch_size=8)), "the training loader is empty"),
    "a small set": (lambda: (callback(), None, loader(4, drop_last=True)), "empty, .* drop_last=True"),
    "NaN": (lambda: (callback(), None, pairs(X * float("nan"), Y)), "hold 48 NaN or infinite .*, expected finite"),
    "doubles": (lambda: (callback(), None, pairs(X.double(), Y)), r"float64 and .* not, expected one precision: conv"),
    "optimized by hand": (lambda: (callback(), by_hand, None), "optimizes manually, expected automatic optimization"),
}
OTHERS: dict[str, tuple[Call, str]] = {
    "no temperature": (
        lambda: TemperatureSchedule(linear(4.0, 1.0)),
        "no loss has a temperature .*, expected for inst",
    ),
    "a number": (lambda: TemperatureSchedule(4.0), "expected schedule to be a function of progress, got float"),
    "an unknown loss": (
        lambda: ([callback(), TemperatureSchedule(linear(4.0, 1.0), loss="dk")], None, None),
        r"no loss 'dk' has a temperature to schedule; those that have one: \['kd'\]",
    ),
    "words": (
        lambda: ([callback(), TemperatureSchedule(lambda share: "4")], None, None),
        "gives '4' after 0.0% of the training, expected values above 0 throughout: change its start",
    ),
    "no path": (lambda: HyperparameterSchedule(1, linear(4.0, 1.0)), "expected path to be a word .*, got 1: name what"),
    "a path to a loss": (
        lambda: ([callback(), HyperparameterSchedule("losses.kd", linear(4.0, 1.0))], None, None),
        "schedule path 'losses.kd' leads to a KD, expected a number",
    ),
    "unknown network": (lambda: QuantizationAwareTraining(student="nett"), "no layer 'nett': expected .*nearest: net"),
    "a network": (
        lambda: QuantizationAwareTraining(student=network()),
        "the name of a network .*, got a Network: pass",
    ),
    "bits alone": (lambda: QuantizationAwareTraining(8), r"expected a QuantizationSpec as spec=, got 8: pass"),
    "after the end": (lambda: QuantizationAwareTraining(start=1.5), "expected start to be a share .*, got 1.5"),
    "a factor in words": (
        lambda: QuantizationAwareTraining(learning_rate_factor="2"),
        "expected learning_rate_factor > 0, got '2': 1.0 leaves it",
    ),
}
EVERY = {
    f"{kind}: {name}": case
    for kind, cases in {
        **{"teacher": TEACHERS, "loss": LOSSES, "place": PLACES, "target": TARGETS, "step": STEPS, "other": OTHERS}
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize(("call", "message"), EVERY.values(), ids=EVERY)
def test_a_wrong_call_is_answered_before_the_first_step(call: Call, message: str) -> None:
    module = Theirs()

    def run() -> None:
        made = call()
        callbacks, loss, data = made if isinstance(made, tuple) else (made, None, None)
        if loss is not None:
            module.loss = loss.__get__(module)
            module.automatic_optimization = loss is not by_hand
        callbacks = callbacks(module) if callable(callbacks) and not isinstance(callbacks, list) else callbacks
        it = trainer(callbacks=callbacks if isinstance(callbacks, list) else [callbacks])
        it.fit(module, loader() if data is None else data)

    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"(?s){message}") as caught:
        run()
    assert module.steps == 0
    where = traceback.extract_tb(caught.value.__traceback__)[-1].filename
    if "stateful callback" not in message:  # which Lightning itself refuses
        assert Path(kd_lightning.__file__).parent in Path(where).parents  # said here, not by torch or Python
    assert "distillation" not in dict(module.named_children())
