import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.checkpoint import checkpoint

from kd_lightning.losses import KD, HardLabel
from kd_lightning.objective import Term
from kd_lightning.tracking.gradient_norms import gradient_norms
from tests.tiny import assert_equal, distillation, loader, logged, trainer


def test_they_are_those_of_a_backward_pass_each_and_leave_the_next_one_as_it_is() -> None:
    student, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)), torch.randn(6, 4)
    student[0].bias.requires_grad_(False)
    logits, constant = student(x), torch.ones(())
    terms = {"a": Term(logits.sum(), 0.5 * logits.sum()), "b": Term(logits.square().mean(), logits.square().mean())}
    terms["constant"] = Term(constant, constant)
    state = torch.get_rng_state()
    norms = gradient_norms(terms, student)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in student.parameters())
    assert set(norms) == {"train/grad_norm/a", "train/grad_norm/b"}
    for name in ("a", "b"):
        student.zero_grad()
        terms[name].weighted.backward(retain_graph=True)
        expected = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).norm()
        torch.testing.assert_close(norms[f"train/grad_norm/{name}"], expected)


def test_they_are_logged_at_the_first_logged_step_and_each_tenth_after(tmp_path) -> None:
    losses = {"hard_label": HardLabel(weight=0.3), "kd": KD(4.0, weight=0.0)}
    fit = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=2, max_epochs=3)
    fit.fit(distillation(losses=losses), loader(64), loader(20, seed=4))
    values = logged(tmp_path)
    assert list(values["train/loss"]) == list(range(1, 24, 2))
    assert list(values["train/grad_norm/hard_label"]) == [1, 21]
    assert min(values["train/grad_norm/hard_label"].values()) > 0
    assert set(values["train/grad_norm/kd"].values()) == {0}


def test_a_training_with_them_is_the_one_without(tmp_path) -> None:
    found = []
    for every in (1, 1000):
        module = distillation()
        torch.manual_seed(0)
        trainer(logger=CSVLogger(tmp_path), log_every_n_steps=every, max_epochs=2).fit(module, loader(24))
        found.append(module.student.state_dict())
    assert_equal(*found)


class InPlace(torch.autograd.Function):
    """As fused kernels do it: its gradient is written into what it has saved, which PyTorch does not see."""

    @staticmethod
    def forward(ctx, x):
        ctx.factor = torch.full_like(x, 2.0)
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor.mul_(gradient)


class Around(nn.Module):
    """A network with something else around it."""

    def __init__(self, inner: nn.Module, call) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.inner, x.detach().requires_grad_() if self.training else x)


AROUND = {
    "in place": lambda inner, x: InPlace.apply(inner(x)),
    "reentrant": lambda inner, x: checkpoint(inner, x, use_reentrant=True),
    "not reentrant": lambda inner, x: checkpoint(inner, x, use_reentrant=False),
}


@pytest.mark.parametrize("kind", AROUND)
def test_graphs_that_may_not_survive_a_second_pass_are_left_alone(tmp_path, kind: str) -> None:
    trained = []
    for every in (1, 1000):
        student = Around(distillation().student, AROUND[kind])
        folder = tmp_path / str(every)
        trainer(logger=CSVLogger(folder), log_every_n_steps=every).fit(distillation(student), loader(24))
        trained.append(student.state_dict())
        if every == 1:
            assert ("train/grad_norm/kd" in logged(folder)) == (kind == "not reentrant")
    assert_equal(*trained)


def test_a_compiled_student_is_left_alone(tmp_path) -> None:
    module = distillation()
    module.student.compile(backend="aot_eager")
    trainer(logger=CSVLogger(tmp_path), log_every_n_steps=1).fit(module, loader(24))
    assert "train/grad_norm/kd" not in logged(tmp_path)
