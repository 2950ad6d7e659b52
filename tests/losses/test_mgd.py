import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_lightning import Outputs
from kd_lightning.losses import MGD, mgd
from tests.losses.reference import wave
from tests.tiny import distillation, loader, trainer, weights

STUDENT, TEACHER = wave((4, 6, 8, 8), 0.37, 0.2), wave((4, 6, 8, 8), 0.53, 0.9)


def outputs(feature: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(feature), 2, dtype=feature.dtype), {"layer": feature})


def built(student: Tensor, teacher: Tensor, **options: object) -> MGD:
    torch.manual_seed(0)
    loss = MGD("layer", **options)
    loss.build(outputs(student), outputs(teacher))
    return loss.double()


def masked(loss: MGD, student: Tensor, seed: int = 3) -> Tensor:
    """What the generator is given, by a hook."""
    seen = []
    with loss.generator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        torch.manual_seed(seed)
        loss(outputs(student), outputs(TEACHER), None)
    return seen[0]


def test_value_and_gradient_equal_the_formula() -> None:
    generated, teacher = STUDENT[:2, :2, :2].clone().requires_grad_(), TEACHER[:2, :2, :2]
    loss = mgd(generated, teacher)
    loss.backward()
    pairs = list(zip(generated.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    assert loss.item() == pytest.approx(sum((g - t) ** 2 for g, t in pairs) / 2, rel=1e-12)
    assert generated.grad.flatten().tolist() == pytest.approx([2 * (g - t) / 2 for g, t in pairs], rel=1e-12)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    generated, teacher = STUDENT[:1, :1].clone().requires_grad_(), TEACHER[:1, :1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda g: mgd(g, teacher.detach()), generated)
    mgd(generated, teacher).backward()
    assert teacher.grad is None


def test_zero_where_the_generated_map_equals_the_teachers() -> None:
    generated = TEACHER.clone().requires_grad_()
    loss = mgd(generated, TEACHER)
    loss.backward()
    assert loss.item() == 0
    assert not generated.grad.any()


@settings(max_examples=25)
@given(samples=st.permutations(range(4)), channels=st.permutations(range(6)), shift=st.floats(-9, 9))
def test_order_and_a_common_shift_change_nothing(samples: list[int], channels: list[int], shift: float) -> None:
    moved = mgd(*((x + shift)[samples][:, channels] for x in (STUDENT, TEACHER)))
    assert moved.item() == pytest.approx(mgd(STUDENT, TEACHER).item(), rel=1e-11)


def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """By shifted products: padding of zeros around, one position of the kernel after another."""
    k, (h, w) = layer.kernel_size[0], x.shape[2:]
    padded, out = nn.functional.pad(x, [k // 2] * 4), layer.bias[:, None, None]
    for i in range(k):
        for j in range(k):
            out = out + torch.einsum("oc,bchw->bohw", layer.weight[:, :, i, j], padded[:, :, i : i + h, j : j + w])
    return out


def test_the_module_projects_masks_and_generates() -> None:
    student = STUDENT[:, :4]
    loss = built(student, TEACHER, mask_ratio=0.4)
    given = masked(loss, student)
    projected = conv(loss.projector, student)
    mask = (given != 0).any(1, keepdim=True)
    torch.testing.assert_close(given, projected * mask)
    torch.manual_seed(3)
    value = loss(outputs(student), outputs(TEACHER), None)
    generated = conv(loss.generator[2], conv(loss.generator[0], given).relu())
    torch.testing.assert_close(value, ((generated - TEACHER) ** 2).sum() / 4)


@pytest.mark.parametrize("ratio", [0.15, 0.75])
def test_positions_are_masked_in_all_channels_with_the_probability(ratio: float) -> None:
    student = torch.ones(4, 6, 64, 64, dtype=torch.float64)
    loss = MGD("layer", mask_ratio=ratio).double()
    loss.projector, loss.generator = nn.Identity(), nn.Identity()
    kept = masked_of(loss, student)
    assert (kept == kept[:, :1]).all()
    # Within four standard errors of 4 · 64 · 64 draws.
    assert 1 - kept.mean().item() == pytest.approx(ratio, abs=4 * math.sqrt(ratio * (1 - ratio) / (4 * 64 * 64)))
    assert not torch.equal(kept[0], kept[1])


def test_channels_are_masked_everywhere() -> None:
    student = torch.ones(4, 2048, 2, 3, dtype=torch.float64)
    loss = MGD("layer", mask="channel", mask_ratio=0.3).double()
    loss.projector, loss.generator = nn.Identity(), nn.Identity()
    kept = masked_of(loss, student)
    assert (kept == kept[:, :, :1, :1]).all()
    assert 1 - kept.mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / (4 * 2048)))
    assert not torch.equal(kept[0], kept[1])


def masked_of(loss: MGD, student: Tensor) -> Tensor:
    """The masked map, as the gradient of half the loss against zero: ‖x·mask‖² has 2·x·mask / B."""
    torch.manual_seed(5)
    leaf = student.clone().requires_grad_()
    loss(outputs(leaf), outputs(torch.zeros_like(student)), None).backward()
    return leaf.grad * len(student) / 2


def test_masks_come_from_the_global_generator_and_differ_from_step_to_step() -> None:
    loss = built(STUDENT, TEACHER)
    torch.testing.assert_close(masked(loss, STUDENT, seed=1), masked(loss, STUDENT, seed=1), rtol=0, atol=0)
    assert not torch.equal(masked(loss, STUDENT, seed=1), masked(loss, STUDENT, seed=2))


def test_nothing_is_masked_and_nothing_drawn_in_eval_mode() -> None:
    loss = built(STUDENT, TEACHER, mask_ratio=0.9).eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    value = loss(outputs(STUDENT), outputs(TEACHER), None)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(value, mgd(loss.generator(STUDENT), TEACHER))


@pytest.mark.parametrize(("student_size", "teacher_size"), [(8, 4), (4, 8)])
def test_the_larger_map_is_average_pooled_to_the_smaller(student_size: int, teacher_size: int) -> None:
    student = wave((2, 3, student_size, student_size), 0.3, 0.1)
    teacher = wave((2, 3, teacher_size, teacher_size), 0.7, 0)
    loss = built(student, teacher, mask_ratio=0.0)
    pooled = [x.reshape(2, 3, 4, x.shape[2] // 4, 4, x.shape[3] // 4).mean((3, 5)) for x in (student, teacher)]
    value = loss(outputs(student), outputs(teacher), None)
    torch.testing.assert_close(value, ((loss.generator(pooled[0]) - pooled[1]) ** 2).sum() / 2)


def test_only_other_channels_are_projected() -> None:
    assert [tuple(p.shape) for p in built(STUDENT, TEACHER).projector.parameters()] == []
    loss = built(STUDENT[:, :4], TEACHER)
    assert [tuple(p.shape) for p in loss.parameters()] == [
        (6, 4, 1, 1), (6,), (6, 6, 3, 3), (6,), (6, 6, 3, 3), (6,),
    ]  # fmt: skip


class Maps(nn.Module):
    """Layers ``stem`` on maps of 2×3 and ``head``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(1, width, 3, padding=1), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x.reshape(-1, 1, 2, 3)).relu().mean((2, 3)))


def test_a_training_moves_student_projector_and_generator() -> None:
    module = distillation(Maps(3), Maps(4), losses={"mgd": MGD("stem", weight=0.01)}, check_teacher=False)
    first = weights(module.student)
    trainer(max_steps=1).fit(module, loader())
    before = weights(module.objective)
    trainer(max_steps=3).fit(module, loader())
    assert not torch.equal(module.student.stem.weight, first["stem.weight"])
    for name, parameter in module.objective.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_one_sample_and_large_features_stay_finite() -> None:
    student = (STUDENT[:1] * 1e4).float().requires_grad_()
    loss = built(STUDENT, TEACHER).float()
    value = loss(outputs(student), outputs((TEACHER[:1] * 1e4).float()), None)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mgd: expected maps \(B, C, H, W\), got \(4, 6\)"):
        built(STUDENT, TEACHER[:, :, 0, 0])
    with pytest.raises(ValueError, match=r"student features \(4, 6, 4, 8\) and teacher features \(4, 6, 8, 8\) differ"):
        mgd(STUDENT[:, :, :4], TEACHER)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, math.nan])
def test_a_ratio_that_is_no_part_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"expected mask_ratio in \[0, 1\), got {ratio}"):
        MGD("layer", mask_ratio=ratio)


def test_another_mask_and_a_negative_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="expected mask='spatial' or 'channel', got 'channels'"):
        MGD("layer", mask="channels")
    with pytest.raises(ValueError, match="expected weight >= 0, got -1"):
        MGD("layer", weight=-1)


def test_the_teachers_layer_has_the_students_name_unless_given() -> None:
    assert MGD("a").teacher_layers == ("a",)
    assert MGD("a", "b").teacher_layers == ("b",)
