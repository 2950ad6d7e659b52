import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import VID, vid
from tests.losses.reference import numerical_gradient, wave
from tests.tiny import distillation, loader, trainer

MEAN, TEACHER = wave((2, 3, 2, 4), 0.37, 0.2), wave((2, 3, 2, 4), 0.53, 0.9)
VARIANCE = torch.tensor([0.5, 1.0, 7.0], dtype=torch.float64)


def outputs(*features: Tensor) -> Outputs:
    layers = {f"layer{i}": feature for i, feature in enumerate(features)}
    return Outputs(torch.zeros(len(features[0]), 2, dtype=features[0].dtype), layers)


def built(students: list[Tensor], teachers: list[Tensor], **options: object) -> VID:
    torch.manual_seed(0)
    loss = VID([f"layer{i}" for i in range(len(students))], **options)
    loss.build(outputs(*students), outputs(*teachers))
    return loss.double()


def vid_by_loops(mean: Tensor, teacher: Tensor, variance: Tensor) -> float:
    """The mean over all elements of -log of the normal density, less its constant."""
    total, count = 0.0, 0
    for b, c, h, w in itertools.product(*map(range, mean.shape)):
        v, difference = variance[c].item(), (mean - teacher)[b, c, h, w].item()
        density = math.exp(-(difference**2) / (2 * v)) / math.sqrt(2 * math.pi * v)
        total, count = total - math.log(density) - 0.5 * math.log(2 * math.pi), count + 1
    return total / count


def test_value_and_gradients_equal_the_formula() -> None:
    mean, variance = MEAN.clone().requires_grad_(), VARIANCE.clone().requires_grad_()
    loss = vid(mean, TEACHER, variance=variance)
    loss.backward()
    assert loss.item() == pytest.approx(vid_by_loops(MEAN, TEACHER, VARIANCE), rel=1e-12)
    by_mean = numerical_gradient(lambda m: vid_by_loops(m, TEACHER, VARIANCE), MEAN)
    by_variance = numerical_gradient(lambda v: vid_by_loops(MEAN, TEACHER, v), VARIANCE)
    torch.testing.assert_close(mean.grad, by_mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(variance.grad, by_variance, rtol=1e-6, atol=1e-8)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    teacher = TEACHER.clone().requires_grad_()
    inputs = MEAN.clone().requires_grad_(), VARIANCE.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v: vid(m, TEACHER, variance=v), inputs)
    vid(inputs[0], teacher, variance=VARIANCE).backward()
    assert teacher.grad is None


def test_the_log_of_the_variance_is_left_where_the_mean_is_right() -> None:
    mean = TEACHER.clone().requires_grad_()
    loss = vid(mean, TEACHER, variance=VARIANCE)
    loss.backward()
    assert loss.item() == pytest.approx(sum(math.log(v) for v in VARIANCE.tolist()) / 6, rel=1e-12)
    assert not mean.grad.any()


def test_vectors_and_tokens_have_their_channels_last() -> None:
    expected = vid(MEAN, TEACHER, variance=VARIANCE)
    tokens = [x.flatten(2).mT for x in (MEAN, TEACHER)]
    torch.testing.assert_close(vid(*tokens, variance=VARIANCE), expected)
    torch.testing.assert_close(vid(*(x.flatten(0, 1) for x in tokens), variance=VARIANCE), expected)


@settings(max_examples=25)
@given(samples=st.permutations(range(2)), channels=st.permutations(range(3)), shift=st.floats(-9, 9))
def test_order_and_a_common_shift_change_nothing(samples: list[int], channels: list[int], shift: float) -> None:
    mean, teacher = ((x + shift)[samples][:, channels] for x in (MEAN, TEACHER))
    value = vid(mean, teacher, variance=VARIANCE[channels]).item()
    assert value == pytest.approx(vid(MEAN, TEACHER, variance=VARIANCE).item(), rel=1e-11)


@settings(max_examples=25)
@given(scale=st.floats(0.1, 30))
def test_scaling_features_and_deviation_adds_the_scales_logarithm(scale: float) -> None:
    value = vid(scale * MEAN, scale * TEACHER, variance=scale**2 * VARIANCE).item()
    assert value == pytest.approx(vid(MEAN, TEACHER, variance=VARIANCE).item() + math.log(scale), rel=1e-9)


def test_the_module_sums_layers_with_three_convolutions_and_the_initial_variance() -> None:
    students = [wave((2, 5, 4, 6), 0.3, 0.1), wave((2, 4, 3, 3), 0.7, 0.4)]
    teachers = [wave((2, 3, 2, 3), 0.5, 0.2), wave((2, 7, 3, 3), 0.9, 0.6)]
    loss = built(students, teachers, initial_variance=2.0)
    total = 0.0
    pooled = students[0].reshape(2, 5, 2, 2, 3, 2).mean((3, 5))
    for s, t, network in zip((pooled, students[1]), teachers, loss.means, strict=True):
        for i, convolution in enumerate((network[0], network[2], network[4])):
            weight, bias = convolution.weight[:, :, 0, 0], convolution.bias
            s = torch.einsum("dc,bchw->bdhw", weight, s.relu() if i else s) + bias[:, None, None]
        total += 0.5 * (((s - t) ** 2).mean() / 2.0 + math.log(2.0))
    # The variance was made in float32.
    torch.testing.assert_close(loss(outputs(*students), outputs(*teachers), None), total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("initial", [1e-4, 0.3, 5.0, 300.0])
def test_the_variance_begins_where_it_is_told_to(initial: float) -> None:
    loss = built([MEAN], [TEACHER], initial_variance=initial)
    variance = torch.nn.functional.softplus(loss.raw_variances[0]) + 1e-5
    assert variance.tolist() == pytest.approx([initial] * 3, rel=1e-5)


def test_everything_that_is_learnt_is_among_the_parameters_after_build() -> None:
    loss = built([wave((4, 6), 0.3, 0.1)], [wave((4, 5), 0.7, 0.2)])
    shapes = [tuple(p.shape) for p in loss.parameters()]
    assert sorted(shapes) == sorted([(5, 6), (5,), (5, 5), (5,), (5, 5), (5,), (5,)])


def test_the_variance_is_trained() -> None:
    initial = 0.3  # below the squared error of every channel: where they are equal, a variance stays as it is
    module = distillation(losses={"vid": VID(["stem", "act"], weight=30.0, initial_variance=initial)})
    fit = trainer()
    fit.fit(module, loader())
    optimized = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    for raw in module.losses.vid.raw_variances:
        assert id(raw) in optimized
        variance = torch.nn.functional.softplus(raw) + 1e-5
        assert raw.shape == (16,)  # the teacher's channels
        assert ((variance - initial).abs() > 1e-3).all()


def test_large_features_and_tiny_variances_stay_finite() -> None:
    loss = built([MEAN], [TEACHER]).float()
    with torch.no_grad():
        loss.raw_variances[0].fill_(-1e4)  # softplus is 0
    student = (MEAN[:1] * 1e4).float().requires_grad_()
    value = loss(outputs(student), outputs((TEACHER[:1] * 1e4).float()), None)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in loss.parameters())


def test_a_training_in_bfloat16_computes_the_loss_in_float32() -> None:
    loss = built([MEAN], [TEACHER]).bfloat16()
    value = loss(outputs(MEAN.float()), outputs(TEACHER.float()), None)
    assert value.dtype == torch.float32
    expected = built([MEAN], [TEACHER])(outputs(MEAN), outputs(TEACHER), None).item()
    assert value.item() == pytest.approx(expected, rel=0.02)  # bfloat16 has 8 bits


def test_layers_of_different_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vid: the student's layer gives \(2, 3, 2, 4\) and the teacher's \(2, 3\)"):
        built([MEAN], [TEACHER[:, :, 0, 0]])


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student features \(1, 3, 2, 4\) and teacher features \(2, 3, 2, 4\) differ"):
        vid(MEAN[:1], TEACHER, variance=VARIANCE)
    with pytest.raises(ValueError, match=r"expected one variance for each of the teacher's 3 channels, got.*\(2,\)"):
        vid(MEAN, TEACHER, variance=VARIANCE[:2])


def test_a_variance_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="expected initial_variance > 1e-05, got 0"):
        VID(["layer"], initial_variance=0)


def test_a_negative_weight_and_layers_without_partners_are_refused() -> None:
    with pytest.raises(ValueError, match="expected weight >= 0, got -1"):
        VID(["layer"], weight=-1)
    with pytest.raises(ValueError, match="expected one or more student layers and as many teacher layers"):
        VID(["a", "b"], ["c"])
