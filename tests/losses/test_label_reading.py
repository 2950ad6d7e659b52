"""What the losses that read labels have in common: DKD, NKD, RLD."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import DKD, NKD, RLD, DistillationLoss, dkd, nkd, rld, standardize_logits
from tests.losses.reference import wave

STUDENT, TEACHER, LABELS = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5), torch.arange(8)
Loss = Callable[..., Tensor]

every_loss = pytest.mark.parametrize("loss", [dkd, nkd, rld], ids=["dkd", "nkd", "rld"])
every_module = pytest.mark.parametrize(
    ("module", "loss"), [(DKD, dkd), (NKD, nkd), (RLD, rld)], ids=["DKD", "NKD", "RLD"]
)


@pytest.mark.parametrize(
    "loss", [dkd, partial(nkd, temperature=2.0), partial(rld, temperature=2.0)], ids=["dkd", "nkd", "rld"]
)
def test_the_gradient_is_right(loss: Loss) -> None:
    assert torch.autograd.gradcheck(lambda s: loss(s, TEACHER, LABELS), STUDENT.clone().requires_grad_())


@every_loss
def test_no_gradient_is_the_teachers(loss: Loss) -> None:
    teacher = TEACHER.clone().requires_grad_()
    loss(STUDENT.clone().requires_grad_(), teacher, LABELS).backward()
    assert teacher.grad is None


@every_loss
def test_samples_without_label_add_nothing(loss: Loss) -> None:
    some = torch.tensor([0, -100, 2, -100, -100, 5, 6, -100])
    kept = some != -100
    student = STUDENT.clone().requires_grad_()
    value = loss(student, TEACHER, some)
    value.backward()
    torch.testing.assert_close(value, loss(STUDENT[kept], TEACHER[kept], some[kept]))
    assert not student.grad[~kept].any()


@pytest.mark.parametrize("target", [torch.full((8,), -100), None])
@pytest.mark.parametrize("module", [DKD, NKD, RLD])
def test_a_batch_without_labels_gives_zero_with_a_gradient_of_zero(
    module: type[DistillationLoss], target: Tensor | None
) -> None:
    student = STUDENT.clone().requires_grad_()
    value = module()(Outputs(student), Outputs(TEACHER), target)
    value.backward()
    assert value.item() == 0
    assert student.grad.tolist() == torch.zeros_like(STUDENT).tolist()


@every_loss
def test_one_sample_counts_as_itself(loss: Loss) -> None:
    each = [loss(STUDENT[i : i + 1], TEACHER[i : i + 1], LABELS[i : i + 1]).item() for i in range(8)]
    assert loss(STUDENT, TEACHER, LABELS).item() == pytest.approx(sum(each) / 8, rel=1e-12)


@every_loss
def test_tokens_and_pixels_count_as_samples(loss: Loss) -> None:
    expected = loss(STUDENT, TEACHER, LABELS)
    tokens = loss(STUDENT.reshape(2, 4, 10), TEACHER.reshape(2, 4, 10), LABELS.reshape(2, 4))
    pixels = [x.reshape(2, 2, 2, 10).movedim(-1, 1) for x in (STUDENT, TEACHER)]
    torch.testing.assert_close(tokens, expected)
    torch.testing.assert_close(loss(*pixels, LABELS.reshape(2, 2, 2)), expected)


@every_loss
@settings(max_examples=25)
@given(
    shift=st.lists(st.floats(-20, 20), min_size=8, max_size=8),
    samples=st.permutations(range(8)),
    classes=st.permutations(range(10)),
)
def test_shifts_and_the_order_of_samples_and_classes_change_nothing(
    loss: Loss, shift: list[float], samples: list[int], classes: list[int]
) -> None:
    moved = torch.tensor(shift, dtype=torch.float64)[:, None]
    renamed = torch.tensor([classes.index(y) for y in LABELS.tolist()])[samples]
    other = loss((STUDENT + moved)[samples][:, classes], (TEACHER - moved)[samples][:, classes], renamed)
    assert other.item() == pytest.approx(loss(STUDENT, TEACHER, LABELS).item(), rel=1e-9)


@every_module
def test_standardised_logits_are_compared_where_asked_for(module: type[DistillationLoss], loss: Loss) -> None:
    value = module(standardize=True)(Outputs(STUDENT), Outputs(TEACHER), LABELS)
    torch.testing.assert_close(value, loss(standardize_logits(STUDENT), standardize_logits(TEACHER), LABELS))


@every_loss
def test_inputs_that_cannot_be_compared_are_refused(loss: Loss) -> None:
    with pytest.raises(ValueError, match=r"student logits \(8, 10\) and teacher logits \(8, 9\) differ"):
        loss(STUDENT, TEACHER[:, :9], LABELS)
    with pytest.raises(ValueError, match="expected temperature > 0, got -1"):
        loss(STUDENT, TEACHER, LABELS, temperature=-1)
    with pytest.raises(ValueError, match="got probabilities"):
        loss(STUDENT, TEACHER, torch.softmax(TEACHER, -1))
    with pytest.raises(ValueError, match=r"expected one label for each of the logits \(8, 10\), got a target \(7,\)"):
        loss(STUDENT, TEACHER, LABELS[:7])
    with pytest.raises(ValueError, match="expected at least 2 classes, got 1"):
        loss(STUDENT[:, :1], TEACHER[:, :1], LABELS * 0)


@every_loss
def test_a_learnt_temperature_gets_its_gradient(loss: Loss) -> None:
    temperature = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: loss(STUDENT, TEACHER, LABELS, temperature=t), temperature)
