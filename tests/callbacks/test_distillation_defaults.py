"""What nobody has to say to the callback, as only one thing can be meant."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from kd_lightning import Distillation, DistillationModule
from kd_lightning.losses import KD, HardLabel, Hint, LabelRegression, LogitsMSE, TeacherRegression
from kd_lightning.tasks import Classification, Regression
from tests.tiny import Network, assert_equal, good_teacher, samples, trainer, weights

X, LABELS = samples(32)
VALUES = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


class Theirs(LightningModule):
    """Somebody's module, which reads its batches and its network's output itself."""

    def __init__(self, net: nn.Module, read: Any, output: Any, loss: Any) -> None:
        super().__init__()
        self.net, self.read, self.output, self.loss = net, read, output, loss

    def training_step(self, batch, batch_idx):
        x, y = self.read(batch)
        return self.loss(self.output(self.net(x)), y)

    def validation_step(self, batch, batch_idx):
        self.net(self.read(batch)[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def same(x: Any) -> Any:
    return x


def fit(
    made: Any = lambda x, y: (x, y),
    read: Any = same,
    output: Any = same,
    net: Any = None,
    teacher: Any = None,
    losses: Any = None,
    targets: Tensor = LABELS,
    loss: Any = F.cross_entropy,
    collate: Any = default_collate,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Distillation]:
    """Return the trained weights, what was logged, and the callback."""
    teacher = good_teacher() if teacher is None else teacher
    seed_everything(0, verbose=False)
    module = Theirs((net or Network)(), read, output, loss)
    losses = losses or {"kd": KD(temperature=4.0), "hard_label": HardLabel()}
    callback = Distillation(teacher, losses, student="net", **options)
    data = DataLoader([made(x, y) for x, y in zip(X, targets, strict=True)], batch_size=8, collate_fn=collate)
    it = trainer(callbacks=[callback], log_every_n_steps=1)
    it.fit(module, data, data)
    return weights(module), dict(it.callback_metrics), callback


def assert_same(found: Any, expected: Any) -> None:
    assert_equal(found[0], expected[0])
    assert_equal(found[1], expected[1])


@pytest.fixture(scope="module")
def plain() -> Any:
    return fit()


# The target.


class Graph(NamedTuple):
    nodes: Tensor
    edges: Tensor
    y: Tensor


def with_weight(rows: Any) -> Any:
    x, y = default_collate(rows)
    return x, (y, None)


TARGETS: dict[str, Any] = {
    "targets": (lambda x, y: {"x": x, "targets": y}, lambda b: (b["x"], b["targets"]), default_collate),
    "y": (lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"]), default_collate),
    "an attribute": (lambda x, y: Graph(x, x, y), lambda b: (b.nodes, b.y), default_collate),
    "an image's mask": (lambda x, y: {"image": x, "mask": y}, lambda b: (b["image"], b["mask"]), default_collate),
    "one column": (lambda x, y: (x, y[None]), lambda b: (b[0], b[1][:, 0]), default_collate),
    "beside no weight": (lambda x, y: (x, y), lambda b: (b[0], b[1][0]), with_weight),
}


@pytest.mark.parametrize(("made", "read", "collate"), TARGETS.values(), ids=TARGETS)
def test_a_target_is_found_by_its_usual_name(made: Any, read: Any, collate: Any, plain: Any) -> None:
    assert_same(fit(made, read, collate=collate), plain)


def test_a_mask_without_an_image_and_one_of_two_targets_are_no_target() -> None:
    for made, read in (
        (lambda x, y: {"tokens": x, "mask": y}, lambda b: (b["tokens"], b["mask"])),
        (lambda x, y: {"x": x, "y": y, "targets": 3 - y}, lambda b: (b["x"], b["y"])),
    ):
        with pytest.raises(ValueError, match="need labels, got none"):
            fit(made, read)
        _, logged, _ = fit(made, read, losses={"kd": KD()})
        assert "val/agreement" in logged
        assert "val/teacher_acc" not in logged


# The logits, and the teacher's.


class Pair(Network):
    """Gives more than its logits."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.act(self.norm(self.stem(x)))
        return {"hidden": hidden, "prediction": self.head(hidden)}


class Unusual(Network):
    def forward(self, x: Tensor) -> Any:
        hidden = self.act(self.norm(self.stem(x)))
        return hidden, [self.head(hidden)]


class Finished(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


def taught_by(kind: Any) -> Any:
    teacher = kind(width=16)
    teacher.load_state_dict(good_teacher().state_dict())
    return teacher


def last(output: Any) -> Any:
    return output[1][0]


def test_a_prediction_is_found_by_its_name(plain: Any) -> None:
    assert_same(fit(net=Pair, output=lambda out: out["prediction"], teacher=taught_by(Pair)), plain)


def test_a_teacher_of_the_students_class_has_its_logits_in_the_same_place(plain: Any) -> None:
    assert_same(fit(net=Unusual, output=last, teacher=taught_by(Unusual), logits=last), plain)
    # Its own output is probabilities, and a loss on those would be another.
    layer = fit(net=Finished, output=lambda p: p.log(), teacher=taught_by(Finished), logits="head")
    torch.testing.assert_close(layer[0], plain[0])


def test_a_teacher_of_another_class_has_them_there_only_where_it_gives_none_by_itself(plain: Any) -> None:
    class Other(Unusual):
        """Of another class, and likewise."""

    assert_same(fit(net=Unusual, output=last, teacher=taught_by(Other), logits=last), plain)
    assert_same(fit(net=Unusual, output=last, logits=last), plain)  # the teacher's is a tensor, which has no parts
    assert_same(fit(net=Unusual, output=last, teacher=taught_by(Pair), logits="head"), plain)
    with pytest.raises(ValueError, match=r"^teacher_logits= failed with .* it was given is a dict with 'hidden'"):
        fit(net=Unusual, output=last, teacher=taught_by(Pair), logits=last)
    with pytest.raises(ValueError, match=r"got a tuple with 0 \(2, 16\), 1 \(list\): .* with teacher_logits="):
        fit(net=Pair, output=lambda out: out["prediction"], teacher=taught_by(Unusual), logits="prediction")


# The task.


def test_losses_on_values_are_those_of_a_regression() -> None:
    options = {"targets": VALUES, "loss": F.mse_loss, "check_teacher": False}
    losses = {"kd": TeacherRegression(), "label": LabelRegression(), "hint": Hint("act", "act")}
    expected = fit(losses=losses, task=Regression(), **options)
    found = fit(losses={"kd": TeacherRegression(), "label": LabelRegression(), "hint": Hint("act", "act")}, **options)
    assert_same(found, expected)
    assert isinstance(found[2].task, Regression)
    assert {"val/agreement", "val/teacher_mae"} <= set(found[1])

    module = DistillationModule(Network(), good_teacher(), {"kd": TeacherRegression()}, torch.optim.SGD)
    assert isinstance(module.task, Regression)
    both = fit(losses={"kd": KD(), "value": TeacherRegression()})[2]
    assert isinstance(both.task, Classification)
    assert isinstance(fit(losses={"mse": LogitsMSE()})[2].task, Classification)  # of logits as well
    with pytest.raises(ValueError, match=r"task=Regression\(\)"):
        fit(losses={"mse": LogitsMSE()}, **options)


def test_one_value_a_sample_needs_no_second_dimension() -> None:
    def first(output: Tensor) -> Tensor:
        return output[:, 0]

    _, logged, _ = fit(
        losses={"kd": TeacherRegression()},
        targets=VALUES[:, 0],
        loss=F.mse_loss,
        output=first,
        logits=first,
        teacher_logits=first,
        check_teacher=False,
    )
    assert logged["train/loss/kd"] > 0
    assert {"val/agreement", "val/teacher_mae"} <= set(logged)
