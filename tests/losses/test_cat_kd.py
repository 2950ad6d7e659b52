import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Distillation, DistillationModule, Outputs
from kd_lightning.losses import CATKD, class_attention_transfer
from kd_lightning.objective import DistillationObjective
from tests.losses.reference import numerical_gradient, wave
from tests.tiny import assert_equal, trainer, weights

STUDENT, TEACHER = wave((4, 6, 8, 8), 0.37, 0.2), wave((4, 6, 8, 8), 0.53, 0.9)
SMALL, OTHER = wave((2, 3, 4, 2), 0.37, 0.2), wave((2, 3, 6, 4), 0.53, 0.9)  # of other sizes
BOTH = pytest.mark.parametrize("normalize", [True, False])


class Images(nn.Module):
    """Layers ``body`` and ``fc``."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body, self.fc = nn.Conv2d(1, width, 3, padding=1), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).relu().mean((2, 3)))


def by_loops(student: Tensor, teacher: Tensor, normalize: bool = True) -> float:
    """For a resolution of 2, and even heights and widths."""

    def pooled(x: list[list[float]]) -> list[float]:
        rows, columns = len(x) // 2, len(x[0]) // 2
        quarter = [(range(i, i + rows), range(j, j + columns)) for i in (0, rows) for j in (0, columns)]
        means = [sum(x[i][j] for i in r for j in c) / (rows * columns) for r, c in quarter]
        return [m / (math.hypot(*means) or 1) for m in means] if normalize else means

    pairs = zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), strict=True)
    squares = [(a - b) ** 2 for s, t in pairs for a, b in zip(pooled(s), pooled(t), strict=True)]
    return sum(squares) / len(squares)


def attached(student: nn.Module, teacher: nn.Module, **options: object) -> CATKD:
    loss = CATKD("body", **options)
    loss.attach(student, teacher)
    return loss


def test_value_of_the_authors() -> None:
    assert class_attention_transfer(STUDENT, TEACHER).item() == pytest.approx(0.5036527669892154, rel=1e-12)


@BOTH
def test_value_and_gradient_equal_the_formula_for_other_sizes(normalize: bool) -> None:
    student = SMALL.clone().requires_grad_()
    loss = class_attention_transfer(student, OTHER, normalize=normalize)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(SMALL, OTHER, normalize), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, OTHER, normalize), SMALL)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("resolution", [1, 4, 8])
def test_maps_are_pooled_to_the_resolution(resolution: int) -> None:
    value = class_attention_transfer(STUDENT, TEACHER, resolution=resolution, normalize=False)
    s, t = (nn.functional.avg_pool2d(x, 8 // resolution) for x in (STUDENT, TEACHER))
    assert value.item() == pytest.approx(((s - t) ** 2).mean().item(), rel=1e-12)


@BOTH
def test_gradient_is_right_and_none_is_the_teachers(normalize: bool) -> None:
    def loss(student: Tensor, teacher: Tensor = OTHER) -> Tensor:
        return class_attention_transfer(student, teacher, normalize=normalize)

    assert torch.autograd.gradcheck(loss, SMALL.clone().requires_grad_())
    teacher = OTHER.clone().requires_grad_()
    loss(SMALL.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


@BOTH
def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher(normalize: bool) -> None:
    student = STUDENT.clone().requires_grad_()
    loss = class_attention_transfer(student, STUDENT.clone(), normalize=normalize)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


@settings(max_examples=25)
@given(
    scales=st.lists(st.floats(0.1, 10), min_size=6, max_size=6),
    samples=st.permutations(range(4)),
    classes=st.permutations(range(6)),
)
def test_each_maps_scale_and_the_order_of_samples_and_classes_change_nothing(scales, samples, classes) -> None:
    scaled = STUDENT * torch.tensor(scales, dtype=torch.float64)[:, None, None]
    value = class_attention_transfer(scaled[samples][:, classes], TEACHER[samples][:, classes])
    assert value.item() == pytest.approx(class_attention_transfer(STUDENT, TEACHER).item(), rel=1e-9)


@BOTH
@pytest.mark.parametrize("name", ["zero", "one zero", "constant", "extreme"])
def test_edges_stay_finite(name: str, normalize: bool) -> None:
    maps = {
        "zero": torch.zeros(1, 3, 4, 2),
        "one zero": SMALL[:1].float() * torch.tensor([0.0, 1, 1])[:, None, None],
        "constant": torch.ones(1, 3, 4, 2),
        "extreme": (SMALL[:1].sign() * 1e4).float(),
    }
    student = maps[name].clone().requires_grad_()
    loss = class_attention_transfer(student, OTHER[:1].float(), normalize=normalize)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(maps[name], OTHER[:1], normalize), rel=1e-4)
    assert student.grad.abs().max() < 1e4
    assert class_attention_transfer(OTHER[:1].float(), maps[name], normalize=normalize).isfinite()


def test_a_map_of_zeros_is_not_moved() -> None:
    student = (SMALL * torch.tensor([0.0, 1, 1])[:, None, None]).requires_grad_()
    class_attention_transfer(student, OTHER).backward()
    assert not student.grad[:, 0].any()
    assert student.grad[:, 1:].all()


def test_the_module_applies_the_classifiers_weights_at_each_place() -> None:
    student, teacher = Images(4).double(), Images(5, seed=1).double()
    s, t = wave((2, 4, 4, 2), 0.3, 0.1), wave((2, 5, 4, 2), 0.7, 0.2)
    outputs = Outputs(torch.zeros(2, 3), {"body": s}), Outputs(torch.zeros(2, 3), {"body": t})
    loss = attached(student, teacher, resolution=2, normalize=True)
    for normalize in (True, False):
        loss.normalize = normalize
        maps = torch.einsum("kc,bchw->bkhw", student.fc.weight, s), torch.einsum("kc,bchw->bkhw", teacher.fc.weight, t)
        value = loss(*outputs, None)
        assert value.item() == pytest.approx(by_loops(*maps, normalize), rel=1e-10)
    assert loss.needs_same_classes


def test_the_mean_of_a_class_activation_map_is_the_logit_without_its_bias() -> None:
    """At a resolution of 1 the maps' difference is that of the logits."""
    student, teacher = Images(4).double(), Images(5, seed=1).double()
    s, t = wave((2, 4, 4, 2), 0.3, 0.1), wave((2, 5, 4, 2), 0.7, 0.2)
    outputs = Outputs(torch.zeros(2, 3), {"body": s}), Outputs(torch.zeros(2, 3), {"body": t})
    logits = s.mean((2, 3)) @ student.fc.weight.T, t.mean((2, 3)) @ teacher.fc.weight.T
    value = attached(student, teacher, resolution=1, normalize=False)(*outputs, None)
    assert value.item() == pytest.approx(((logits[0] - logits[1]) ** 2).mean().item(), rel=1e-10)


@pytest.mark.parametrize("resolution", [1, 2, 3, 5])
def test_the_maps_that_are_compared_are_pooled_class_activation_maps(resolution: int) -> None:
    student, teacher = Images(4).double(), Images(5, seed=1).double()
    s, t = wave((2, 4, 4, 3), 0.3, 0.1), wave((2, 5, 5, 4), 0.7, 0.2)
    outputs = Outputs(torch.zeros(2, 3), {"body": s}), Outputs(torch.zeros(2, 3), {"body": t})
    maps = torch.einsum("kc,bchw->bkhw", student.fc.weight, s), torch.einsum("kc,bchw->bkhw", teacher.fc.weight, t)
    for normalize in (True, False):
        value = attached(student, teacher, resolution=resolution, normalize=normalize)(*outputs, None)
        expected = class_attention_transfer(*maps, resolution=resolution, normalize=normalize)
        assert value.item() == pytest.approx(expected.item(), rel=1e-10)


def test_no_full_map_of_each_class_is_kept() -> None:
    kept = []
    student, teacher = Images(4), Images(5, seed=1)
    student.fc, teacher.fc = nn.Linear(4, 1000), nn.Linear(5, 1000)
    outputs = [Outputs(torch.zeros(2, 1000), {"body": torch.ones(2, c, 8, 8, requires_grad=True)}) for c in (4, 5)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attached(student, teacher, resolution=2)(*outputs, None)
    assert max(kept) <= 2 * 1000 * 2 * 2


def test_the_students_weight_is_read_live_and_is_not_the_losss_parameter() -> None:
    student, teacher = Images(4), Images(5, seed=1)
    loss = attached(student, teacher)
    assert not list(loss.parameters())
    assert not loss.state_dict()
    outputs = (
        Outputs(torch.zeros(2, 3), {"body": torch.ones(2, 4, 4, 4)}),
        Outputs(torch.zeros(2, 3), {"body": wave((2, 5, 4, 4), 0.7, 0.2).float()}),
    )
    before = loss(*outputs, None)
    before.backward()
    assert student.fc.weight.grad.any()
    assert teacher.fc.weight.grad is None
    with torch.no_grad():
        student.fc.weight.neg_()
    assert loss(*outputs, None) != before
    student.fc = nn.Conv2d(4, 3, 1)  # another layer under its name
    loss(*outputs, None).backward()
    assert student.fc.weight.grad.any()


class Plain(LightningModule):
    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.net = None if late else Images(4)

    def setup(self, stage: str) -> None:
        self.net = self.net or Images(4)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("late", [False, True])
def test_the_classifier_that_is_trained_is_the_one_that_is_compared_through_both_doors(late: bool) -> None:
    data = DataLoader(TensorDataset(wave((16, 1, 4, 4), 0.7, 0.3).float(), torch.arange(16) % 3), batch_size=8)
    teacher = Images(5, seed=1)
    module, callback = (
        Plain(late),
        Distillation(teacher, {"cat_kd": CATKD("body", weight=50.0)}, "net", task_weight=0.0, check_teacher=False),
    )
    trainer(callbacks=[callback], max_epochs=3).fit(module, data)
    other = DistillationModule(
        Images(4),
        teacher,
        {"cat_kd": CATKD("body", weight=50.0)},
        lambda p: torch.optim.SGD(p, 0.1),
        check_teacher=False,
    )
    trainer(max_epochs=3).fit(other, data)
    assert_equal(weights(module.net), weights(other.student))
    assert_equal(weights(copy.deepcopy(other).student), weights(other.student))

    # By hand.
    student, loss = Images(4), CATKD("body", weight=50.0)
    objective = DistillationObjective({"cat_kd": loss})
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for inputs, _ in [batch for _ in range(3) for batch in data]:
        s, t = (Outputs(net(inputs), {"body": net.body(inputs)}) for net in (student, teacher))
        objective.build(s, t, student, teacher)
        optimizer.zero_grad()
        objective(s, t, None)[0].backward()
        optimizer.step()
    torch.testing.assert_close(weights(module.net), weights(student))
    assert not torch.equal(student.fc.weight, Images(4).fc.weight)


def test_what_cannot_be_is_refused() -> None:
    student, teacher = Images(4), Images(5, seed=1)
    with pytest.raises(ValueError, match="activation maps of 6 classes and the teacher of 5"):
        class_attention_transfer(STUDENT, TEACHER[:, :5])
    with pytest.raises(ValueError, match=r"expected maps \(B, C, H, W\), got \(4, 6\)"):
        class_attention_transfer(STUDENT[..., 0, 0], TEACHER)
    with pytest.raises(ValueError, match="expected resolution >= 1, got 0"):
        class_attention_transfer(STUDENT, TEACHER, resolution=0)
    with pytest.raises(ValueError, match="expected resolution >= 1, got 0"):
        CATKD("body", resolution=0)
    with pytest.raises(ValueError, match="Images has no layer 'head'"):
        attached(student, teacher, student_classifier="head")
    with pytest.raises(ValueError, match="the classifier 'body' of Images is a Conv2d, expected a linear layer"):
        attached(student, teacher, teacher_classifier="body")
    with pytest.raises(ValueError, match=r"expected a call of attach\(student, teacher\) before"):
        CATKD("body")(Outputs(SMALL, {"body": SMALL}), Outputs(SMALL, {"body": SMALL}), None)
    outputs = Outputs(torch.zeros(2, 3), {"body": SMALL})
    with pytest.raises(ValueError, match="the layer has 3 channels and the classifier 'fc' reads 4"):
        attached(student.double(), teacher.double())(outputs, outputs, None)
