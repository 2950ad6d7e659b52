"""What every distillation loss has in common."""

import math
from collections.abc import Sequence
from numbers import Real

from torch import Tensor, nn

from kd_lightning.losses.standardize import standardize_logits
from kd_lightning.outputs import Outputs, TopK, classes_last
from kd_lightning.tasks.batch import IGNORE_INDEX


class DistillationLoss(nn.Module):
    """One term of the objective: computes an unweighted scalar from student, teacher and target.

    Projectors and learnable temperatures are parameters of their loss. Those whose shapes depend on the networks are
    created in :meth:`build`, which is called with the outputs of a dry forward pass before the optimizer exists.

    Args:
        weight: Factor of the term in the total, ≥ 0; a plain number, so that it can be scheduled.
        student_layers: Names of the student's layers that the loss reads.
        teacher_layers: Names of the teacher's layers that the loss reads.
        gather: Under DDP, compare the samples of all processes in place of each process's own; for losses that
            :attr:`compares_samples`. Every process then computes the loss of the whole batch.

    Raises:
        ValueError: For a weight that is negative or no finite number, and for layers that do not come in pairs.
    """

    needs_labels = False
    """Whether the loss is meaningless on a data set without any label."""
    needs_teacher = True
    needs_sample_ids = False
    """Whether the batch has to say which samples of the data set it holds; see :class:`kd_lightning.data.WithIds`."""
    needs_same_classes = True
    """Whether the student's classes have to be the teacher's."""
    over_classes = True
    """Whether it takes outputs for logits of classes that exclude each other, as a softmax does: of one output, and of
    several labels a sample, it would be constant or wrong."""
    of_values = False
    """Whether it takes outputs for values, as those of a regression are."""
    reads_logits = True
    """Whether it reads the networks' own outputs. Nothing is asked of these where no loss does."""
    takes_top_k = False
    """Whether the teacher's k best classes (:class:`~kd_lightning.outputs.TopK`) do in the place of its logits."""
    needs_teacher_network = False
    """Whether :meth:`attach` reads the teacher's network, so that its outputs alone are not enough."""
    compares_samples = False
    """Whether a sample's loss depends on the others in the batch, so that it is another in batches of another size."""
    changes_student = False
    """Whether :meth:`attach` changes the student's architecture; ``change`` does so by hand."""
    min_batch_size = 1
    student_head: str | None = None
    """Name of the student's head where the loss computes the logits itself, from a layer's output and the head's
    weight: the network need not compute them."""
    teacher_head: str | None = None
    products_in_autocast = False
    """Whether its matrix products are taken in autocast's precision, as a head's are; what it makes of them is not."""

    def __init__(
        self,
        weight: float = 1.0,
        student_layers: Sequence[str] = (),
        teacher_layers: Sequence[str] | None = None,
        gather: bool = False,
    ) -> None:
        super().__init__()
        if not is_finite_number(weight) or weight < 0:
            raise ValueError(f"expected weight >= 0, got {weight!r}: leave the loss out, or pass 0 to only log it")
        self.weight = weight
        self.student_layers = tuple(student_layers)
        self.teacher_layers = self.student_layers if teacher_layers is None else tuple(teacher_layers)
        self.gather = gather

    def take_after(self, loss: "DistillationLoss") -> None:
        """Need and change what another loss does, which this one computes with."""
        for name, value in vars(DistillationLoss).items():
            if isinstance(value, int) and not name.startswith("_"):
                setattr(self, name, getattr(loss, name))

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Create the parameters whose shapes follow from the networks' outputs. Called once; nothing by default."""

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Read from the networks what their outputs do not show. Called after :meth:`build`.

        Called again whenever the student is another object: in another ``fit``, and by ``Distillation`` when the
        student is made after the callbacks' ``setup``, which had to show a copy. Parameters are made in :meth:`build`
        only.
        """

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        """Return the unweighted scalar.

        ``teacher`` is given whenever ``needs_teacher``: a :class:`~kd_lightning.outputs.TopK` where no more is known of
        it and the loss ``takes_top_k``. ``target`` is None for a batch without labels.
        """
        raise NotImplementedError


class LogitLoss(DistillationLoss):
    """A loss on logits.

    Args:
        weight: Factor of the term.
        standardize: Compare standardised logits (:func:`~kd_lightning.losses.standardize_logits`). The authors take
            T = 2 and 9 times the weight then.
        gather: See :class:`DistillationLoss`.
    """

    def __init__(self, weight: float = 1.0, standardize: bool = False, gather: bool = False) -> None:
        super().__init__(weight, gather=gather)
        self.standardize = standardize

    def logits(self, student: Outputs, teacher: Outputs | TopK) -> tuple[Tensor, Tensor]:
        """Return the student's and the teacher's logits, standardised where that was asked for."""
        pair = student.logits, teacher.logits
        return (standardize_logits(pair[0]), standardize_logits(pair[1])) if self.standardize else pair


class FeatureLoss(DistillationLoss):
    """A loss on the outputs of one layer each, or on the networks' own outputs where no layer is named.

    Args:
        student_layer: Name of the student's layer; None for the outputs of both networks, such as embeddings.
        teacher_layer: Name of the teacher's layer; the student's unless given.
        weight: Factor of the term.
        gather: See :class:`DistillationLoss`.

    Raises:
        ValueError: For a teacher's layer without a student's.
    """

    needs_same_classes = over_classes = False

    def __init__(
        self,
        student_layer: str | None = None,
        teacher_layer: str | None = None,
        weight: float = 1.0,
        gather: bool = False,
    ) -> None:
        if student_layer is None and teacher_layer is not None:
            raise ValueError(f"expected a student_layer to compare with {teacher_layer!r}, got None: name both or none")
        layers = [] if student_layer is None else [student_layer]
        super().__init__(weight, layers, None if teacher_layer is None else [teacher_layer], gather)
        self.reads_logits = not layers
        self.takes_top_k = bool(layers)

    def features(self, student: Outputs, teacher: Outputs | TopK) -> tuple[Tensor, Tensor]:
        """Return what is compared: the outputs of the two layers, or of the two networks."""
        if not self.student_layers:
            return student.logits, teacher.logits
        return student.features[self.student_layers[0]], teacher.features[self.teacher_layers[0]]


class LayersLoss(DistillationLoss):
    """A loss on the outputs of several layers each, which are compared pair by pair.

    Args:
        student_layers: Names of the student's layers.
        teacher_layers: Names of the teacher's layers, as many; the student's unless given.
        weight: Factor of the term.
        gather: See :class:`DistillationLoss`.

    Raises:
        ValueError: For no layer, or another number of layers on each side.
    """

    needs_same_classes = over_classes = False
    reads_logits = False
    takes_top_k = True

    def __init__(
        self,
        student_layers: Sequence[str],
        teacher_layers: Sequence[str] | None = None,
        weight: float = 1.0,
        gather: bool = False,
    ) -> None:
        super().__init__(weight, student_layers, teacher_layers, gather)
        if isinstance(student_layers, str) or isinstance(teacher_layers, str):
            raise ValueError(f"expected lists of layers, got {student_layers!r}, {teacher_layers!r}: pass ['layer']")
        if not self.student_layers or len(self.student_layers) != len(self.teacher_layers):
            raise ValueError(
                f"expected one or more student layers and as many teacher layers, got {list(self.student_layers)} and "
                f"{list(self.teacher_layers)}: they are compared pair by pair"
            )

    def pairs(self, student: Outputs, teacher: Outputs | TopK) -> list[tuple[Tensor, Tensor]]:
        """Return the outputs of the student's and the teacher's layers, pair by pair."""
        return [
            (student.features[s], teacher.features[t])
            for s, t in zip(self.student_layers, self.teacher_layers, strict=True)
        ]


def is_finite_number(value: object) -> bool:
    """Tell whether a value is a number that a loss can be multiplied by; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_temperature(temperature: float | Tensor) -> None:
    """Raise ValueError unless the temperature is a positive, finite number."""
    number = isinstance(temperature, Tensor) or is_finite_number(temperature)
    if not number or not temperature > 0:
        raise ValueError(
            f"expected temperature > 0, got {temperature!r}: 1 leaves the logits as they are, 2 to 8 soften"
        )


def check_not_negative(**coefficients: float) -> None:
    """Raise ValueError for a coefficient that is negative, or no finite number."""
    for name, value in coefficients.items():
        if not is_finite_number(value) or value < 0:
            raise ValueError(f"expected {name} >= 0, got {value!r}: 0 leaves its part of the loss out")


def check_same_shape(student: Tensor, teacher: Tensor, what: str = "logits") -> None:
    """Raise ValueError unless both have the same shape."""
    if student.shape != teacher.shape:
        remedy = (
            "give both the same classes in the same order, or slice the teacher's outputs"
            if what == "logits"
            else "name layers of the same shape, or take a loss that projects"
        )
        raise ValueError(
            f"student {what} {tuple(student.shape)} and teacher {what} {tuple(teacher.shape)} differ, expected the "
            f"same shape: {remedy}"
        )


def check_batch(samples: int, least: int, what: str) -> None:
    """Raise ValueError for a batch with too few samples to compare."""
    if samples < least:
        raise ValueError(
            f"{what} compares samples and needs a batch of at least {least}, got {samples}: raise the batch size, or "
            "leave the last, smaller batch out with drop_last=True"
        )


def rows(logits: Tensor) -> Tensor:
    """Return logits as (N, C): one row a sample, a token of (B, S, V) or a pixel of (B, C, H, W)."""
    return classes_last(logits).flatten(0, -2)


def labelled(target: Tensor, *logits: Tensor) -> tuple[Tensor, ...]:
    """Return the labels (N,) and the rows (N, C) of the samples that have one; N may be 0.

    Raises:
        ValueError: For targets that are probabilities, or of another number of samples.
    """
    if target.is_floating_point():
        raise ValueError(
            "expected class indices as target, got probabilities (mixup?): this loss asks which class is the right "
            "one; leave mixup out, or take a loss without labels, such as kd"
        )
    labels, flat = target.flatten(), [rows(x) for x in logits]
    if any(len(x) != len(labels) for x in flat):
        raise ValueError(
            f"expected one label for each of the logits {tuple(logits[0].shape)}, got a target {tuple(target.shape)}"
        )
    kept = labels != IGNORE_INDEX
    return labels[kept], *(x[kept] for x in flat)


def counted(target: Tensor | None, *logits: Tensor, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, ...]:
    """Return the rows (N, C) that count: all of them, or those whose target is not ignored, where one is given.

    Raises:
        ValueError: For a target of another shape than the logits' without their classes.
    """
    flat = tuple(rows(x) for x in logits)
    if target is None:
        return flat
    expected = classes_last(logits[0]).shape[:-1]
    if target.shape != expected:
        raise ValueError(
            f"expected a target {tuple(expected)} for logits {tuple(logits[0].shape)}, got {tuple(target.shape)}: "
            "pass one class index a token, the ignore_index where it does not count"
        )
    kept = target.flatten() != ignore_index
    return tuple(x[kept] for x in flat)


def padding(logits: Tensor, target: Tensor | None) -> Tensor | None:
    """Return the target where it says which tokens are padding: for (B, S, V) logits, a (B, S) target.

    An image without label counts, as does an unlabelled pixel: the teacher knows something of it. A token that is
    ignored is no text.
    """
    return target if target is not None and logits.ndim == 3 and target.shape == logits.shape[:2] else None


def nothing(student: Outputs) -> Tensor:
    """Return zero, with a gradient of zero: the loss of a batch in which nothing counts."""
    return 0.0 * student.logits.sum()
