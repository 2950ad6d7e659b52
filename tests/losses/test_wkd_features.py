import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_lightning import Outputs
from kd_lightning.losses import WKDFeatures, wkd_features
from tests.losses.reference import numerical_gradient, wave

STUDENT, TEACHER = wave((4, 6, 8, 8), 0.37, 0.2), wave((4, 6, 8, 8), 0.53, 0.9)
BOTH = {"mean_weight": 4.0, "std_weight": 1.5}


def by_loops(student: Tensor, teacher: Tensor, mean_weight: float, std_weight: float) -> float:
    def deviation(pixels: list[float]) -> float:
        return math.sqrt((statistics.variance(pixels) if len(pixels) > 1 else 0.0) + 1e-5)

    total = 0.0
    for sample_s, sample_t in zip(student.flatten(2).tolist(), teacher.flatten(2).tolist(), strict=True):
        for s, t in zip(sample_s, sample_t, strict=True):
            total += mean_weight * (statistics.fmean(s) - statistics.fmean(t)) ** 2
            total += std_weight * (deviation(s) - deviation(t)) ** 2
    return total / len(student)


def outputs(feature: Tensor, layer: str = "layer") -> Outputs:
    return Outputs(torch.zeros(len(feature), 2, dtype=torch.float64), {layer: feature})


def built(student: Tensor, teacher: Tensor, **options: float) -> WKDFeatures:
    torch.manual_seed(0)
    loss = WKDFeatures("layer", **options)
    loss.build(outputs(student), outputs(teacher))
    return loss.double()


@pytest.mark.parametrize(
    ("mean_weight", "std_weight", "value"), [(1.0, 0.0, 0.1727854478649868), (0.0, 1.0, 0.008836577788661107)]
)
def test_value_of_the_authors(mean_weight: float, std_weight: float, value: float) -> None:
    found = wkd_features(STUDENT, TEACHER, mean_weight=mean_weight, std_weight=std_weight)
    assert found.item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("height", "width"), [(3, 2), (1, 2), (1, 1)])
def test_value_and_gradient_equal_the_formula_for_maps_of_different_sizes(height: int, width: int) -> None:
    student, teacher = wave((2, 3, 2, 4), 0.37, 0.2), wave((2, 3, height, width), 0.53, 0.9)
    for s, t in ((student, teacher), (teacher, student)):
        leaf = s.clone().requires_grad_()
        value = wkd_features(leaf, t, **BOTH)
        value.backward()
        assert value.item() == pytest.approx(by_loops(s, t, **BOTH), rel=1e-12)
        expected = numerical_gradient(lambda x, t=t: by_loops(x, t, **BOTH), s)
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-8)


def test_with_equal_weights_it_is_the_wasserstein_distance_between_gaussians() -> None:
    """In one dimension the quantiles are paired: ∫ (F_s⁻¹(q) − F_t⁻¹(q))² dq."""
    student, teacher = wave((1, 1, 8, 8), 0.37, 0.2), wave((1, 1, 8, 8), 0.53, 0.9) + 1
    s, t = (statistics.NormalDist(x.mean().item(), x.std().item()) for x in (student, teacher))
    quantiles = [(i + 0.5) / 20000 for i in range(20000)]
    distance = statistics.fmean((s.inv_cdf(q) - t.inv_cdf(q)) ** 2 for q in quantiles)
    found = wkd_features(student, teacher, mean_weight=1.0, std_weight=1.0).item()
    assert found == pytest.approx(distance, rel=1e-3)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    student = STUDENT[:2, :2, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: wkd_features(s, TEACHER[:2, :2], **BOTH), student)
    teacher = TEACHER.clone().requires_grad_()
    wkd_features(STUDENT.clone().requires_grad_(), teacher, **BOTH).backward()
    assert teacher.grad is None


def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher() -> None:
    student = STUDENT.clone().requires_grad_()
    value = wkd_features(student, STUDENT, **BOTH)
    value.backward()
    assert value.item() == 0
    assert not student.grad.any()


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 1, 1)])
def test_constant_maps_and_a_single_pixel_have_a_gradient(shape: tuple[int, ...]) -> None:
    student = torch.full(shape, 2.0, requires_grad=True)
    value = wkd_features(student, torch.zeros(shape), **BOTH)
    value.backward()
    assert value.item() == pytest.approx(4.0 * 3 * 2.0**2)
    pixels = shape[2] * shape[3]
    torch.testing.assert_close(student.grad, torch.full(shape, 4.0 * 2 * 2.0 / shape[0] / pixels))


def test_large_features_stay_finite() -> None:
    student = (1e4 * STUDENT).float().requires_grad_()
    value = wkd_features(student, 1e4 * TEACHER.float(), **BOTH)
    value.backward()
    assert value.item() == pytest.approx(by_loops(1e4 * STUDENT, 1e4 * TEACHER, **BOTH), rel=1e-4)
    assert student.grad.isfinite().all()


@settings(max_examples=25)
@given(
    samples=st.permutations(range(4)),
    channels=st.permutations(range(6)),
    pixels=st.permutations(range(64)),
    shift=st.floats(-9, 9),
)
def test_order_and_a_common_shift_change_nothing(
    samples: list[int], channels: list[int], pixels: list[int], shift: float
) -> None:
    # The places are shuffled in the student alone: they play no part.
    student = (STUDENT + shift).flatten(2)[:, :, pixels].reshape(STUDENT.shape)
    moved = wkd_features(student[samples][:, channels], (TEACHER + shift)[samples][:, channels], **BOTH)
    assert moved.item() == pytest.approx(wkd_features(STUDENT, TEACHER, **BOTH).item(), rel=1e-9)


def test_one_sample_counts_as_itself() -> None:
    each = [wkd_features(STUDENT[i : i + 1], TEACHER[i : i + 1], **BOTH).item() for i in range(4)]
    assert wkd_features(STUDENT, TEACHER, **BOTH).item() == pytest.approx(sum(each) / 4, rel=1e-12)


def test_the_projector_maps_the_students_channels_to_the_teachers() -> None:
    teacher = wave((4, 9, 4, 4), 0.53, 0.9)
    loss = built(STUDENT, teacher, **BOTH)
    assert {tuple(p.shape) for p in loss.parameters()} == {(9, 6, 1, 1), (9,)}
    weight, bias = loss.projector.weight[:, :, 0, 0], loss.projector.bias
    projected = (torch.einsum("dc,bchw->bdhw", weight, STUDENT) + bias[:, None, None]).detach()
    value = loss(outputs(STUDENT), outputs(teacher), None)
    assert value.item() == pytest.approx(by_loops(projected, teacher, **BOTH), rel=1e-12)
    value.backward()
    assert all(p.grad.any() for p in loss.parameters())


def test_the_module_is_the_function_at_its_present_weights() -> None:
    loss = built(STUDENT, TEACHER)
    nn.init.dirac_(loss.projector.weight)
    nn.init.zeros_(loss.projector.bias)
    for weights in ({"mean_weight": 4.0, "std_weight": 1.0}, {"mean_weight": 0.5, "std_weight": 2.0}):
        loss.mean_weight, loss.std_weight = weights.values()
        value = loss(outputs(STUDENT), outputs(TEACHER), torch.full((4,), -100))
        assert value.item() == pytest.approx(by_loops(STUDENT, TEACHER, **weights), rel=1e-12)


def test_a_projector_in_bfloat16_takes_features_in_float32() -> None:
    loss = built(STUDENT, TEACHER).bfloat16()
    value = loss(outputs(STUDENT.float()), outputs(TEACHER.float()), None)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(
        built(STUDENT, TEACHER)(outputs(STUDENT), outputs(TEACHER), None).item(), rel=0.02
    )


def test_the_teachers_layer_has_the_students_name_unless_given() -> None:
    assert WKDFeatures("a").teacher_layers == ("a",)
    assert WKDFeatures("a", "b").teacher_layers == ("b",)


def test_layers_that_give_no_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"wkd_features: expected maps \(B, C, H, W\), got \(4, 6\)"):
        built(STUDENT[:, :, 0, 0], TEACHER[:, :, 0, 0])
    with pytest.raises(ValueError, match=r"wkd_features: the student's layer gives .* and the teacher's \(4, 6\)"):
        built(STUDENT, TEACHER[:, :, 0, 0])
    with pytest.raises(ValueError, match=r"wkd_features: expected maps \(B, C, H, W\), got \(4, 6\)"):
        wkd_features(STUDENT, TEACHER[:, :, 0, 0], **BOTH)


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="wkd_features: the student's layer has 6 channels and the teacher's 5"):
        wkd_features(STUDENT, TEACHER[:, :5], **BOTH)


@pytest.mark.parametrize("name", ["mean_weight", "std_weight", "weight"])
def test_a_negative_weight_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"expected {name} >= 0, got -1"):
        WKDFeatures("layer", **{name: -1.0})
