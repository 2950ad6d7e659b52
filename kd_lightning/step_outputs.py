"""A student's and a teacher's outputs in a step that somebody else wrote."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from lightning.pytorch import LightningModule
from torch import nn

from kd_lightning.batch_reader import BatchReader
from kd_lightning.idle_heads import idle
from kd_lightning.logits_place import LogitsPlace
from kd_lightning.objective import DistillationObjective
from kd_lightning.outputs import AnyOutputs, Outputs, Samples
from kd_lightning.several_calls import check_rows, join, repeated
from kd_lightning.student_calls import Seen, StudentCalls
from kd_lightning.tasks import Batch, Task
from kd_lightning.tasks.batch import Unwrapped
from kd_lightning.teachers import Ensemble, Momentum, Teacher, TeacherSource
from kd_lightning.teachers.base import BatchSource
from kd_lightning.tracking.step_clock import StepClock


class StepOutputs:
    """Takes the student's outputs out of its own forward pass, and calls the teacher with what the student got.

    Args:
        objective: Says which layers, and whether logits, are wanted.
        teacher: Gets the arguments of each call of the student.
        calls: Where the student and its logits are.
        batches: Reads what the step got.
        teacher_logits: Where the teacher's logits are; where the student's are, unless something is said.

    Attributes:
        student_kind: The student's class, once it is known. A teacher of the same has its logits in the same place.

    Raises:
        ValueError: For a teacher that cannot be called so.
    """

    def __init__(
        self,
        objective: DistillationObjective,
        teacher: TeacherSource,
        calls: StudentCalls,
        batches: BatchReader,
        teacher_logits: LogitsPlace,
    ) -> None:
        self.objective, self.teacher, self.calls, self.batches = objective, teacher, calls, batches
        self.student_kind: type[nn.Module] | None = None
        if teacher.copies_student:
            if teacher_logits.selector is not None:
                raise ValueError(
                    f"the teacher is a copy of the student, {type(teacher).__name__}, expected its logits where "
                    "the student's are: leave teacher_logits= out"
                )
            teacher_logits = calls.logits
        elif teacher_logits.selector is not None and not _running(teacher):
            raise ValueError(
                f"teacher_logits= is for a teacher whose network runs, got {type(teacher).__name__}: leave it out"
            )
        if calls.calls == "all" and _reads_batches(teacher):
            raise ValueError(
                f"{type(teacher).__name__} reads outputs for one call of the student from a batch, expected a "
                'teacher that is called for each with calls="all": take calls="first"'
            )
        self._teacher_logits = teacher_logits

    @property
    def task(self) -> Task:
        return self.batches.task

    def network(self, module: LightningModule) -> nn.Module:
        """Return the student."""
        return self.calls.student_of(module)

    def of_student(self, seen: Seen, samples: Samples | None = None) -> Outputs:
        """Return logits and features of the calls that were seen; logits without values where there are none to read.

        Args:
            seen: In a step.
            samples: Which ones a batch holds.
        """
        try:
            logits = seen.logits
        except ValueError:
            if self.objective.reads_logits:
                raise
            feature = next(iter(seen.features.values()))
            logits = feature.new_zeros(len(feature), 0)
        return Outputs(logits, seen.features, repeated(samples, seen.calls))

    def of_both(self, unwrapped: Unwrapped, seen: Seen, clock: StepClock) -> tuple[Outputs, AnyOutputs | None]:
        """Return the student's outputs, and the teacher's where a loss wants them, as losses read them."""
        student = self.task.arranged(self.of_student(seen, unwrapped.samples))
        if not self.objective.needs_teacher:
            return student, None
        idle_heads = idle(self.teacher.network, self.objective.idle_teacher_heads)
        with clock.teaching(student.logits.device), self.reading_teacher(), idle_heads:
            batches = map(self.without_labels, self.teacher_batches(unwrapped, seen))
            teacher = join([self.teacher(batch, self.objective.teacher_layers) for batch in batches])
        teacher = self.task.arranged(teacher)
        check_rows(student, teacher)
        return student, teacher

    def teacher_batches(self, unwrapped: Unwrapped, seen: Seen) -> list[Batch]:
        """Return what the teacher is called with, in the order of the student's calls."""
        own = not self.calls.inputs
        calls = [self.batches.arguments(unwrapped.batch)] if own else seen.inputs[: seen.calls]
        return [Batch(args, kwargs, None, unwrapped.samples, unwrapped.teacher) for args, kwargs in calls]

    def without_labels(self, batch: Batch) -> Batch:
        """Leave labels out of a teacher's arguments where it gives no logits, of which it would compute a loss."""
        if not self.objective.idle_teacher_heads:
            return batch
        keys = self.task.label_keys
        return batch._replace(kwargs={name: value for name, value in batch.kwargs.items() if name not in keys})

    @contextmanager
    def reading_teacher(self, in_any_case: bool = False) -> Iterator[None]:
        """Take the logits out of what the teacher's networks return, while the context lives.

        Args:
            in_any_case: Also where a teacher takes them out by itself, to say what it would not.
        """
        needed = self.objective.reads_logits
        with ExitStack() as hooks:
            for network in dict.fromkeys(_running(self.teacher)):
                place = self._place_in(network)
                if in_any_case or place.selector is not None or not needed:
                    hooks.enter_context(place.alone(network, needed))
            yield

    def _place_in(self, network: nn.Module) -> LogitsPlace:
        place, said = self._teacher_logits, self.calls.logits.selector
        if place.selector is not None or said is None:
            return place
        return replace(place, selector=said, borrowed=type(network) is not self.student_kind)

    def place_teacher(self, module: LightningModule) -> None:
        """Move the teacher to the student's device and precision."""
        floating = [p.dtype for p in self.network(module).parameters() if p.is_floating_point()]
        self.teacher.to(module.device, floating[0] if floating else None)


def _running(teacher: TeacherSource) -> list[nn.Module]:
    """Return the networks that a source calls for its outputs."""
    if isinstance(teacher, Ensemble):
        return [network for member in teacher.teachers for network in _running(member)]
    if teacher.peers:
        return list(teacher.peers.values())
    runs = isinstance(teacher, Teacher | Momentum) and teacher.network is not None
    return [teacher.network] if runs and teacher.network is not None else []


def _reads_batches(teacher: TeacherSource) -> bool:
    if isinstance(teacher, Ensemble):
        return any(_reads_batches(member) for member in teacher.teachers)
    return isinstance(teacher, BatchSource)
