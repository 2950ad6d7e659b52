"""The k best classes in the place of a teacher's logits: each loss takes them, or is refused by name."""

import inspect

import pytest
import torch
from torch import Tensor

from kd_lightning import Outputs, losses
from kd_lightning.losses import KD, CurriculumTemperature, DeiTHard, ForwardKL, HardLabel, Hint, TopKKL, top_k_kl
from kd_lightning.losses.base import DistillationLoss, LogitLoss
from kd_lightning.objective import DistillationObjective
from kd_lightning.outputs import AnyOutputs, TopK, classes_last
from kd_lightning.preflight import check_outputs
from kd_lightning.tasks import Classification
from kd_lightning.tracking.metrics import agreement
from tests.losses.reference import wave

SHAPES = {"vectors": (6, 5), "tokens": (2, 3, 5), "dense": (2, 5, 2, 2)}


def pair(kind: str = "vectors") -> tuple[Tensor, Tensor]:
    return wave(SHAPES[kind], 0.7, 0.1), wave(SHAPES[kind], 1.3, 0.5)


def best(logits: Tensor, k: int) -> TopK:
    found = classes_last(logits).log_softmax(-1).topk(k, -1)
    return TopK.of(found.indices, found.values)


def value(loss: DistillationLoss, student: Tensor, teacher: AnyOutputs, target: Tensor | None = None) -> Tensor:
    return DistillationObjective({"loss": loss})(Outputs(student), teacher, target)[0]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("make", [KD, ForwardKL])
def test_all_classes_give_what_the_logits_give(make: type[KD], kind: str) -> None:
    student, teacher = pair(kind)
    expected = value(make(temperature=3.0), student, Outputs(teacher))
    torch.testing.assert_close(value(make(temperature=3.0), student, best(teacher, 5)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [KD, ForwardKL, lambda **options: TopKKL(3, **options)])
def test_fewer_are_the_divergence_with_a_tail_at_the_losss_temperature(make: type[KD]) -> None:
    student, teacher = pair()
    given = best(teacher, 3)
    expected = top_k_kl(student, given.indices, given.log_probs, temperature=3.0)
    assert torch.equal(value(make(temperature=3.0), student, given), expected)
    assert expected > 0


@pytest.mark.parametrize("loss", [KD(3.0), TopKKL(3, temperature=0.5), TopKKL(3, tail=False), DeiTHard()])
@pytest.mark.parametrize("filler", [-1, 0, 99])
def test_what_fills_up_says_nothing_of_its_class(loss: DistillationLoss, filler: int) -> None:
    student, teacher = pair()
    two = best(teacher, 2)
    indices = torch.nn.functional.pad(two.indices, (1, 1), value=filler)
    filled = TopK.of(indices, torch.nn.functional.pad(two.log_probs, (1, 1), value=-torch.inf))
    gradients = []
    for given in (two, filled):
        z = student.clone().requires_grad_()
        value(loss, z, given).backward()
        gradients.append(z.grad)
    torch.testing.assert_close(value(loss, student, filled), value(loss, student, two))
    torch.testing.assert_close(*gradients)
    check_outputs(DistillationObjective({"it": loss}), Outputs(student), filled, Classification())


def test_of_more_than_it_wants_a_loss_takes_the_best_however_they_are_ordered() -> None:
    student, teacher = pair()
    indices, log_probs, _ = best(teacher, 4)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = TopK.of(indices[:, order], log_probs[:, order])
    assert torch.equal(value(TopKKL(2), student, shuffled), value(TopKKL(2), student, Outputs(teacher)))


@pytest.mark.parametrize("kind", SHAPES)
def test_the_teachers_hard_label_is_the_best_of_them(kind: str) -> None:
    student, teacher = pair(kind)
    given = best(teacher, 3)
    flipped = TopK.of(given.indices.flip(-1), given.log_probs.flip(-1))
    assert torch.equal(value(DeiTHard(), student, flipped), value(DeiTHard(), student, Outputs(teacher)))


def test_a_temperature_that_is_learnt_softens_them_too() -> None:
    student, teacher = pair()
    loss = CurriculumTemperature(KD())
    value(loss, student, best(teacher, 3)).backward()
    assert loss.theta.grad
    expected = value(KD(float(loss.temperature)), student, best(teacher, 3))
    torch.testing.assert_close(value(loss, student, best(teacher, 3)).detach(), expected, rtol=1e-6, atol=0)


def test_half_precision_log_probabilities_are_computed_on_in_float32() -> None:
    student, teacher = pair()
    indices, log_probs, _ = best(teacher, 3)
    half = TopK.of(indices.to(torch.int32), log_probs.half())
    expected = top_k_kl(student, indices, log_probs.half().float(), temperature=4.0)
    assert torch.equal(value(KD(), student, half), expected)


@pytest.mark.parametrize("kind", SHAPES)
def test_agreement_and_accuracy_are_those_of_the_logits(kind: str) -> None:
    student, teacher = pair(kind)
    target = classes_last(student).argmin(-1)
    same = agreement(Classification(), Outputs(student), best(teacher, 2))
    assert torch.equal(same, agreement(Classification(), Outputs(student), Outputs(teacher)))
    assert same.any()
    assert not same.all()
    task = Classification()
    assert torch.equal(task.scores(best(teacher, 2), target), task.scores(Outputs(teacher), target))


# Refused


def refusals() -> dict[str, DistillationLoss]:
    own = {"ULD": losses.ULD(), "WKDLogits": losses.WKDLogits("fc"), "ABKD": losses.ABKD(0.5, 0.5)}
    made = {
        name: own.get(name) or make()
        for name, make in vars(losses).items()
        if inspect.isclass(make) and issubclass(make, LogitLoss) and make not in (LogitLoss, TopKKL)
    }
    return {name: loss for name, loss in made.items() if not loss.takes_top_k}


@pytest.mark.parametrize("name", refusals())
def test_a_loss_that_reads_all_logits_is_refused_by_name(name: str) -> None:
    student, teacher = pair()
    objective = DistillationObjective({"kd": KD(), "mine": refusals()[name]})
    with pytest.raises(ValueError, match=r"losses \['mine'\] read the teacher's logits of all classes, got its 3 best"):
        check_outputs(objective, Outputs(student), best(teacher, 3), Classification())
    # Also by somebody who calls the objective in a training_step of their own.
    with pytest.raises(ValueError, match=r"loss 'mine': .*reads the teacher's logits of all classes, got its 3 best"):
        objective(Outputs(student), best(teacher, 3), torch.arange(6) % 5)


def test_most_losses_on_logits_are_among_them() -> None:
    assert {"DKD", "DIST", "NKD", "MLKD", "LogitsMSE", "ReverseKL", "ULD", "DeiTSoft"} <= refusals().keys()


@pytest.mark.parametrize("loss", [KD(standardize=True), ForwardKL(standardize=True), TopKKL(2, standardize=True)])
def test_what_is_not_known_cannot_be_standardised(loss: DistillationLoss) -> None:
    student, teacher = pair()
    with pytest.raises(ValueError, match=r"got its 3 best: take .*without standardize"):
        value(loss, student, best(teacher, 3))


def test_losses_that_read_no_logits_of_the_teacher_are_not_refused() -> None:
    student, teacher = pair()
    objective = DistillationObjective({"hard_label": HardLabel(), "hint": Hint("f"), "cwd": losses.CWD("f")})
    check_outputs(objective, Outputs(student), best(teacher, 3), Classification())


def test_losses_of_somebody_who_has_not_said_so_are_refused() -> None:
    class Mine(DistillationLoss):
        pass

    student, teacher = pair()
    with pytest.raises(ValueError, match=r"losses \['mine'\] read .*take kd, forward_kl, top_k_kl or deit_hard"):
        check_outputs(DistillationObjective({"mine": Mine()}), Outputs(student), best(teacher, 3), Classification())


def check(indices: list[list[int]], log_probs: Tensor) -> None:
    student = Outputs(wave((len(indices), 5), 1.0, 0.2))
    given = TopK.of(torch.tensor(indices), log_probs)
    check_outputs(DistillationObjective({"kd": KD()}), student, given, Classification())


HALVES = torch.tensor([[0.5, 0.25]]).log()


def test_classes_that_the_student_has_not_are_refused() -> None:
    check([[4, 0]], HALVES)
    with pytest.raises(ValueError, match="best classes hold 5, expected 0 to 4, as the student has 5 classes"):
        check([[5, 0]], HALVES)
    with pytest.raises(ValueError, match="best classes hold -1, expected 0 to 4"):
        check([[0, -1]], HALVES)
    check([[0, -1]], torch.tensor([[0.0, -torch.inf]]))  # fills up


@pytest.mark.parametrize("wrong", [torch.tensor([[3.0, 1.0]]), torch.tensor([[0.5, 0.25]])])
def test_logits_and_probabilities_are_not_taken_for_log_probabilities(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="together, expected log-probabilities at T = 1 of a sum up to 1"):
        check([[1, 0]], wrong)


def test_a_class_that_comes_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="hold a class twice"):
        check([[1, 1]], HALVES)


def test_indices_and_log_probabilities_belong_together() -> None:
    with pytest.raises(ValueError, match=r"of one shape, got \(2, 3\) and \(2, 2\)"):
        TopK.of(torch.zeros(2, 3), torch.zeros(2, 2))
