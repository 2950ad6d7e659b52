import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_lightning import Outputs
from kd_lightning.losses import ReviewKD, hierarchical_context
from tests.losses.reference import numerical_gradient, wave
from tests.tiny import distillation, loader, trainer, weights

STUDENT, TEACHER = wave((4, 6, 8, 8), 0.37, 0.2), wave((4, 6, 8, 8), 0.53, 0.9)


def outputs(*features: Tensor) -> Outputs:
    layers = {f"layer{i}": feature for i, feature in enumerate(features)}
    return Outputs(torch.zeros(len(features[0]), 2, dtype=features[0].dtype), layers)


def built(students: list[Tensor], teachers: list[Tensor], **options: object) -> ReviewKD:
    torch.manual_seed(0)
    loss = ReviewKD([f"layer{i}" for i in range(len(students))], **options)
    loss.build(outputs(*students), outputs(*teachers))
    return loss.double()


def hcl_by_loops(student: Tensor, teacher: Tensor, sizes: list[int]) -> float:
    """On maps whose height and width every pooled size divides."""
    height, width = student.shape[2:]
    total, weight, all_weights = 0.0, 1.0, 0.0
    for rows, columns in [(height, width), *((size, size) for size in sizes)]:
        h, w, squares = height // rows, width // columns, []
        for difference in (student - teacher).flatten(0, 1):
            for i in range(rows):
                for j in range(columns):
                    cell = difference[i * h : (i + 1) * h, j * w : (j + 1) * w].flatten().tolist()
                    squares.append((sum(cell) / len(cell)) ** 2)
        total += weight * sum(squares) / len(squares)
        all_weights += weight
        weight /= 2
    return total / all_weights


def test_value_of_the_authors() -> None:
    assert hierarchical_context(STUDENT, TEACHER).item() == pytest.approx(5.137823006334431, rel=1e-12)


SHAPES = [((1, 1, 8, 8), [4, 2, 1]), ((1, 2, 4, 8), [2, 1]), ((2, 2, 2, 2), [1]), ((2, 3, 1, 1), [])]


@pytest.mark.parametrize(("shape", "sizes"), SHAPES)
def test_value_and_gradient_equal_the_formula(shape: tuple[int, ...], sizes: list[int]) -> None:
    values, teacher = wave(shape, 0.37, 0.2), wave(shape, 0.53, 0.9)
    student = values.clone().requires_grad_()
    loss = hierarchical_context(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(hcl_by_loops(values, teacher, sizes), rel=1e-12)
    expected = numerical_gradient(lambda x: hcl_by_loops(x, teacher, sizes), values)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)


def test_vectors_have_the_mean_squared_error() -> None:
    student, teacher = STUDENT[:, :, 0, 0], TEACHER[:, :, 0, 0]
    assert hierarchical_context(student, teacher).item() == pytest.approx(((student - teacher) ** 2).mean().item())


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    student, teacher = STUDENT[:1, :2].clone().requires_grad_(), TEACHER[:1, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: hierarchical_context(s, teacher.detach()), student)
    hierarchical_context(student, teacher).backward()
    assert teacher.grad is None


def test_zero_where_the_student_equals_the_teacher() -> None:
    student = TEACHER.clone().requires_grad_()
    loss = hierarchical_context(student, TEACHER)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


@settings(max_examples=25)
@given(samples=st.permutations(range(4)), channels=st.permutations(range(6)), shift=st.floats(-9, 9))
def test_order_mirroring_and_a_common_shift_change_nothing(samples, channels, shift: float) -> None:
    moved = hierarchical_context(*((x + shift)[samples][:, channels].flip(3) for x in (STUDENT, TEACHER)))
    assert moved.item() == pytest.approx(hierarchical_context(STUDENT, TEACHER).item(), rel=1e-12)


@settings(max_examples=25)
@given(shift=st.floats(-9, 9))
def test_a_difference_of_one_size_everywhere_counts_as_its_square(shift: float) -> None:
    value = hierarchical_context(STUDENT + shift, STUDENT).item()
    assert value == pytest.approx(shift**2, rel=1e-9, abs=1e-12)


def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """By shifted products: padding of zeros around, one position of the kernel after another."""
    k = layer.kernel_size[0]
    padded = nn.functional.pad(x, [k // 2] * 4)
    h, w = x.shape[2:]
    out = sum(
        torch.einsum("oc,bchw->bohw", layer.weight[:, :, i, j], padded[:, :, i : i + h, j : j + w])
        for i in range(k)
        for j in range(k)
    )
    return out if layer.bias is None else out + layer.bias[:, None, None]


def normalised(x: Tensor) -> Tensor:
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt()


def repeated(x: Tensor, h: int, w: int) -> Tensor:
    return x.repeat_interleave(h // x.shape[2], 2).repeat_interleave(w // x.shape[3], 3)


def test_the_module_reviews_deeper_layers_from_the_last_to_the_first() -> None:
    students = [wave((3, 5, 4, 8), 0.3, 0.1), wave((3, 4, 2, 4), 0.7, 0.4), wave((3, 6), 0.2, 0.3)]
    teachers = [wave((3, 3, 8, 8), 0.5, 0.2), wave((3, 7, 2, 4), 0.9, 0.6), wave((3, 2), 0.4, 0.5)]
    loss = built(students, teachers, width=3)

    x = normalised(conv(loss.fusions[2].reduce[0], students[2][:, :, None, None]))
    total = ((normalised(conv(loss.fusions[2].expand[0], x))[:, :, 0, 0] - teachers[2]) ** 2).mean()
    for i in (1, 0):
        fusion = loss.fusions[i]
        own = normalised(conv(fusion.reduce[0], students[i]))
        passed = repeated(x, *own.shape[2:])
        attention = torch.sigmoid(conv(fusion.attention[0], torch.cat([own, passed], 1)))
        x = repeated(own * attention[:, 0:1] + passed * attention[:, 1:2], *teachers[i].shape[2:])
        total = total + hierarchical_context(normalised(conv(fusion.expand[0], x)), teachers[i])
    torch.testing.assert_close(loss(outputs(*students), outputs(*teachers), None), total)


def test_the_fusions_are_parameters_after_build_and_the_width_is_the_deepest_layers_at_most() -> None:
    loss = built([STUDENT[:, :5], STUDENT[:, :4]], [TEACHER, TEACHER[:, :3]])
    shapes = {name: tuple(p.shape) for name, p in loss.named_parameters() if p.ndim == 4}
    assert shapes == {
        "fusions.0.reduce.0.weight": (4, 5, 1, 1),
        "fusions.0.attention.0.weight": (2, 8, 1, 1),
        "fusions.0.expand.0.weight": (6, 4, 3, 3),
        "fusions.1.reduce.0.weight": (4, 4, 1, 1),
        "fusions.1.expand.0.weight": (3, 4, 3, 3),
    }
    assert built([STUDENT], [TEACHER], width=2).fusions[0].reduce[0].weight.shape == (2, 6, 1, 1)


def test_a_shallow_layer_of_the_teacher_teaches_the_students_deep_one() -> None:
    students = [x.clone().requires_grad_() for x in (STUDENT[:, :3], STUDENT[:, :2, ::2, ::2])]
    loss = built(students, [TEACHER, TEACHER[:, :, ::2, ::2]])
    fusion = loss.fusions[1]
    _, passed = fusion(students[1], None, torch.Size((4, 4)))
    output, _ = loss.fusions[0](students[0], passed, torch.Size((8, 8)))
    hierarchical_context(output, TEACHER).backward()
    assert all(x.grad.any() for x in students)


def test_a_training_moves_the_student_and_every_fusion() -> None:
    module = distillation(losses={"review_kd": ReviewKD(["norm", "act"])})
    first = weights(module.student)
    trainer(max_steps=1).fit(module, loader())
    before = weights(module.objective)
    trainer(max_steps=3).fit(module, loader())
    assert not torch.equal(module.student.stem.weight, first["stem.weight"])
    for name, parameter in module.objective.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_constant_and_large_features_stay_finite() -> None:
    for scale in (1e4, 0.0):
        student = (STUDENT[:1] * scale).float().requires_grad_()
        loss = built([STUDENT, STUDENT], [TEACHER, TEACHER]).float()
        teacher = (TEACHER[:1] * scale).float()
        value = loss(outputs(student, student), outputs(teacher, teacher), None)
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


def test_one_sample_without_space_is_refused_in_training() -> None:
    loss = built([STUDENT[:, :, 0, 0]], [TEACHER[:, :, 0, 0]])
    one = outputs(STUDENT[:1, :, 0, 0]), outputs(TEACHER[:1, :, 0, 0])
    with pytest.raises(ValueError, match=r"review_kd.*needs a batch of at least 2, got 1: raise the batch size, or"):
        loss(*one, None)
    assert loss.eval()(*one, None).isfinite()


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"review_kd: the student's layer gives \(4, 6, 8, 8\) and the teacher's \(4, 6"
    ):
        built([STUDENT], [TEACHER[:, :, 0, 0]])
    with pytest.raises(ValueError, match=r"review_kd: expected maps \(B, C, H, W\), got \(4, 6, 8\)"):
        built([STUDENT[:, :, 0]], [TEACHER[:, :, 0]])
    with pytest.raises(ValueError, match=r"student features \(4, 6, 4, 8\) and teacher features \(4, 6, 8, 8\) differ"):
        hierarchical_context(STUDENT[:, :, :4], TEACHER)
    with pytest.raises(ValueError, match="expected width >= 1, got 0"):
        ReviewKD(["layer"], width=0)


def test_a_negative_weight_and_layers_without_partners_are_refused() -> None:
    with pytest.raises(ValueError, match="expected weight >= 0, got -1"):
        ReviewKD(["layer"], weight=-1)
    with pytest.raises(ValueError, match="expected one or more student layers and as many teacher layers"):
        ReviewKD(["a", "b"], ["c"])
