"""Networks that return anything at all, which nobody wraps."""

import pickle
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn

from kd_lightning import Distillation, Teacher
from kd_lightning.losses import KD, Hint
from kd_lightning.teachers import Ensemble, FromBatch, Momentum
from tests.tiny import Network, assert_equal, good_teacher, loader, trainer, weights

Pair = namedtuple("Pair", ["prediction", "hidden"])


@dataclass
class Record:
    prediction: Tensor
    hidden: Tensor


@dataclass(slots=True)
class Slotted:
    prediction: Tensor
    hidden: Tensor


class ModelOutput(OrderedDict):
    """What transformers' of that name is: a mapping, with attributes, in the order of a tuple."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __len__(self) -> int:
        return len(self.keys())


class Plain:
    def __init__(self, prediction: Tensor, hidden: Tensor) -> None:
        self.prediction, self.hidden = prediction, hidden


class Wide(Network):
    """A network that gives its logits along with something else."""

    def __init__(self, made: Any, width: int = 8) -> None:
        super().__init__(width)
        self.made = made

    def forward(self, x: Tensor) -> Any:
        hidden = self.act(self.norm(self.stem(x)))
        return self.made(self.head(hidden), hidden)


class Theirs(LightningModule):
    """Somebody's module, which reads its own network's output."""

    def __init__(self, net: nn.Module, read: Any) -> None:
        super().__init__()
        self.net, self.read = net, read

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.read(self.net(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def teacher_of(made: Any) -> nn.Module:
    teacher = Wide(made, width=16)
    teacher.load_state_dict(good_teacher().state_dict())
    return teacher


def fit(made: Any, read: Any, teacher: Any = None, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Return the trained weights and what was logged."""
    teacher = good_teacher() if teacher is None else teacher
    seed_everything(0, verbose=False)
    module = Theirs(Wide(made), read)
    losses = options.pop("losses", None) or {"kd": KD(temperature=4.0), "hint": Hint("act", "act")}
    callback = Distillation(teacher, losses, student="net", **options)
    it = trainer(callbacks=[callback])
    it.fit(module, loader(), loader(seed=5))
    return weights(module), it.callback_metrics


@cache
def expected() -> tuple[dict[str, Tensor], Any]:
    return fit(lambda z, hidden: z, lambda out: out)


def swapped(z: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return hidden, z


def as_dict(z: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    return {"hidden": hidden, "prediction": z}


def as_model_output(z: Tensor, hidden: Tensor) -> ModelOutput:
    return ModelOutput(prediction=z, hidden=hidden)


SHAPES: dict[str, tuple[Any, Any, Any]] = {  # what the network returns, logits=, how the module reads it
    "key": (as_dict, "prediction", lambda out: out["prediction"]),
    "named tuple": (Pair, "prediction", lambda out: out.prediction),
    "named tuple's index": (Pair, 0, lambda out: out[0]),
    "index": (swapped, 1, lambda out: out[1]),
    "index from the end": (swapped, -1, lambda out: out[1]),
    "list": (lambda z, hidden: [hidden, z], 1, lambda out: out[1]),
    "dataclass": (Record, "prediction", lambda out: out.prediction),
    "dataclass with slots": (Slotted, "prediction", lambda out: out.prediction),
    "object": (Plain, "prediction", lambda out: out.prediction),
    "ModelOutput": (as_model_output, "prediction", lambda out: out["prediction"]),
    "ModelOutput's index": (as_model_output, 0, lambda out: out["prediction"]),
    "function": (lambda z, h: {"heads": {"a": z}}, lambda out: out["heads"]["a"], lambda out: out["heads"]["a"]),
    "layer": (lambda z, h: (h, z), "head", lambda out: out[1]),
    "layer, in words": (lambda z, h: {"head": h, "z": z}, "layer:head", lambda out: out["z"]),
    "output, in words": (lambda z, h: {"head": z * 1, "z": h}, "output:head", lambda out: out["head"]),
    "one tensor by both names": (lambda z, h: {"head": z, "z": h}, "head", lambda out: out["head"]),
}


@pytest.mark.parametrize(("made", "selector", "read"), SHAPES.values(), ids=SHAPES)
def test_outputs_of_any_shape_train_the_same_weights(made: Any, selector: Any, read: Any) -> None:
    found, logged = fit(made, read, teacher_of(made), logits=selector, teacher_logits=selector)
    assert_equal(found, expected()[0])
    for name in ("val/agreement", "val/teacher_acc"):
        assert logged[name] == expected()[1][name]


def test_one_word_for_a_layer_and_another_part_of_the_output_is_refused() -> None:
    def ambiguous(z: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        return {"head": hidden, "z": z}

    message = r'names a layer, which gives a tensor \(8, 4\), and a part of the output, a tensor \(8, 8\).*"layer:head"'
    with pytest.raises(ValueError, match=f"^logits='head' {message} or \"output:head\""):
        fit(ambiguous, lambda out: out["z"], logits="head")
    with pytest.raises(ValueError, match=r"^teacher_logits='head' names a layer, which gives .* \(2, 4\)"):
        fit(lambda z, h: z, lambda out: out, teacher_of(ambiguous), teacher_logits="head")


def test_what_is_refused_says_what_the_output_holds() -> None:
    message = r"got a dict with 'hidden' \(2, 8\), 'scores' \(2, 4\): name the part that they are with logits="
    with pytest.raises(ValueError, match=message):
        fit(lambda z, h: {"hidden": h, "scores": z}, lambda out: out["scores"])
    with pytest.raises(ValueError, match=r"got a tuple with 0 \(2, 16\), 1 \(2, 4\): .* with teacher_logits="):
        fit(lambda z, h: z, lambda out: out, teacher_of(swapped))
    with pytest.raises(ValueError, match=r"(?s)no layer 'predicton'.*nearest: .*a Pair with 'prediction' \(2, 4\)"):
        fit(Pair, lambda out: out.prediction, logits="predicton")
    with pytest.raises(ValueError, match=r"got a Slotted with 'prediction' \(2,\), 'hidden' \(2, 8\): name the part"):
        fit(lambda z, h: Slotted(z.argmax(1), h), lambda out: out.hidden)
    with pytest.raises(ValueError, match=r"logits=2 is no part of a tuple with 0 \(2, 8\), 1 \(2, 4\): name one"):
        fit(swapped, lambda out: out[1], logits=2)
    with pytest.raises(ValueError, match=r"logits=0 is no part of a tensor \(2, 4\): leave logits= out"):
        fit(lambda z, h: z, lambda out: out, logits=0)
    with pytest.raises(ValueError, match=r"logits= failed with AttributeError: .*it was given is a tuple with 0"):
        fit(swapped, lambda out: out[1], logits=lambda out: out.prediction)
    with pytest.raises(ValueError, match=r"logits='loss' to give the logits, .* got a tensor \(\), out of a dict"):
        fit(lambda z, h: {"loss": z.mean(), "z": z}, lambda out: out["z"], logits="loss")
    with pytest.raises(ValueError, match=r"Wide has no layer 'haed'.*nearest: head"):
        fit(swapped, lambda out: out[1], logits="layer:haed")
    with pytest.raises(TypeError, match=r"expected logits= to be a key, .*, got a float"):
        Distillation(good_teacher(), {"kd": KD()}, logits=1.0)  # type: ignore[arg-type]


def test_the_members_of_an_ensemble_and_a_moving_average_are_read_likewise() -> None:
    ensemble = Ensemble([teacher_of(as_dict), Teacher(teacher_of(as_dict))])
    found, _ = fit(lambda z, h: z, lambda out: out, ensemble, teacher_logits="prediction")
    torch.testing.assert_close(found, expected()[0], rtol=1e-4, atol=1e-5)
    of_tensors, _ = fit(lambda z, h: z, lambda out: out, Momentum(0.9))
    assert_equal(fit(as_dict, lambda out: out["prediction"], Momentum(0.9), logits="prediction")[0], of_tensors)
    with pytest.raises(ValueError, match="teacher_logits= is for a teacher whose network runs, got FromBatch"):
        Distillation(FromBatch(), {"kd": KD()}, teacher_logits="prediction")


def test_a_key_an_index_and_an_attrgetter_can_be_pickled() -> None:
    for selector in ("prediction", 0, attrgetter("prediction")):
        callback = Distillation(teacher_of(Pair), {"kd": KD()}, "net", logits=selector, teacher_logits=selector)
        seed_everything(0, verbose=False)
        module = Theirs(Wide(Pair), attrgetter("prediction"))
        trainer(callbacks=[pickle.loads(pickle.dumps(callback))]).fit(module, loader())
