import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_lightning import Outputs
from kd_lightning.losses import WKDLogits, standardize_logits, wkd_logits
from tests.losses.reference import numerical_gradient, softmax, wave
from tests.tiny import CLASSES, distillation, good_teacher, loader, trainer

STUDENT, TEACHER, LABELS = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5), torch.arange(8)


def line(classes: int) -> Tensor:
    """Costs of classes on a line: 1 − exp(−|i − j| / 3)."""
    place = torch.arange(classes, dtype=torch.float64)
    return 1 - (-(place[:, None] - place).abs() / 3).exp()


COST = line(10)
UNEVEN = wave((4, 4), 0.9, 0.3).abs() / 3  # neither symmetric nor zero on the diagonal


def wkd_by_loops(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    cost: Tensor,
    temperature: float = 2.0,
    gamma: float = 1.0,
    regularization: float = 0.05,
    iterations: int = 10,
    epsilon: float = 0.0,
) -> float:
    """The scalings themselves, on each sample's own kernel without row and column y."""
    total, c = 0.0, cost.tolist()
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        total -= softmax(t)[y] * math.log(softmax(s)[y])
        others = [i for i in range(len(s)) if i != y]
        p_s, p_t = (softmax([z[i] for i in others], temperature) for z in (s, t))
        kernel = [[math.exp(-c[i][j] / regularization) for j in others] for i in others]
        n = range(len(others))
        u = [1 / len(others)] * len(others)
        for _ in range(iterations):
            v = [p_t[j] / (sum(kernel[i][j] * u[i] for i in n) + epsilon) for j in n]
            u = [p_s[i] / (sum(kernel[i][j] * v[j] for j in n) + epsilon) for i in n]
        total += gamma * sum(u[i] * kernel[i][j] * v[j] * c[others[i]][others[j]] for i in n for j in n)
    return total / len(labels)


def cheapest(student: Tensor, teacher: Tensor, label: int, temperature: float) -> float:
    """Transport on a line with cost |i − j|: the distance between the cumulated probabilities."""
    others = [i for i in range(len(student)) if i != label]
    p_s, p_t = (softmax([z.tolist()[i] for i in others], temperature) for z in (student, teacher))
    cumulated, total = 0.0, 0.0
    for k, (here, there) in enumerate(pairwise(others)):
        cumulated += p_s[k] - p_t[k]
        total += abs(cumulated) * (there - here)
    return total


def test_value_of_the_authors_comes_out_with_their_denominators_and_ours_is_without() -> None:
    authors = 0.5475825731014288
    assert wkd_by_loops(STUDENT, TEACHER, LABELS, COST, epsilon=1e-8) == pytest.approx(authors, rel=1e-7)
    value = wkd_logits(STUDENT, TEACHER, LABELS, cost=COST).item()
    assert value == pytest.approx(wkd_by_loops(STUDENT, TEACHER, LABELS, COST), rel=1e-12)
    assert value == pytest.approx(authors, rel=5e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 8.0, "gamma": 600.0},
        {"temperature": 1.0, "regularization": 0.5, "iterations": 1},
        {"gamma": 0.0},
    ],
)
@pytest.mark.parametrize("cost", [line(4), UNEVEN])
def test_value_and_gradient_equal_the_formula(cost: Tensor, options: dict[str, float]) -> None:
    student, teacher, labels = STUDENT[:3, :4], TEACHER[:3, :4], torch.tensor([2, 0, 3])
    leaf = student.clone().requires_grad_()
    value = wkd_logits(leaf, teacher, labels, cost=cost, **options)
    value.backward()
    assert value.item() == pytest.approx(wkd_by_loops(student, teacher, labels, cost, **options), rel=1e-11)
    expected = numerical_gradient(lambda s: wkd_by_loops(s, teacher, labels, cost, **options), student)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-7)


def test_little_regularization_and_many_iterations_give_the_cheapest_transport() -> None:
    place = torch.arange(10, dtype=torch.float64) / 10
    cost = (place[:, None] - place).abs()
    options = {"cost": cost, "temperature": 4.0, "regularization": 0.016, "iterations": 3000}
    for i in range(2):
        arguments = STUDENT[i : i + 1], TEACHER[i : i + 1], LABELS[i : i + 1]
        hit = wkd_logits(*arguments, **{**options, "gamma": 0.0, "iterations": 1}).item()
        found = wkd_logits(*arguments, **options).item() - hit
        exact = cheapest(STUDENT[i], TEACHER[i], i, 4.0) / 10
        assert exact < found < exact + 0.016 * math.log(9)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    student = STUDENT[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: wkd_logits(s, TEACHER[:3], LABELS[:3], cost=COST), student)
    teacher, cost = TEACHER.clone().requires_grad_(), COST.clone().requires_grad_()
    wkd_logits(STUDENT.clone().requires_grad_(), teacher, LABELS, cost=cost).backward()
    assert teacher.grad is None
    assert cost.grad is None


def test_where_the_student_equals_the_teacher_entropy_leaves_some_transport() -> None:
    value = wkd_logits(STUDENT, STUDENT, LABELS, cost=COST, gamma=1.0).item()
    hit = wkd_logits(STUDENT, STUDENT, LABELS, cost=COST, gamma=0.0).item()
    assert 0 < value - hit < 0.05
    free = wkd_logits(STUDENT, STUDENT, LABELS, cost=torch.zeros(10, 10)).item()
    assert free == pytest.approx(hit, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_the_limit_and_not_nan(dtype: torch.dtype) -> None:
    student = torch.tensor([[0.0, 1e4, -1e4, 0.0], [1e4, -1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[0.0, -1e4, -1e4, 1e4], [1e4, -1e4, -1e4, 0.0]], dtype=dtype)
    value = wkd_logits(student, teacher, torch.tensor([0, 0]), cost=line(4), temperature=1.0)
    value.backward()
    # First sample: all mass goes from class 1 to class 3, and the teacher gives the label no probability. Second: both
    # are sure of the label, and of class 3 beside it.
    assert value.item() == pytest.approx((1 - math.exp(-2 / 3)) / 2, rel=1e-5)
    assert student.grad.isfinite().all()


def test_float32_at_the_largest_costs_that_are_allowed() -> None:
    cost = 3.0 * (1 - torch.eye(10, dtype=torch.float64))
    student = STUDENT.float().requires_grad_()
    value = wkd_logits(student, TEACHER.float(), LABELS, cost=cost.float())
    value.backward()
    assert value.item() == pytest.approx(wkd_by_loops(STUDENT, TEACHER, LABELS, cost), rel=1e-5)
    exact = STUDENT.clone().requires_grad_()
    wkd_logits(exact, TEACHER, LABELS, cost=cost).backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-3, atol=1e-5)


def test_two_classes_leave_nothing_to_transport() -> None:
    student = STUDENT[:, :2].clone().requires_grad_()
    labels = torch.tensor([0, 1] * 4)
    value = wkd_logits(student, TEACHER[:, :2], labels, cost=line(2))
    value.backward()
    assert value.item() == pytest.approx(
        wkd_logits(STUDENT[:, :2], TEACHER[:, :2], labels, cost=line(2), gamma=0.0).item()
    )
    assert student.grad.isfinite().all()


def test_samples_without_label_add_nothing() -> None:
    labels = LABELS.clone()
    labels[::2] = -100
    student = STUDENT.clone().requires_grad_()
    value = wkd_logits(student, TEACHER, labels, cost=COST)
    value.backward()
    assert value.item() == pytest.approx(
        wkd_logits(STUDENT[1::2], TEACHER[1::2], LABELS[1::2], cost=COST).item(), rel=1e-13
    )
    assert not student.grad[::2].any()
    assert student.grad[1::2].any()


def test_a_batch_without_labels_gives_zero_with_a_gradient_of_zero() -> None:
    loss = WKDLogits(cost=COST)
    for target in (None, torch.full((8,), -100)):
        student = STUDENT.clone().requires_grad_()
        value = loss(Outputs(student), Outputs(TEACHER), target)
        value.backward()
        assert value.item() == 0
        assert not student.grad.any()


def test_tokens_and_pixels_count_as_samples() -> None:
    expected = wkd_logits(STUDENT, TEACHER, LABELS, cost=COST)
    tokens = wkd_logits(STUDENT.reshape(2, 4, 10), TEACHER.reshape(2, 4, 10), LABELS.reshape(2, 4), cost=COST)
    student, teacher = (x.reshape(2, 2, 2, 10).permute(0, 3, 1, 2) for x in (STUDENT, TEACHER))
    assert tokens.item() == expected.item()
    assert wkd_logits(student, teacher, LABELS.reshape(2, 2, 2), cost=COST).item() == expected.item()


@settings(max_examples=25)
@given(samples=st.permutations(range(8)), classes=st.permutations(range(10)), shift=st.floats(-20, 20))
def test_order_and_a_common_shift_change_nothing(samples: list[int], classes: list[int], shift: float) -> None:
    labels = torch.tensor([classes.index(y) for y in LABELS[samples].tolist()])
    value = wkd_logits(
        STUDENT[samples][:, classes] + shift, TEACHER[samples][:, classes], labels, cost=COST[classes][:, classes]
    )
    assert value.item() == pytest.approx(wkd_logits(STUDENT, TEACHER, LABELS, cost=COST).item(), rel=1e-10)


def test_the_module_is_the_function_at_its_present_settings() -> None:
    loss = WKDLogits(cost=COST.tolist(), temperature=4.0, gamma=3.0, standardize=True).double()
    for gamma, temperature in ((3.0, 4.0), (0.5, 1.0)):
        loss.gamma, loss.temperature = gamma, temperature
        value = loss(Outputs(STUDENT), Outputs(TEACHER), LABELS)
        expected = wkd_logits(
            standardize_logits(STUDENT),
            standardize_logits(TEACHER),
            LABELS,
            cost=COST,
            gamma=gamma,
            temperature=temperature,
        )
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)  # the list became float32


def test_costs_come_from_the_teachers_last_layer() -> None:
    loss, teacher = WKDLogits("head", sharpness=2.0), good_teacher()
    loss.attach(nn.Identity(), teacher)
    rows = teacher.head.weight.tolist()
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
            assert loss.cost[i, j].item() == pytest.approx(1 - math.exp(-2 * (1 - cosine)), abs=1e-6)
    assert not loss.cost.requires_grad
    assert not loss.cost.diagonal().any()


def test_a_last_layer_may_be_a_convolution_and_have_a_row_of_zeros() -> None:
    head = nn.Conv2d(5, 3, 1)
    nn.init.zeros_(head.weight[1])
    loss = WKDLogits("0")
    loss.attach(nn.Identity(), nn.Sequential(head))
    assert loss.cost.shape == (3, 3)
    assert loss.cost[1].tolist() == pytest.approx([1 - math.exp(-1), 0, 1 - math.exp(-1)])


def test_a_fit_reads_the_costs_and_leaves_them_out_of_the_checkpoint() -> None:
    module = distillation(losses={"wkd_logits": WKDLogits("head", temperature=4.0)})
    fit = trainer()
    fit.fit(module, loader(16))
    assert fit.global_step == 2
    assert module.losses.wkd_logits.cost.shape == (CLASSES, CLASSES)
    assert not module.objective.state_dict()


def test_a_layer_that_has_no_row_for_each_class_is_refused() -> None:
    loss = WKDLogits("norm")
    with pytest.raises(ValueError, match=r"expected a weight of one row a class in .* layer 'norm', got \(16,\)"):
        loss.attach(nn.Identity(), good_teacher())
    with pytest.raises(ValueError, match="expected a weight of one row a class in the teacher's layer 'act', got none"):
        WKDLogits("act").attach(nn.Identity(), good_teacher())
    with pytest.raises(ValueError, match=r"has no layer 'heed': .* nearest: head"):
        WKDLogits("heed").attach(nn.Identity(), good_teacher())
    with pytest.raises(ValueError, match=r"loss 'wkd_logits': expected a cost of shape \(4, 4\), .* got \(16, 16\)"):
        trainer().fit(distillation(losses={"wkd_logits": WKDLogits("stem")}), loader(16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected teacher_classifier or cost, got neither"),
        ({"teacher_classifier": "fc", "cost": COST}, "expected teacher_classifier or cost, got both"),
        ({"cost": COST, "temperature": 0.0}, r"expected temperature > 0, got 0\.0"),
        ({"cost": COST, "gamma": -1.0}, r"expected gamma >= 0, got -1\.0"),
        ({"cost": COST, "sharpness": 0.0}, r"expected sharpness > 0, got 0\.0"),
        ({"cost": COST, "regularization": 0.0}, r"expected regularization > 0 and iterations >= 1, got 0\.0 and 10"),
        ({"cost": COST, "iterations": 0}, r"expected regularization > 0 and iterations >= 1, got 0\.05 and 0"),
        ({"cost": COST[:3]}, r"expected a cost of shape \(3, 3\), one row and one column a class, got \(3, 10\)"),
        ({"cost": -COST}, r"expected costs from 0 to 60 times the regularization 0\.05, got -0\.95"),
        ({"cost": COST, "regularization": 0.01}, r"expected costs from 0 to 60 times .* got 0 to 0\.95"),
        ({"cost": COST * math.nan}, "expected costs from 0 to 60 times .* got nan to nan"),
        ({"cost": COST, "weight": -1.0}, r"expected weight >= 0, got -1\.0"),
    ],
)
def test_wrong_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WKDLogits(**options)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a cost of shape \(10, 10\), .* got \(4, 4\)"):
        wkd_logits(STUDENT, TEACHER, LABELS, cost=UNEVEN)
    with pytest.raises(ValueError, match="expected class indices as target, got probabilities"):
        wkd_logits(STUDENT, TEACHER, TEACHER.softmax(-1), cost=COST)
    with pytest.raises(ValueError, match=r"student logits \(8, 10\) and teacher logits \(8, 9\) differ"):
        wkd_logits(STUDENT, TEACHER[:, :9], LABELS, cost=COST)
    with pytest.raises(ValueError, match="expected temperature > 0"):
        wkd_logits(STUDENT, TEACHER, LABELS, cost=COST, temperature=-1.0)
