import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from kd_lightning.losses import KD, HardLabel
from kd_lightning.objective import Term
from kd_lightning.tracking.gradient_norms import gradient_norms
from tests.tiny import distillation, loader, logged, trainer


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
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_stop_no_training(tmp_path, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.detach().requires_grad_() if self.training else x
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    student = Checkpointed(distillation().student)
    trainer(logger=CSVLogger(tmp_path), log_every_n_steps=1).fit(distillation(student), loader(24))
    assert ("train/grad_norm/kd" in logged(tmp_path)) != reentrant
