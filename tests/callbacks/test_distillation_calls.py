"""Students that run several times in a step."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Distillation, Outputs
from kd_lightning.losses import KD, HardLabel, Hint
from kd_lightning.teachers import Ensemble, FromBatch
from tests.tiny import CLASSES, FEATURES, assert_equal, good_teacher, loader, samples, trainer, weights


class Small(nn.Module):
    """Without batch statistics, so that two calls of one view are a call of both."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.act, self.head = nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.stem(x)))


class TwoViews(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Small()

    def views(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.flip(0) * 0.5

    def training_step(self, batch, batch_idx):
        one, other = (self.net(view) for view in self.views(batch[0]))
        return F.mse_loss(one, other)

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Joined(TwoViews):
    """The same with one call on both views."""

    def training_step(self, batch, batch_idx):
        one, other = self.net(torch.cat(self.views(batch[0]))).chunk(2)
        return F.mse_loss(one, other)


def fit(module_type: type[TwoViews], losses: Any = None, teacher: Any = None, data: Any = None, **options: Any) -> Any:
    teacher = good_teacher() if teacher is None else teacher
    seed_everything(0, verbose=False)
    module = module_type()
    callback = Distillation(teacher, losses or {"kd": KD(weight=3.0)}, student="net", **options)
    it = trainer(callbacks=[callback], max_epochs=2)
    it.fit(module, data or loader(), loader(seed=5))
    return weights(module), it.callback_metrics


LOSSES = {"kd": lambda: KD(weight=3.0), "hint": lambda: Hint("act", "act"), "hard_label": HardLabel}


def losses() -> dict[str, Any]:
    return {name: make() for name, make in LOSSES.items()}


def twice(batch: Any) -> Tensor:
    return torch.cat([batch[1]] * 2)


@pytest.mark.parametrize("teacher", [good_teacher, lambda: Ensemble([good_teacher(), good_teacher()])])
def test_all_calls_train_as_one_call_on_the_joined_inputs(teacher: Any) -> None:
    found, logged = fit(TwoViews, losses(), teacher(), calls="all")
    expected, _ = fit(Joined, losses(), teacher(), target=twice, check_teacher=False)
    torch.testing.assert_close(found, expected)
    assert 0 <= logged["val/agreement"] <= 1


def test_the_first_call_alone_is_distilled() -> None:
    class ByHand(TwoViews):
        def training_step(self, batch, batch_idx):
            one, other = self.views(batch[0])
            with torch.no_grad():
                taught = teacher(one)
            return F.mse_loss(self.net(one), self.net(other)) + 3 * KD()(Outputs(self.net(one)), Outputs(taught), None)

    teacher = good_teacher().eval()
    seed_everything(0, verbose=False)
    by_hand = ByHand()
    trainer(max_epochs=2).fit(by_hand, loader())
    torch.testing.assert_close(fit(TwoViews, calls="first")[0], weights(by_hand))
    fit(TwoViews, losses(), calls="first")  # layers and labels of the first call, too


def test_by_default_a_second_call_is_refused_and_the_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"ran several times in training_step, .*calls=\"all\".*calls=\"first\""):
        fit(TwoViews)
    with pytest.raises(ValueError, match="expected calls to be one of once, first, all, got 'both'"):
        fit(TwoViews, calls="both")


def test_what_does_not_belong_to_each_call_is_refused() -> None:
    class Half(TwoViews):
        def training_step(self, batch, batch_idx):
            one, other = self.views(batch[0])
            return F.mse_loss(self.net(one), self.net.head(self.net.stem(other)))

    x, y = samples(32)
    taught = DataLoader(TensorDataset(x, y, torch.randn(32, CLASSES)), batch_size=8)
    for teacher in (FromBatch(), Ensemble([good_teacher(), FromBatch()])):
        with pytest.raises(ValueError, match=r"reads outputs for one call of the student .*calls=\"first\""):
            fit(TwoViews, teacher=teacher, data=taught, calls="all")
    fit(TwoViews, teacher=FromBatch(), data=taught, calls="first")
    one_view = {"teacher_inputs": 0, "logits": "head", "calls": "all"}
    message = r"teacher gives outputs \(\d, 4\) and the student \(\d+, 4\), expected as many samples: .*calls=\"first\""
    with pytest.raises(ValueError, match=message):
        fit(TwoViews, **one_view)
    fit(TwoViews, **{**one_view, "teacher_inputs": lambda batch: torch.cat(TwoViews.views(None, batch[0]))})
    with pytest.raises(ValueError, match=r"layer 'head', .* ran 2 times in training_step and the student \('net'\) 1"):
        fit(Half, calls="all", logits="head")


@pytest.mark.parametrize("calls", ["once", "first", "all"])
def test_the_second_pass_of_gradient_checkpointing_is_no_call(calls: Any) -> None:
    """A gradient penalty runs the backward pass, and with it the checkpointed layers, inside the step."""

    class Penalised(TwoViews):
        checkpointing = False

        def training_step(self, batch, batch_idx):
            x = batch[0].requires_grad_()
            logits = checkpoint(self.net, x, use_reentrant=False) if self.checkpointing else self.net(x)
            (slope,) = torch.autograd.grad(F.cross_entropy(logits, batch[1]), x, create_graph=True)
            return F.cross_entropy(logits, batch[1]) + slope.square().sum()

        def validation_step(self, batch, batch_idx):
            self.net(batch[0])

    class Checkpointed(Penalised):
        checkpointing = True

    terms = {"kd": KD(), "hint": Hint("act", "act")}
    expected, _ = fit(Penalised, terms)
    terms = {"kd": KD(), "hint": Hint("act", "act")}
    assert_equal(fit(Checkpointed, terms, calls=calls)[0], expected)
