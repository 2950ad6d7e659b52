"""What every loss keeps, through the objective as in a training: a new loss has to have an entry in the table."""

import inspect
import pickle
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from copy import deepcopy
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule, Outputs, losses
from kd_lightning.data import WithIds
from kd_lightning.losses.base import DistillationLoss, FeatureLoss, LayersLoss, LogitLoss
from kd_lightning.objective import DistillationObjective
from kd_lightning.outputs import Samples
from tests.tiny import assert_equal, sgd, trainer, weights

BATCH, CLASSES, SAMPLES = 4, 5, 8
STUDENT, TEACHER = 0, 1
LOGITS = {"vectors": (CLASSES,), "tokens": (3, CLASSES), "dense": (CLASSES, 2, 2)}
FEATURES = {
    "early": ((3, 4, 4), (5, 4, 4)),
    "late": ((4, 2, 2), (6, 4, 4)),
    "even": ((3, 4, 4), (3, 2, 2)),  # as many channels on both sides
    "even_late": ((2, 2, 2), (2, 2, 2)),
    "pooled": ((4,), (6,)),
    "tokens": ((3, 4), (3, 5)),
}
"""The layers' outputs for one sample: the student's and the teacher's."""


class Case(NamedTuple):
    make: Callable[..., DistillationLoss]
    logits: str = "vectors"
    teacher_classes: int = CLASSES
    labelled_classes: int = CLASSES
    """How many classes the labels are of; of fewer than samples where a loss compares samples of one class."""
    target: str = "classes"  # or "labels" (several a sample), or "values"


def curriculum(inner: Callable[[], DistillationLoss], **options: Any) -> losses.CurriculumTemperature:
    return losses.CurriculumTemperature(inner(), **options)


ON_LOGITS = {
    "abkd": partial(losses.ABKD, 0.6, 0.4),
    "ctkd": partial(curriculum, losses.KD),
    "deit_hard": losses.DeiTHard,
    "deit_soft": losses.DeiTSoft,
    "dist": losses.DIST,
    "dkd": losses.DKD,
    "forward_kl": losses.ForwardKL,
    "hard_label": losses.HardLabel,
    "jensen_shannon": losses.JensenShannon,
    "kd": losses.KD,
    "logits_mse": losses.LogitsMSE,
    "nkd": losses.NKD,
    "reverse_kl": losses.ReverseKL,
    "rld": losses.RLD,
    "sampled_label": losses.SampledLabel,
    "skewed_forward_kl": losses.SkewedForwardKL,
    "skewed_reverse_kl": losses.SkewedReverseKL,
    "symmetric_kl": losses.SymmetricKL,
    "top_k_kl": partial(losses.TopKKL, 2),
    "total_variation": losses.TotalVariation,
    "ttm": losses.TTM,
    "uld": losses.ULD,
    "wkd_logits": partial(losses.WKDLogits, "fc"),
}
ON_LABELS = {
    "bce": losses.BCE,
    "sigmoid_hard": losses.SigmoidHard,
    "sigmoid_kd": losses.SigmoidKD,
}
ON_VALUES = {
    "label_regression": losses.LabelRegression,
    "teacher_bounded": losses.TeacherBounded,
    "teacher_regression": losses.TeacherRegression,
}
ON_FEATURES = {
    "ab": partial(losses.AB, ["early", "late"]),
    "at": partial(losses.AT, ["early", "late"]),
    "cat_kd": partial(losses.CATKD, "late"),
    "cat_kd_sizes": partial(losses.CATKD, "late", normalize=False),
    "cc": partial(losses.CC, "pooled", width=3),
    "cc_maps": partial(losses.CC, "late", width=3),
    "cosine": partial(losses.Cosine, "pooled"),
    "cosine_maps": partial(losses.Cosine, "late"),
    "crd": partial(losses.CRD, "pooled", feature_dim=3, negatives=5),
    "crd_maps_all_negatives": partial(losses.CRD, "late", feature_dim=3),
    "cwd": partial(losses.CWD, "late"),
    "fsp": partial(losses.FSP, ["even", "even_late"]),
    "ft": partial(losses.FT, "late"),
    "hint": partial(losses.Hint, "late"),
    "hint_tokens": partial(losses.Hint, "tokens"),
    "hint_vectors": partial(losses.Hint, "pooled"),
    "mgd": partial(losses.MGD, "late"),
    "mgd_channels": partial(losses.MGD, "even", mask="channel"),
    "nst": partial(losses.NST, ["early", "late"]),
    "ofd": partial(losses.OFD, ["early", "late"]),
    "pkt": partial(losses.PKT, "pooled"),
    "pkt_maps": partial(losses.PKT, "late"),
    "review_kd": partial(losses.ReviewKD, ["early", "late"]),
    "review_kd_vectors": partial(losses.ReviewKD, ["early", "late", "pooled"]),
    "rkd": partial(losses.RKD, "pooled"),
    "rkd_maps": partial(losses.RKD, "late"),
    # The student's layer is given as it is afterwards, with the teacher's channels; that it is changed is tested below.
    "simkd": partial(losses.SimKD, "even"),
    "sp": partial(losses.SP, "late"),
    "vid": partial(losses.VID, ["early", "late"]),
    "vid_tokens_and_vectors": partial(losses.VID, ["tokens", "pooled"]),
    "wkd_features": partial(losses.WKDFeatures, "late"),
}
# They compute the logits themselves, of a layer and the head.
FUSED = {
    "fused_divergence": partial(losses.FusedDivergence, "reverse_kl", "pooled", "fc", "pooled", "fc"),
    "fused_hard_label": partial(losses.FusedHardLabel, "pooled", "fc"),
    "fused_kl": partial(losses.FusedKL, "pooled", "fc", "pooled", "fc"),
}
ON_OUTPUTS = (losses.CC, losses.Cosine, losses.Hint, losses.PKT, losses.RKD, losses.SP)
VARIANTS = {
    "abkd_kl": partial(losses.ABKD, 1.0, 0.0),
    "abkd_logarithms": partial(losses.ABKD, 0.0, 0.0),
    "abkd_reverse_kl": partial(losses.ABKD, 0.0, 1.0),
    "ctkd_dkd": partial(curriculum, losses.DKD),
    "mlkd": losses.MLKD,  # which refuses tokens and pixels
    "top_k_kl_no_tail": partial(losses.TopKKL, 2, tail=False),
    "wttm": partial(losses.TTM, weighted=True),
}
CASES = {
    **{f"{name}-{kind}": Case(make, kind) for name, make in ON_LOGITS.items() for kind in LOGITS},
    **{
        f"{name}-standardized": Case(partial(make, standardize=True))
        for name, make in ON_LOGITS.items()
        if isinstance(make(), LogitLoss)
    },
    **{f"{name}-{kind}": Case(make, kind, target="labels") for name, make in ON_LABELS.items() for kind in LOGITS},
    **{name: Case(make, target="values") for name, make in ON_VALUES.items()},
    **{
        f"{name}-{form}": Case(partial(ON_VALUES[name], form), target="values")
        for name in ("label_regression", "teacher_regression")
        for form in ("l1", "huber")
    },
    "teacher_bounded-margin": Case(partial(losses.TeacherBounded, 5.0), target="values"),
    **{name: Case(make) for name, make in {**VARIANTS, **ON_FEATURES, **FUSED}.items()},
    "cwd-dense": Case(losses.CWD, "dense"),
    "supcon": Case(losses.SupCon, labelled_classes=2),
    "uld-other_vocabulary": Case(losses.ULD, "tokens", teacher_classes=7),
    # Embeddings: what the networks give is vectors, the teacher's of another width.
    **{f"{make.__name__.lower()}-outputs": Case(make, teacher_classes=7) for make in ON_OUTPUTS},
}


def every(cases: Iterable[tuple[str, Case]]) -> pytest.MarkDecorator:
    names, values = zip(*cases, strict=True)
    return pytest.mark.parametrize("case", values, ids=names)


# What a formula does with numbers and shapes is tested case by case; what all cases of a class share, once a class.
every_case = every(CASES.items())
every_class = every({type(case.make()): (name, case) for name, case in reversed(CASES.items())}.values())
every_formula = every((name, case) for name, case in CASES.items() if case.logits == "vectors")
every_formula_on_logits = every(
    (name, case) for name, case in CASES.items() if case.logits == "vectors" and not case.make().student_layers
)
every_shape = every((name, case) for name, case in CASES.items() if not name.endswith("-standardized"))


class Network(nn.Module):
    """The layers of above that are read from images of 4×4 pixels, one after the other."""

    def __init__(self, role: int, classes: int = CLASSES) -> None:
        super().__init__()
        even, early, late = (FEATURES[name][role][0] for name in ("even", "early", "late"))
        self.even = nn.Conv2d(2, even, 3, padding=1)
        self.widen = nn.Conv2d(even, early, 1)
        self.early = nn.BatchNorm2d(early)
        self.down = nn.Conv2d(early, late, 3, padding=1, stride=2)
        self.late = nn.BatchNorm2d(late)
        self.pooled = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(late, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pooled(self.late(self.down(self.early(self.widen(self.even(x))).relu()))))


def network(role: int, classes: int = CLASSES) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(role)
        return Network(role, classes)


@cache
def teacher_network() -> Network:
    return network(TEACHER)  # which no loss changes


def outputs(case: Case, role: int, batch: int = BATCH) -> Outputs:
    random = torch.Generator().manual_seed(role)

    def normal(shape: Iterable[int]) -> Tensor:
        return torch.randn(BATCH, *shape, generator=random)[:batch]

    classes = case.teacher_classes if role == TEACHER else CLASSES
    return Outputs(
        2 * normal(classes if size == CLASSES else size for size in LOGITS[case.logits]),
        {name: normal(shapes[role]) for name, shapes in FEATURES.items()},
        Samples(torch.arange(batch), SAMPLES) if role == STUDENT else None,
    )


def labels(case: Case, batch: int = BATCH) -> Tensor:
    """A class for each sample, token or pixel; the last has none, unless it is the only one. Or each logit's own."""
    logits = outputs(case, STUDENT, batch).logits
    if case.target == "values":
        values = torch.arange(logits.numel()).cos().reshape(logits.shape)
        values[-1, -1] = torch.nan
        return values
    if case.target == "labels":
        own = (torch.arange(logits.numel()) % 3 == 0).long().reshape(logits.shape)
        own.view(-1)[-1] = -100
        return own
    shape = logits.movedim(1, -1).shape[:-1] if case.logits == "dense" else logits.shape[:-1]
    target = (torch.arange(shape.numel()) % case.labelled_classes).reshape(shape)
    if shape.numel() > 1:
        target.view(-1)[-1] = -100
    return target


def unlabelled(case: Case) -> Tensor:
    return torch.full_like(labels(case), torch.nan if case.target == "values" else -100)


def mapped(function: Callable[[Tensor], Tensor], given: Outputs) -> Outputs:
    return given._replace(
        logits=function(given.logits), features={name: function(x) for name, x in given.features.items()}
    )


def leaves(given: Outputs) -> Outputs:
    return mapped(lambda x: x.detach().clone().requires_grad_(), given)


def built(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> DistillationObjective:
    """The loss as it is when the first batch comes."""
    torch.manual_seed(seed)
    objective = DistillationObjective({"loss": case.make(**options)})
    student = network(STUDENT)
    objective.build(outputs(case, STUDENT), outputs(case, TEACHER), student, teacher_network())
    student.to(dtype)
    return objective.to(dtype)


def loss_of(objective: DistillationObjective) -> DistillationLoss:
    return objective.named_losses()["loss"]


def read(loss: DistillationLoss, student: Outputs) -> list[Tensor]:
    """The student's outputs that a loss reads."""
    return [student.features[name] for name in loss.student_layers] or [student.logits]


def value(objective: DistillationObjective, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
    torch.manual_seed(0)  # of what a loss masks
    return objective(student, teacher, target)[0]


def assert_trains(
    objective: DistillationObjective,
    student: Outputs,
    teacher: Outputs,
    target: Tensor | None,
    autocast: torch.dtype | None = None,
    at_most: float = float("inf"),
) -> Tensor:
    """The value is finite, and so is the gradient of what the loss reads and of its parameters."""
    student = leaves(student)
    objective.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        total = value(objective, student, teacher, target)
    assert total.isfinite(), total
    total.backward()
    for x in (*read(loss_of(objective), student), *objective.parameters()):
        assert x.grad is not None
        assert x.grad.dtype == x.dtype
        assert x.grad.isfinite().all()
        assert x.grad.abs().max().item() < at_most
    return total


def step(objective: DistillationObjective) -> None:
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter -= 0.01 * parameter.grad


def test_every_loss_has_a_case() -> None:
    """Should this fail, there is a new loss: give it an entry in one of the tables above."""
    exported = [getattr(losses, name) for name in losses.__all__]
    common = {DistillationLoss, LogitLoss, FeatureLoss, LayersLoss}
    classes = {c for c in exported if isinstance(c, type) and issubclass(c, DistillationLoss)} - common
    assert {type(case.make()) for case in CASES.values()} == classes


# Precision


@every_class
def test_autocast_and_half_precision_outputs_are_computed_in_float32(case: Case) -> None:
    objective, both, target = built(case), [outputs(case, role) for role in (STUDENT, TEACHER)], labels(case)

    def assert_the_same(total: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
        if loss_of(objective).products_in_autocast:  # as those of a head, which are rounded there
            torch.testing.assert_close(total, expected, rtol=8 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
        else:
            assert torch.equal(total, expected)

    for dtype in (torch.float16, torch.bfloat16):
        student, teacher = (mapped(lambda x, d=dtype: x.to(d), given) for given in both)
        expected = value(deepcopy(objective), *(mapped(Tensor.float, x) for x in (student, teacher)), target)
        total = assert_trains(deepcopy(objective), student, teacher, target, autocast=dtype)
        assert total.dtype == torch.float32
        assert_the_same(total, expected, dtype)
    objective.eval()
    expected = value(objective, *both, target)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert_the_same(value(objective, *both, target), expected, dtype)


@every_class
def test_bfloat16_parameters_train_on_bfloat16_outputs(case: Case) -> None:
    """As in precision="bf16-true"."""
    objective, target = built(case, torch.bfloat16), labels(case)
    student, teacher = (mapped(Tensor.bfloat16, outputs(case, role)) for role in (STUDENT, TEACHER))
    for _ in range(2):
        assert assert_trains(objective, student, teacher, target).dtype == torch.float32
        step(objective)


# Numbers at which a formula may fail


@every_formula
def test_huge_outputs_give_finite_values_and_gradients(case: Case) -> None:
    student, teacher = (
        given._replace(logits=1e4 * given.logits.sign(), features={name: 1e4 * x for name, x in given.features.items()})
        for given in (outputs(case, STUDENT), outputs(case, TEACHER))
    )
    objective, target = built(case), labels(case)
    assert_trains(objective, student, teacher, target)
    assert_trains(objective, student, outputs(case, TEACHER), target)
    assert_trains(objective, outputs(case, STUDENT), teacher, target)


@every_formula_on_logits
def test_one_class_may_have_all_the_probability(case: Case) -> None:
    for role in (STUDENT, TEACHER):
        objective, both = built(case), [outputs(case, STUDENT), outputs(case, TEACHER)]
        for certain in (0, CLASSES - 1):
            logits = torch.full_like(both[role].logits, -1e4)
            logits[:, certain] = 1e4
            both[role] = both[role]._replace(logits=logits)
            assert_trains(objective, *both, labels(case))


def largest(loss: DistillationLoss) -> float:
    """Return what no gradient exceeds where something is constant: what ``normalize`` divides by 1e-12 does."""
    bound = 1e4  # batch normalisation divides by √1e-5
    if isinstance(loss, losses.DIST):
        bound *= 1e8  # its authors add 1e-8 to a product of norms
    if isinstance(loss, losses.FT):
        bound *= 1e5  # three batch normalisations, one after the other
    if isinstance(loss, LogitLoss) and loss.standardize:
        bound *= 1e7  # standardising adds 1e-7 to a standard deviation
    return bound


DEGENERATE: dict[str, Callable[[Tensor], Tensor]] = {
    "the same samples": lambda x: x[:1].expand(x.shape).clone(),
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "a zero sample": lambda x: x.index_fill(0, torch.tensor(0), 0.0),
    "a zero channel": lambda x: x.index_fill(1, torch.tensor(0), 0.0),
}
"""Outputs as those of a classifier that starts at zero, of a dead layer, or of a constant image."""


@every_formula
def test_outputs_may_be_the_same_or_constant(case: Case) -> None:
    objective, both, target = built(case), [outputs(case, role) for role in (STUDENT, TEACHER)], labels(case)
    at_most = largest(loss_of(objective))
    for change in DEGENERATE.values():
        student, teacher = (mapped(change, given) for given in both)
        assert_trains(objective, student, teacher, target, at_most=at_most)
        assert_trains(objective, student, both[TEACHER], target, at_most=at_most)
        assert_trains(objective, both[STUDENT], teacher, target, at_most=at_most)


# Shapes and targets


@every_shape
def test_a_batch_of_one_is_enough_or_refused(case: Case) -> None:
    objective = built(case)
    loss, one = loss_of(objective), (outputs(case, STUDENT, 1), outputs(case, TEACHER, 1), labels(case, 1))
    # Tokens and pixels are samples. Of vectors, which batch normalisation cannot normalise alone, Review KD needs two.
    few = loss.min_batch_size > 1 and case.logits == "vectors"
    few = few or (isinstance(loss, losses.ReviewKD) and "pooled" in loss.student_layers)
    with pytest.raises(ValueError, match="needs a batch of at least") if few else nullcontext():
        assert_trains(objective, *one)


@every_shape
def test_a_batch_without_labels(case: Case) -> None:
    for target in (unlabelled(case), None):
        objective = built(case)
        student, teacher = leaves(outputs(case, STUDENT)), outputs(case, TEACHER)
        total = value(objective, student, teacher, target)
        total.backward()
        assert total.isfinite()
        # DDP waits for each of the parameters' gradients.
        assert all(
            parameter.grad is not None and parameter.grad.isfinite().all() for parameter in objective.parameters()
        )
        gradients = [x.grad for x in read(loss_of(objective), student)]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        if loss_of(objective).needs_labels:
            assert total == 0
            assert not any(gradient.any() for gradient in gradients)


@every_shape
def test_probabilities_as_target_are_taken_or_refused(case: Case) -> None:
    """As mixup gives them."""
    target = outputs(case, STUDENT).logits.softmax(1 if case.logits == "dense" else -1)
    objective = built(case)
    refuses = loss_of(objective).needs_labels and not isinstance(loss_of(objective), losses.HardLabel)
    refuses = refuses and case.target == "classes"
    message = "expected class indices as target, got probabilities"
    with pytest.raises(ValueError, match=message) if refuses else nullcontext():
        assert_trains(objective, outputs(case, STUDENT), outputs(case, TEACHER), target)


@every_shape
def test_the_layout_in_memory_changes_nothing(case: Case) -> None:
    """Channels last, and transposed tensors."""
    both, target = [outputs(case, role) for role in (STUDENT, TEACHER)], labels(case)

    def moved(x: Tensor) -> Tensor:
        return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x.mT.contiguous().mT

    total = assert_trains(built(case), *(mapped(moved, x) for x in both), target)
    torch.testing.assert_close(total, value(built(case), *both, target))


# Gradients


@every_case
def test_the_gradient_is_that_of_the_value_and_reaches_the_student_alone(case: Case) -> None:
    objective, target = built(case, torch.float64), labels(case)
    student, teacher = (leaves(mapped(Tensor.double, outputs(case, role))) for role in (STUDENT, TEACHER))
    value(objective, student, teacher, target).backward()  # CRD's normaliser follows from it, and is a constant then
    assert all(x.grad is not None and x.grad.any() for x in read(loss_of(objective), student))
    assert all(x.grad is None for x in (teacher.logits, *teacher.features.values()))

    objective.eval()  # batch statistics and masks stay as they are
    names = loss_of(objective).student_layers

    def total(*inputs: Tensor) -> Tensor:
        given = (
            student._replace(features={**student.features, **dict(zip(names, inputs, strict=True))})
            if names
            else student._replace(logits=inputs[0])
        )
        return value(objective, given, teacher, target)

    torch.autograd.gradcheck(total, tuple(read(loss_of(objective), leaves(student))), fast_mode=True)


# Parameters and state


@every_formula
def test_parameters_are_made_when_built_and_all_of_them_learn(case: Case) -> None:
    objective, both = built(case), [outputs(case, role) for role in (STUDENT, TEACHER)]
    before = dict(objective.named_parameters())
    for _ in range(2):
        assert_trains(objective, *both, labels(case))
        step(objective)
    after = dict(objective.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert all(parameter.requires_grad for parameter in before.values())


@every_class
def test_the_state_is_loaded_into_a_loss_built_anew(case: Case) -> None:
    one, other = built(case), built(case, seed=1)
    both, target = [outputs(case, role) for role in (STUDENT, TEACHER)], labels(case)
    assert_trains(one, *both, target)  # batch statistics, memory banks
    step(one)
    other.load_state_dict(deepcopy(one.state_dict()), strict=True)
    assert torch.equal(value(deepcopy(one).eval(), *both, target), value(deepcopy(other).eval(), *both, target))
    assert torch.equal(value(one, *both, target), value(other, *both, target))


@every_class
def test_a_copy_gives_the_same_value(case: Case) -> None:
    objective, both, target = built(case), [outputs(case, role) for role in (STUDENT, TEACHER)], labels(case)
    assert_trains(objective, *both, target)
    copies = deepcopy(objective), pickle.loads(pickle.dumps(objective))
    expected = value(objective, *both, target)
    for copy in copies:
        assert not {id(p) for p in copy.parameters()} & {id(p) for p in objective.parameters()}
        assert torch.equal(value(copy, *both, target), expected)


# What is refused


@every_class
def test_a_negative_weight_and_a_temperature_that_is_not_positive_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=r"expected weight >= 0, got -0\.5"):
        case.make(weight=-0.5)
    if "temperature" in inspect.signature(type(case.make())).parameters:
        for temperature in (0.0, -1.0):
            with pytest.raises(ValueError, match=f"expected temperature > 0, got {temperature}"):
                case.make(temperature=temperature)


@every((name, case) for name, case in CASES.items() if (loss := case.make()).needs_teacher and loss.needs_same_classes)
def test_other_classes_than_the_teachers_are_refused(case: Case) -> None:
    def first_step(teacher_classes: int) -> None:
        objective = DistillationObjective({"loss": case.make()})
        student, teacher = outputs(case, STUDENT), outputs(case._replace(teacher_classes=teacher_classes), TEACHER)
        objective.build(student, teacher, network(STUDENT), network(TEACHER, teacher_classes))
        value(objective, student, teacher, labels(case))

    for teacher_classes in (CLASSES - 1, CLASSES + 1):
        with pytest.raises(ValueError, match=r"loss 'loss'.*expected") as error:
            first_step(teacher_classes)
        assert str(CLASSES) in str(error.value)
        assert str(teacher_classes) in str(error.value)


# In a training


def data(count: int = 8) -> DataLoader:
    images = torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    return DataLoader(WithIds(TensorDataset(images, torch.arange(count) % CLASSES)), batch_size=BATCH)


def module(
    make: Callable[..., DistillationLoss], optimizer: Callable[..., Any] = sgd, classes: int = CLASSES
) -> DistillationModule:
    terms = {"hard_label": losses.HardLabel(), "loss": make()}
    return DistillationModule(network(STUDENT), network(TEACHER, classes), terms, optimizer, check_teacher=False)


TRAINED = {
    name: make
    for name, make in {**ON_LOGITS, **ON_FEATURES}.items()
    if name in ("hint", "vid", "ctkd", "crd", "review_kd_vectors", "ft", "cc")
}


@pytest.mark.parametrize("name", TRAINED)
def test_the_parameters_are_optimized_once_clipped_and_saved(name: str, tmp_path) -> None:
    trained = module(TRAINED[name], lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    begun: dict[str, Tensor] = {}
    remember = LambdaCallback(on_train_start=lambda _, module: begun.update(weights(module)))
    fit = trainer(gradient_clip_val=1e-3, max_steps=2, callbacks=[remember])
    fit.fit(trained, data())
    optimized = [id(p) for group in fit.optimizers[0].param_groups for p in group["params"]]
    own = [id(p) for p in trained.objective.parameters()]
    assert own
    assert len(optimized) == len(set(optimized))
    assert set(own) <= set(optimized)

    moved = {n: (p.detach() - begun[n]).norm() for n, p in trained.named_parameters() if p.requires_grad}
    assert torch.stack(list(moved.values())).norm() < 2.01e-3  # two steps, of 1e-3 each at most
    assert any(change > 0 for n, change in moved.items() if n.startswith("objective."))

    fit.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert_equal(saved["losses"], trained.objective.state_dict())
    assert_equal(saved["state_dict"], trained.student.state_dict())
    assert {f"losses.{key}" for key, _ in trained.losses.named_parameters()} <= saved["losses"].keys()


@pytest.mark.parametrize("name", TRAINED)
def test_a_resumed_training_gives_bitwise_what_an_uninterrupted_one_gives(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    whole = module(TRAINED[name])
    trainer(max_epochs=2).fit(whole, data())

    torch.manual_seed(0)
    half = trainer(max_epochs=1)
    half.fit(module(TRAINED[name]), data())
    half.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(1)
    resumed = module(TRAINED[name])
    trainer(max_epochs=2).fit(resumed, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert_equal(weights(resumed.student), weights(whole.student))
    assert_equal(weights(resumed.objective), weights(whole.objective))


def test_simkds_projector_is_the_students_own_and_is_optimized_once() -> None:
    trained = module(partial(losses.SimKD, "late"))
    plain = weights(trained.student)
    fit = trainer()
    fit.fit(trained, data())
    optimized = [id(p) for group in fit.optimizers[0].param_groups for p in group["params"]]
    assert len(optimized) == len(set(optimized))
    assert {id(p) for p in trained.student.get_submodule("late.projector").parameters()} <= set(optimized)
    assert not {id(p) for p in trained.student.fc.parameters()} & set(optimized)
    assert not list(trained.objective.parameters())
    assert not torch.equal(trained.student.even.weight, plain["even.weight"])


@pytest.mark.parametrize("name", ["hint", "vid", "cat_kd"])
def test_a_layer_that_is_not_there_is_refused_before_training_with_the_nearest(name: str) -> None:
    right, wrong = ("late", "latte") if name != "vid" else (["late"], ["latte"])
    make = {"hint": losses.Hint, "vid": losses.VID, "cat_kd": losses.CATKD}[name]
    for layers, role in (((wrong, right), "student"), ((right, wrong), "teacher")):
        with pytest.raises(ValueError, match=rf"the {role} Network has no layer 'latte', .*nearest.*: late \("):
            trainer().fit(module(partial(make, *layers)), data())


@pytest.mark.parametrize("name", ["kd", "cat_kd"])
def test_other_classes_than_the_teachers_are_refused_before_training(name: str) -> None:
    with pytest.raises(ValueError, match=r"student has 5 classes and the teacher 4, expected the same.*\['loss'\]"):
        trainer().fit(module({**ON_LOGITS, **ON_FEATURES}[name], classes=4), data())
