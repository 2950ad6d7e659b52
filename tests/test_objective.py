import pytest
import torch
from torch import Tensor, nn

from kd_lightning import Outputs
from kd_lightning.losses import KD, DeiTHard, DistillationLoss, HardLabel, Hint, deit_hard, hard_label, kd
from kd_lightning.objective import DistillationObjective, find_objective
from tests.losses.reference import wave
from tests.tiny import distillation

STUDENT, TEACHER, LABELS = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5), torch.arange(8)


def test_the_total_is_the_weighted_sum_of_the_terms() -> None:
    objective = DistillationObjective(
        {"hard_label": HardLabel(0.1), "kd": KD(2.0, weight=0.9), "deit": DeiTHard(weight=3.0)}
    )
    total, terms = objective(Outputs(STUDENT), Outputs(TEACHER), LABELS)
    raw = {
        "hard_label": hard_label(STUDENT, LABELS),
        "kd": kd(STUDENT, TEACHER, temperature=2.0),
        "deit": deit_hard(STUDENT, TEACHER),
    }
    assert {name: term.raw for name, term in terms.items()} == raw
    assert {name: term.weighted for name, term in terms.items()} == {
        "hard_label": 0.1 * raw["hard_label"],
        "kd": 0.9 * raw["kd"],
        "deit": 3.0 * raw["deit"],
    }
    torch.testing.assert_close(total, 0.1 * raw["hard_label"] + 0.9 * raw["kd"] + 3.0 * raw["deit"])


def test_a_weight_of_zero_shows_the_term_and_moves_nothing() -> None:
    both = DistillationObjective({"kd": KD(), "deit": DeiTHard(weight=0.0)})
    gradients = []
    for objective in (both, DistillationObjective({"kd": KD()})):
        student = STUDENT.clone().requires_grad_()
        total, _ = objective(Outputs(student), Outputs(TEACHER), None)
        total.backward()
        gradients.append(student.grad)
    assert torch.equal(*gradients)
    assert both(Outputs(STUDENT), Outputs(TEACHER), None)[1]["deit"].raw == deit_hard(STUDENT, TEACHER)


def test_a_weight_can_be_changed_between_steps() -> None:
    objective = DistillationObjective({"kd": KD(weight=1.0)})
    before, _ = objective(Outputs(STUDENT), Outputs(TEACHER), None)
    objective.losses.kd.weight = 0.25
    after, _ = objective(Outputs(STUDENT), Outputs(TEACHER), None)
    assert after == 0.25 * before


class Dtypes(DistillationLoss):
    """Notes in which precision it is called, and whether a product in it is kept in that precision."""

    seen: tuple[torch.dtype, ...] = ()

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        product = student.logits @ teacher.logits.T
        self.seen = (student.logits.dtype, student.features["f"].dtype, teacher.logits.dtype, product.dtype)
        return product.mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_run_in_float32_under_autocast_and_on_half_precision_outputs(dtype: torch.dtype) -> None:
    loss = Dtypes()
    student = Outputs(STUDENT.to(dtype), {"f": STUDENT.to(dtype)})
    with torch.autocast("cpu", dtype):
        DistillationObjective({"loss": loss})(student, student, None)
    assert loss.seen == (torch.float32,) * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [HardLabel(), KD(temperature=4.0), DeiTHard()])
def test_value_and_gradient_of_half_precision_logits_are_those_of_float32(
    loss: DistillationLoss, dtype: torch.dtype
) -> None:
    """Computed in half precision themselves, they would be off by 1e-3 and more."""
    student = (50 * STUDENT).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        total, _ = DistillationObjective({"loss": loss})(Outputs(student), Outputs((50 * TEACHER).to(dtype)), LABELS)
    total.backward()
    full = student.detach().float().requires_grad_()
    expected = loss(Outputs(full), Outputs((50 * TEACHER).to(dtype).float()), LABELS)
    expected.backward()
    assert total.dtype == torch.float32
    assert total == expected
    assert torch.equal(student.grad, full.grad.to(dtype))


@pytest.mark.parametrize("loss", [HardLabel(), KD(temperature=1.0), DeiTHard()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 8])
def test_extreme_logits_stay_finite(loss: DistillationLoss, dtype: torch.dtype, count: int) -> None:
    student = (STUDENT.sign() * 1e4)[:count].to(dtype).requires_grad_()
    teacher = (TEACHER.sign() * 1e4)[:count].to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        total, _ = DistillationObjective({"loss": loss})(Outputs(student), Outputs(teacher), LABELS[:count])
    total.backward()
    assert total.isfinite()
    assert student.grad.isfinite().all()


def test_a_hint_learns_under_autocast() -> None:
    objective = DistillationObjective({"hint": Hint("f")})
    student, teacher = (
        Outputs(wave((4, 3), a, 0.1), {"f": wave((4, d), a, 0.2).bfloat16()}) for a, d in ((1, 3), (2, 5))
    )
    objective.build(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = objective(student, teacher, None)
    total.backward()
    projector = objective.losses.hint.projector
    expected = torch.nn.functional.mse_loss(projector(student.features["f"].float()), teacher.features["f"].float())
    assert total == expected
    assert projector.weight.grad.any()


def test_losses_that_need_no_teacher_do_without() -> None:
    objective = DistillationObjective({"hard_label": HardLabel()})
    assert not objective.needs_teacher
    assert objective(Outputs(STUDENT), None, LABELS)[0] == hard_label(STUDENT, LABELS)
    assert DistillationObjective({"hard_label": HardLabel(), "kd": KD()}).needs_teacher


class Attached(KD):
    """Notes what it is given, in which order; refuses a network without a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[object] = []

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        self.calls.append("build")

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        if not hasattr(student, "weight"):
            raise ValueError("no weight")
        self.calls += [student, teacher]


def test_losses_are_built_once_and_shown_each_student_once() -> None:
    one, other, teacher = (nn.Linear(1, 1) for _ in range(3))
    objective = DistillationObjective({"kd": (loss := Attached())})
    for student in (one, one, other):
        objective.build(Outputs(STUDENT), Outputs(TEACHER), student, teacher)
    objective.attach(other, teacher)
    assert loss.calls == ["build", one, teacher, other, teacher]
    assert not list(objective.parameters())
    assert not objective.state_dict()


def test_an_error_in_attach_says_which_loss_it_is_about() -> None:
    objective = DistillationObjective({"mine": (loss := Attached())})
    with pytest.raises(ValueError, match="loss 'mine': no weight"):
        objective.build(Outputs(STUDENT), Outputs(TEACHER), nn.ReLU(), None)
    objective.build(Outputs(STUDENT), Outputs(TEACHER), student := nn.Linear(1, 1), None)
    assert loss.calls == ["build", student, None]


def test_the_layers_of_all_losses_are_asked_for_once() -> None:
    objective = DistillationObjective({"a": Hint("x", "p"), "b": Hint("y", "p"), "c": Hint("x", "q"), "kd": KD()})
    assert objective.student_layers == ("x", "y")
    assert objective.teacher_layers == ("p", "q")


def test_temperatures_are_those_of_losses_that_have_one() -> None:
    objective = DistillationObjective({"hard_label": HardLabel(), "kd": KD(3.0), "cold": KD(1.0)})
    assert objective.temperatures() == {"kd": 3.0, "cold": 1.0}
    objective.losses.kd.temperature = 2.0
    assert objective.temperatures() == {"kd": 2.0, "cold": 1.0}


def test_no_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one loss, got none"):
        DistillationObjective({})


def test_something_else_than_a_loss_is_refused() -> None:
    with pytest.raises(TypeError, match=r"loss 'ce' is a CrossEntropyLoss, expected a DistillationLoss"):
        DistillationObjective({"ce": nn.CrossEntropyLoss()})


def test_a_module_carries_at_most_one_that_is_found() -> None:
    module = distillation()
    assert find_objective(module) is module.objective
    assert find_objective(nn.Linear(1, 1)) is None
