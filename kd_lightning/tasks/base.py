"""What a batch means, and what a good answer is."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from kd_lightning.headline import Headline
from kd_lightning.outputs import AnyOutputs, EnsembleOutputs, Outputs, PeerOutputs, TopK, classes_last, mixed
from kd_lightning.tasks.batch import Batch, unwrapped
from kd_lightning.tasks.calibration_error import CalibrationError
from kd_lightning.tasks.metric import HeadlineMetric

_TOO_FEW_TO_JUDGE = 100


class Task:
    """The one place that knows what a batch means and what a good answer is; a subclass is a task.

    Training, preflight, metrics, the pipeline's comparison and exported files ask it, and know of no classes. What a
    subclass has to say: :attr:`headline`, :meth:`check`, :meth:`answers`, :meth:`scores` and :meth:`agreement`.

    Batches are (input, target), inputs alone, or mappings with ``labels``, ``label`` or ``target``, as Hugging Face
    data sets give them. A teacher's outputs may come along: around the batch (:class:`~kd_lightning.tasks.Taught`), as
    the third part of a tuple, or in a mapping by names such as ``teacher_logits``; see
    :class:`~kd_lightning.teachers.FromBatch`.

    Attributes:
        headline: The figure by which models are judged.
        labelled: Whether test units have labels. Without, a model's scores are its agreement with the teacher.
        over_classes: Whether outputs are logits of classes that exclude each other, so that a softmax means something.
        gives_logits: Whether outputs are logits, so that probabilities are a mistake.
        class_dim: Which dimension of three-dimensional outputs is that of the classes, 1 for (B, C, L); None for the
            last.
        losses_to_take: Names of losses that mean something where a softmax does not, for errors.
        writes: Whether networks write texts, token by token, so that it counts how fast they do.
        shown: Names of arguments that change words and :meth:`parts` alone: with others, a finished training is used
            again.
    """

    headline: Headline
    labelled: bool = True
    over_classes: bool = True
    gives_logits: bool = True
    class_dim: int | None = None
    writes: bool = False
    losses_to_take: str = ""
    label_keys: Sequence[str] = ("labels", "label", "target")
    shown: Sequence[str] = ("units",)

    # What a batch means.

    def read(self, batch: Any) -> Batch:
        """Split a batch into the networks' arguments and the target.

        Raises:
            TypeError: For a batch of another kind.
        """
        batch, samples, teacher = unwrapped(batch, bare=True)
        read = self._read(batch)
        return read._replace(target=self.target_of(read.target), samples=samples, teacher=teacher)

    def _read(self, batch: Any) -> Batch:
        if isinstance(batch, Mapping):
            target = next((batch[key] for key in self.label_keys if key in batch), None)
            return Batch((), {key: value for key, value in batch.items() if key not in self.label_keys}, target)
        if isinstance(batch, Tensor):
            return Batch((batch,), {}, None)
        if isinstance(batch, Sequence) and len(batch) in (1, 2):
            inputs, target = batch[0], (batch[1] if len(batch) == 2 else None)
            return Batch((), inputs, target) if isinstance(inputs, Mapping) else Batch((inputs,), {}, target)
        got = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, Sequence) else type(batch).__name__
        raise TypeError(
            f"expected a batch (input, target), an input, or a mapping with 'labels', got a {got}: "
            "pass task= with a read() of your own"
        )

    def target_of(self, target: Any) -> Any:
        """Return a target in the type that losses read, such as class indices as int64; as it is by default."""
        return target

    def has_label(self, target: Tensor) -> Tensor:
        """Tell which samples have a label: bool (B,)."""
        return torch.ones(len(target), dtype=torch.bool, device=target.device)

    # What a network's outputs mean.

    def arrange(self, logits: Tensor) -> Tensor:
        """Put a network's output into the shape that losses read: the classes of (B, C, L) last, where it says so."""
        return logits.movedim(self.class_dim, -1) if self.class_dim is not None and logits.ndim == 3 else logits

    @overload
    def arranged(self, outputs: Outputs) -> Outputs: ...
    @overload
    def arranged(self, outputs: AnyOutputs) -> AnyOutputs: ...
    def arranged(self, outputs: AnyOutputs) -> AnyOutputs:
        """Return a network's or a teacher's outputs with logits in the shape that losses read."""
        arranged = outputs.with_logits(self.arrange)
        # The average of several is another where outputs are no classes, or these were not the last dimension.
        if isinstance(arranged, EnsembleOutputs | PeerOutputs) and not (self.over_classes and self.class_dim is None):
            return arranged.averaged(self.average)
        return arranged

    def average(self, members: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
        """Return one network's outputs for those of several teachers; by default the average of classes' probabilities.

        Raises:
            ValueError: Where outputs are no logits of classes, and a subclass has no average of its own.
        """
        if not self.over_classes:
            raise ValueError(f"{type(self).__name__} has no average of several teachers' outputs: take one of them")
        return mixed(members, weights, temperature)

    def check(self, target: Any, logits: Tensor) -> None:
        """Raise ValueError for a target that cannot be that of such outputs; with what was expected and what to do.

        Args:
            target: Of one batch.
            logits: Arranged, of any number of samples.
        """
        raise NotImplementedError

    def check_batch(self, batch: Batch) -> None:
        """Raise ValueError for a target that cannot be that of such inputs, whatever the networks give."""

    def check_dimensions(self, logits: Tensor, target: Tensor | None) -> None:
        """Raise ValueError for outputs of which neither the task nor a target tells which dimension is what.

        Also asked where no loss reads the target, which may then be none that :meth:`check` knows.
        """

    def check_unread(self, target: Tensor, logits: Tensor) -> None:
        """Raise ValueError for a target that no loss reads, where it tells that the outputs are another task's.

        A target that fits nothing is no such one: it may well be something else that the module's step needs.
        """
        if target.is_floating_point() and target.shape[1:] == logits.shape[1:]:
            self.check(target, logits)

    def check_arguments(self, width: int) -> None:
        """Raise ValueError where the task's own arguments do not go with a network's number of outputs."""

    def refuses(self, loss: nn.Module) -> str | None:
        """Say why a loss means nothing here, and which to take; None for a loss that does."""
        if self.over_classes or not getattr(loss, "over_classes", False):
            return None
        remedy = f": take {self.losses_to_take}" if self.losses_to_take else ""
        return f"reads a softmax over classes, which {type(self).__name__} does not have{remedy}"

    # What a good answer is.

    def answers(self, outputs: AnyOutputs) -> Tensor:
        """Return what a network says of each unit, in short: (n, ...); kept with a finished stage."""
        raise NotImplementedError

    def without_padding(self, answers: Tensor, target: Tensor | None) -> Tensor:
        """Mark the answers that count for nothing, such as those to padding; none does unless a task says so.

        Args:
            answers: Of some units.
            target: Of these units, where they have one.
        """
        return answers

    def joined(self, answers: Sequence[Tensor]) -> Tensor:
        """Concatenate the answers of several batches; of texts of several lengths, all tokens in a row."""
        return in_a_row(answers)

    def scores(self, outputs: AnyOutputs, target: Tensor) -> Tensor:
        """Return what the headline is computed of, for each labelled unit: (n,), or (n, ...) with ``of_mean``.

        Every model has the same units, in the order of the data.
        """
        raise NotImplementedError

    def agreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Tell how far two networks' answers agree: (n,) in [0, 1]."""
        raise NotImplementedError

    def beside(self, student: Outputs, teacher: AnyOutputs, target: Tensor) -> dict[str, Tensor]:
        """Return what else tells how far a student is from its teacher, by keys of ``records.FIGURES``: (n,) each.

        The figures are their means over the test split, or over a part of a large one. None by default.
        """
        return {}

    def confidence(self, outputs: AnyOutputs, target: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the probability that a model gives its answer, and whether that is right, by labelled unit: (n,) each.

        What calibration is about. None by default, of answers without a probability.
        """
        return None

    @property
    def has_confidence(self) -> bool:
        """Whether :meth:`confidence` gives any, so that a calibration error is logged."""
        return type(self).confidence is not Task.confidence

    def divergence(self, student: Outputs, teacher: AnyOutputs, target: Tensor | None) -> Tensor | None:
        """Return how far a student's probabilities are from its teacher's, by unit, token or pixel: (n,).

        None by default, where there are no probabilities.
        """
        return None

    @property
    def has_beside(self) -> bool:
        """Whether :meth:`beside` gives any figure, for which the teacher answers the test units with each student."""
        return type(self).beside is not Task.beside

    def comparable(self, student: Outputs, teacher: AnyOutputs) -> bool:
        """Tell whether two networks' answers can agree: not where they tell other classes apart."""
        return isinstance(teacher, TopK) or student.logits.shape == teacher.logits.shape

    def entropy(self, logits: Tensor, temperature: float = 1.0) -> Tensor | None:
        """Return the entropy of soft targets as a share of the largest possible; None where there are none."""
        return relative_entropy(logits, temperature) if self.over_classes else None

    def metrics(self) -> MetricCollection:
        """Make what is logged in validation and test; each metric is updated with outputs and target."""
        metrics: dict[str, Metric | MetricCollection] = {self.headline.key: HeadlineMetric(self)}
        if self.has_confidence:
            metrics["ece"] = CalibrationError(self)
        return MetricCollection(metrics, compute_groups=False)

    def knows_nothing(self, target: Tensor, width: int | None = None) -> float | None:
        """Return the headline of a model that has learnt nothing; None where that cannot be said.

        Args:
            target: Of the units that are judged.
            width: How many outputs a network has for each, where that is known.
        """
        return None

    def one_answer(self) -> str:
        """Say of a model that gives one answer to everything what it does."""
        return "gives one answer to everything"

    def learned_nothing(self, answers: Tensor, scores: Tensor, target: Tensor | None) -> str | None:
        """Say what makes a comparison with a model an empty one; None where nothing does, or too few units tell."""
        if len(scores) < _TOO_FEW_TO_JUDGE:
            return None
        if bool((answers == answers[:1]).all()):
            return self.one_answer()
        nothing = None if target is None else self.knows_nothing(target)
        return "is at chance" if nothing is not None and self.is_no_better(scores, nothing) else None

    def is_no_better(self, scores: Tensor, nothing: float) -> bool:
        """Tell whether a headline is not better than that of a model that knows nothing, by three standard errors."""
        found, margin = scores.double().cpu().numpy(), 0.0
        if self.headline.of_mean is None:
            spread = math.sqrt(nothing * (1 - nothing)) if self.headline.percent else float(found.std())
            margin = 3 * spread / math.sqrt(len(found))
        value = self.headline.value(found)
        return value <= nothing + margin if self.headline.higher_is_better else value >= nothing - margin

    @property
    def has_parts(self) -> bool:
        """Whether :meth:`parts` has any, for which all test targets are read."""
        return type(self).parts is not Task.parts

    def parts(self, target: Tensor, names: Sequence[str] | None = None) -> dict[str, NDArray[np.bool_]]:
        """Return parts of the labelled units whose headline is of interest on its own, by how it is called.

        Args:
            target: Of all units.
            names: Those of the classes, where the data names them.
        """
        return {}


def in_a_row(batches: Sequence[Tensor]) -> Tensor:
    """Concatenate batches; of texts that each batch pads to another length, all tokens in a row."""
    ragged = len({batch.shape[1:] for batch in batches}) > 1
    return torch.cat([batch.flatten() for batch in batches] if ragged else list(batches))


def relative_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(z / T) as a share of log C, averaged over samples, tokens or pixels.

    0 is a hard label, 1 the uniform distribution.
    """
    log_p = torch.log_softmax(classes_last(logits).float() / temperature, -1)
    return -(log_p.exp() * log_p).sum(-1).mean() / math.log(log_p.shape[-1])
