import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_lightning import Outputs
from kd_lightning.losses import OFD, partial_l2
from tests.losses.reference import numerical_gradient, wave
from tests.tiny import assert_equal, distillation, loader, trainer, weights

STUDENT, TEACHER = wave((4, 6, 8, 8), 0.37, 0.2), wave((4, 6, 8, 8), 0.53, 0.9)
SMALL, SMALL_TEACHER = STUDENT[:2, :3, :2, :4], TEACHER[:2, :3, :2, :4]
MARGIN = torch.tensor([-0.5, -1.5, -0.01], dtype=torch.float64)


def outputs(*features: Tensor) -> Outputs:
    layers = {f"layer{i}": feature for i, feature in enumerate(features)}
    return Outputs(torch.zeros(len(features[0]), 2, dtype=features[0].dtype), layers)


def norm(mean: list[float], deviation: list[float]) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(len(mean))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(deviation))
        layer.bias.copy_(torch.tensor(mean))
    return layer


def built(students: list[Tensor], teachers: list[Tensor], norms: list[nn.Module]) -> OFD:
    torch.manual_seed(0)
    loss = OFD([f"layer{i}" for i in range(len(students))], [f"layer{i}" for i in range(len(students))])
    loss.build(outputs(*students), outputs(*teachers))
    loss.attach(nn.Identity(), nn.ModuleDict({f"layer{i}": layer for i, layer in enumerate(norms)}))
    return loss.double()


def ofd_by_loops(student: Tensor, teacher: Tensor, margin: Tensor) -> float:
    """Case by case, as the paper writes the margin ReLU and the partial distance."""
    total = 0.0
    for b, c, h, w in itertools.product(*map(range, student.shape)):
        s, t, m = student[b, c, h, w].item(), teacher[b, c, h, w].item(), margin[c].item()
        if t > 0:
            total += (s - t) ** 2
        elif t > m:
            total += (s - t) ** 2 if s > t else 0.0
        else:
            total += (s - m) ** 2 if s > m else 0.0
    return total / len(student)


def mean_of_negatives(mean: float, deviation: float) -> float:
    """E[x | x < 0] of a normal distribution, by the trapezoidal rule from 12 deviations below 0."""
    steps = 40_000
    lowest = min(mean, 0.0) - 12 * deviation
    points = [lowest * (1 - i / steps) for i in range(steps + 1)]
    densities = [math.exp(-(((x - mean) / deviation) ** 2) / 2) for x in points]
    densities[0], densities[-1] = densities[0] / 2, densities[-1] / 2
    return sum(x * d for x, d in zip(points, densities, strict=True)) / sum(densities)


def test_value_of_the_authors() -> None:
    margin = torch.full((6,), -0.5, dtype=torch.float64)
    assert partial_l2(STUDENT, TEACHER, margin=margin).item() == pytest.approx(2356.57277470939, rel=1e-13)


def test_value_and_gradient_equal_the_formula() -> None:
    student = SMALL.clone().requires_grad_()
    loss = partial_l2(student, SMALL_TEACHER, margin=MARGIN)
    loss.backward()
    assert loss.item() == pytest.approx(ofd_by_loops(SMALL, SMALL_TEACHER, MARGIN), rel=1e-12)
    expected = numerical_gradient(lambda s: ofd_by_loops(s, SMALL_TEACHER, MARGIN), SMALL)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-7)


def test_every_case_of_the_formula_is_in_these_inputs() -> None:
    aim = torch.maximum(SMALL_TEACHER, MARGIN[:, None, None])
    for teacher in (SMALL_TEACHER > 0, (SMALL_TEACHER <= 0) & (aim == SMALL_TEACHER), aim > SMALL_TEACHER):
        assert (teacher & (aim < SMALL)).any()
        assert (teacher & (aim > SMALL)).any()


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    student, teacher = SMALL.clone().requires_grad_(), SMALL_TEACHER.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: partial_l2(s, SMALL_TEACHER, margin=MARGIN), student)
    partial_l2(student, teacher, margin=MARGIN).backward()
    assert teacher.grad is None


def test_zero_where_the_student_equals_the_teacher() -> None:
    student = TEACHER.clone().requires_grad_()
    loss = partial_l2(student, TEACHER, margin=torch.full((6,), -4.0, dtype=torch.float64))
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def test_vectors_are_compared_too() -> None:
    student, teacher = (x.movedim(1, -1).reshape(-1, 3) for x in (SMALL, SMALL_TEACHER))
    expected = ofd_by_loops(SMALL, SMALL_TEACHER, MARGIN) / 8  # of 8 positions, each a sample here
    assert partial_l2(student, teacher, margin=MARGIN).item() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=25)
@given(samples=st.permutations(range(2)), channels=st.permutations(range(3)), scale=st.floats(0.01, 100))
def test_order_changes_nothing_and_scale_its_square(samples: list[int], channels: list[int], scale: float) -> None:
    student, teacher = (scale * x[samples][:, channels] for x in (SMALL, SMALL_TEACHER))
    value = partial_l2(student, teacher, margin=scale * MARGIN[channels]).item()
    assert value == pytest.approx(scale**2 * partial_l2(SMALL, SMALL_TEACHER, margin=MARGIN).item(), rel=1e-9)


@settings(max_examples=25)
@given(lower=st.floats(0.0, 1e4))
def test_a_student_that_is_inactive_enough_is_left_alone(lower: float) -> None:
    silent = -SMALL_TEACHER.abs()
    aim = torch.maximum(silent, MARGIN[:, None, None])
    assert partial_l2(aim - lower, silent, margin=MARGIN).item() == 0


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.7, 0.4), (-0.9, 0.3), (2.0, -0.5), (-3.0, 0.2)])
def test_the_margin_is_the_mean_of_the_negative_responses(mean: float, deviation: float) -> None:
    loss = built([SMALL[:, :1]], [SMALL_TEACHER[:, :1]], [norm([mean], [deviation])])
    assert loss.margin0.item() == pytest.approx(mean_of_negatives(mean, abs(deviation)), rel=1e-5)


def test_channels_that_are_never_or_always_negative_have_a_margin() -> None:
    layer = norm([1e4, -1e4, 3.0, -3.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0])
    margin = built([STUDENT[:, :5]], [TEACHER[:, :5]], [layer]).margin0
    # β − γ·(r + 1/r − ...) is −γ²/β for large r = β/γ; where γ is 0, every response is β.
    assert margin.tolist() == pytest.approx([-1e-4, -1e4, 0.0, -3.0, 0.0], rel=1e-3, abs=1e-9)


def test_a_normalisation_without_scale_has_that_of_the_standard_normal_distribution() -> None:
    loss = built([SMALL], [SMALL_TEACHER], [nn.BatchNorm2d(3, affine=False)])
    assert loss.margin0.tolist() == pytest.approx([-math.sqrt(2 / math.pi)] * 3, rel=1e-6)


def test_the_margins_are_those_of_the_network_that_was_shown_last() -> None:
    loss = built([SMALL[:, :1]], [SMALL_TEACHER[:, :1]], [norm([0.0], [1.0])])
    loss.attach(nn.Identity(), nn.ModuleDict({"layer0": norm([-0.9], [0.3])}))
    assert loss.margin0.item() == pytest.approx(mean_of_negatives(-0.9, 0.3), rel=1e-5)


def test_the_module_weighs_deep_layers_most_and_connects_the_channels() -> None:
    students = [wave((3, 5, 4, 6), 0.3, 0.1), wave((3, 4, 3, 2), 0.7, 0.4)]
    teachers = [wave((3, 2, 2, 3), 0.5, 0.2), wave((3, 3, 3, 2), 0.9, 0.6)]
    loss = built(students, teachers, [norm([0.1, -0.2], [1.0, 0.5]), norm([0.0, 0.3, 0.9], [1.0, 2.0, 0.1])])
    pooled, total = students[0].reshape(3, 5, 2, 2, 3, 2).mean((3, 5)), 0.0
    for i, (s, t, weight) in enumerate(zip((pooled, students[1]), teachers, (0.5, 1.0), strict=True)):
        x = torch.einsum("dc,bchw->bdhw", loss.connectors[i][0].weight[:, :, 0, 0], s)
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        total += weight * ofd_by_loops((x - mean) / (variance + 1e-5).sqrt(), t, loss.get_buffer(f"margin{i}"))
    assert loss(outputs(*students), outputs(*teachers), None).item() == pytest.approx(total, rel=1e-9)


def test_the_connectors_are_parameters_and_the_margins_are_in_no_checkpoint() -> None:
    loss = built([STUDENT[:, :4]], [TEACHER], [nn.BatchNorm2d(6)])
    assert [tuple(p.shape) for p in loss.parameters()] == [(6, 4, 1, 1), (6,), (6,)]
    assert not [name for name in loss.state_dict() if "margin" in name]


class Maps(nn.Module):
    """Layers ``stem``, ``norm``, ``act`` on maps of 1×6, ``head``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.act = nn.Conv2d(1, width, (1, 3), padding=(0, 1)), nn.BatchNorm2d(width), nn.ReLU()
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.stem(x[:, None, None]))).mean((2, 3)))


def test_a_training_reads_the_margins_from_the_teacher_and_leaves_it_alone() -> None:
    teacher = Maps(5)
    nn.init.constant_(teacher.norm.bias, -1.0)
    before = weights(teacher)
    module = distillation(Maps(3), teacher, losses={"ofd": OFD(["norm"], weight=0.01)}, check_teacher=False)
    first = weights(module.student)
    trainer().fit(module, loader())
    assert module.losses.ofd.margin0.tolist() == pytest.approx([mean_of_negatives(-1.0, 1.0)] * 5, rel=1e-4)
    assert_equal(weights(teacher), before)
    assert not torch.equal(module.student.stem.weight, first["stem.weight"])


def test_a_layer_that_is_no_batch_normalisation_is_refused() -> None:
    module = distillation(Maps(3), Maps(5), losses={"ofd": OFD(["norm"], ["act"])}, check_teacher=False)
    with pytest.raises(
        ValueError, match=r"loss 'ofd' \(student 'norm'; teacher 'act'\): ofd: the teacher's layer 'act' is a ReLU, exp"
    ):
        trainer().fit(module, loader())


def test_one_sample_large_and_constant_features_stay_finite() -> None:
    for scale in (1e4, 0.0):
        student = (STUDENT[:1] * scale).float().requires_grad_()
        loss = built([STUDENT], [TEACHER], [nn.BatchNorm2d(6)]).float()
        value = loss(outputs(student), outputs((TEACHER[:1] * scale).float()), None)
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ofd: expected maps \(B, C, H, W\), got \(4, 6\)"):
        built([STUDENT], [TEACHER[:, :, 0, 0]], [nn.BatchNorm2d(6)])
    with pytest.raises(ValueError, match=r"student features \(2, 2, 2, 4\) and teacher features \(2, 3, 2, 4\) differ"):
        partial_l2(SMALL[:, :2], SMALL_TEACHER, margin=MARGIN)
    with pytest.raises(ValueError, match=r"expected a margin for each of 3 channels, got a tensor of \(2,\)"):
        partial_l2(SMALL, SMALL_TEACHER, margin=MARGIN[:2])


def test_a_negative_weight_and_layers_without_partners_are_refused() -> None:
    with pytest.raises(ValueError, match="expected weight >= 0, got -1"):
        OFD(["layer"], weight=-1)
    with pytest.raises(ValueError, match="expected one or more student layers and as many teacher layers"):
        OFD(["a", "b"], ["c"])
