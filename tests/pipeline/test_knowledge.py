"""What the report computes of outputs, against loops, autograd and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from kd_lightning.losses import KD, HardLabel
from kd_lightning.outputs import Outputs
from kd_lightning.pipeline import knowledge
from kd_lightning.tasks import Classification

CLASSES = 5


@pytest.fixture
def logits():
    return 2 * np.random.default_rng(0).standard_normal((60, CLASSES)).astype(np.float32)


LABELS = np.arange(60) % CLASSES


def test_the_soft_targets_share_of_the_gradient_is_that_of_the_losses(logits) -> None:
    student = np.random.default_rng(1).standard_normal(logits.shape).astype(np.float32)
    found = knowledge.gradient_share(student, logits, LABELS, (0.9, 0.1))
    for t, share in zip(knowledge.TEMPERATURES, found, strict=True):
        norms = []
        for loss in (KD(temperature=t, weight=0.9), HardLabel(weight=0.1)):
            z = torch.from_numpy(student).double().requires_grad_()
            raw = loss(Outputs(z), Outputs(torch.from_numpy(logits).double()), torch.from_numpy(LABELS))
            (loss.weight * raw * len(LABELS)).backward()
            norms.append(z.grad.norm(dim=1))
        assert share == pytest.approx(float((norms[0] / (norms[0] + norms[1])).mean()), rel=1e-5)


def test_calibration_error_is_torchmetrics_with_as_many_bins(logits) -> None:
    p = knowledge.softmax(logits)
    found = knowledge.calibration(p.max(-1), p.argmax(-1) == LABELS)
    expected = multiclass_calibration_error(torch.from_numpy(p), torch.from_numpy(LABELS), CLASSES, n_bins=15)
    assert found.ece == pytest.approx(float(expected), abs=1e-6)
    assert sum(found.answers) == len(LABELS)
    right = np.average(found.right, weights=found.answers)
    assert right == pytest.approx((p.argmax(-1) == LABELS).mean())


def test_entropy_over_temperatures_is_the_tasks(logits) -> None:
    found = knowledge.over_temperatures(logits)
    for t, share in zip(found["temperature"], found["entropy"], strict=True):
        assert share == pytest.approx(float(Classification().entropy(torch.from_numpy(logits), t)), rel=1e-5)
    assert found["others"] == sorted(found["others"])
    assert found["others"][0] == pytest.approx(1 - torch.softmax(torch.from_numpy(logits), -1).amax(-1).mean().item())


def test_resemblance_is_what_is_given_to_each_other_class(logits) -> None:
    p = knowledge.softmax(logits)
    found = knowledge.resemblance(p, LABELS)
    for i in range(CLASSES):
        given = [sum(p[n, j] for n in range(60) if LABELS[n] == i) for j in range(CLASSES)]
        rest = sum(given) - given[i]
        assert found[i] == pytest.approx([0 if i == j else given[j] / rest for j in range(CLASSES)])


def test_what_is_inherited_does_not_depend_on_how_sure_the_student_is(logits) -> None:
    teacher = knowledge.resemblance(knowledge.softmax(logits), LABELS)
    assert knowledge.inherited(teacher, teacher) == pytest.approx(1)
    assert knowledge.inherited(1 - teacher, teacher) == pytest.approx(-1)
    other = knowledge.resemblance(knowledge.softmax(np.random.default_rng(5).standard_normal(logits.shape)), LABELS)
    assert abs(knowledge.inherited(other, teacher)) < 0.6
    assert knowledge.inherited(teacher[:2, :2], teacher[:2, :2]) is None


def test_examples_are_of_different_classes_while_there_are_any() -> None:
    score, groups = np.array([9.0, 8, 7, 6, -math.inf]), np.array([0, 0, 1, 1, 2])
    assert knowledge.choose(score, groups, 2) == [0, 2]
    assert knowledge.choose(score, groups, 3) == [0, 2, 1]
    assert knowledge.choose(score, groups, 9) == [0, 2, 1, 3]


def test_divergence_is_zero_of_equals_and_one_bit_of_what_has_nothing_in_common() -> None:
    p, q = np.array([[0.5, 0.5, 0.0]]), np.array([[0.0, 0.0, 1.0]])
    assert knowledge.divergence(p, p) == pytest.approx([0])
    assert knowledge.divergence(p, q) == pytest.approx([1])


def test_curves_keep_first_and_last_step_and_the_range_over_seeds() -> None:
    curves = [{step: step + seed for step in range(0, 1000, 2)} for seed in (0, 1)]
    found = knowledge.thinned(curves, most=11)
    assert len(found["step"]) == 11
    assert (found["step"][0], found["step"][-1]) == (0, 998)
    assert found["mean"] == [step + 0.5 for step in found["step"]]
    assert found["high"] == [low + 1 for low in found["low"]]
    assert knowledge.thinned([{1: 2.0, 3: 4.0}, {1: 4.0, 5: 1.0}])["step"] == [1]
