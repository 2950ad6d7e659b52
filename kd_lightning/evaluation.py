"""What a model is worth on one split, as the task says: of a network, or of the file that serves it."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.outputs import AnyOutputs, Outputs, TopK
from kd_lightning.tasks import Batch, Task
from kd_lightning.tasks.base import in_a_row
from kd_lightning.teachers import TeacherSource

_ENTROPY_SAMPLES = 2000
_BATCHES_BESIDE = 8


class Evaluation(NamedTuple):
    """What came of a model on one split.

    Attributes:
        answers: (N, ...), by unit.
        scores: (M, ...), of the M units with a label.
        target: Of all units; None where none has a label.
    """

    answers: Tensor
    scores: Tensor
    target: Tensor | None

    def value(self, task: Task) -> float:
        """Return the task's headline."""
        return task.headline.value(as_array(self.scores))

    def digest(self) -> str:
        """Hash the targets, or else the number of units: models that differ in it had other units."""
        content = f"{len(self.answers)}".encode() if self.target is None else as_array(self.target).tobytes()
        return hashlib.sha256(content).hexdigest()


@torch.inference_mode()
def evaluate(
    task: Task,
    model: Callable[[Batch], Outputs],
    loader: Any,
    teacher: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Ask the task what a model's outputs are worth.

    Args:
        task: Says what a good answer is.
        model: A network, or the file that serves it.
        loader: Of the split.
        teacher: The teacher's answers, for a task whose units have no labels; None for the teacher, which agrees with
            itself.
        device: Of the model.
    """
    answers, scores, known = list[Tensor](), list[Tensor](), list[Tensor]()
    for batch in _batches(task, loader, device):
        outputs = task.arranged(model(batch))
        answers.append(task.without_padding(task.answers(outputs), batch.target).cpu())
        if task.labelled:
            assert batch.target is not None
            scores.append(task.scores(outputs, batch.target).cpu())
            known.append(batch.target.cpu())
    every = task.joined(answers)
    if not task.labelled:
        return Evaluation(every, task.agreement(every, every if teacher is None else teacher), None)
    return Evaluation(every, torch.cat(scores), in_a_row(known))


@torch.inference_mode()
def beside_teacher(
    task: Task,
    student: Callable[[Batch], Outputs],
    teacher: Callable[[Batch], AnyOutputs],
    loader: Any,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Return what the task says of two models' outputs beside each other, over some eight batches of a split.

    They lie evenly over the split, as neighbours are often of one text.
    """
    length = len(loader) if hasattr(loader, "__len__") else 1
    every = max(1, length // _BATCHES_BESIDE)
    found: dict[str, list[Tensor]] = {}
    for number, batch in enumerate(_batches(task, loader, device)):
        if number % every or batch.target is None:
            continue
        outputs = task.beside(task.arranged(student(batch)), task.arranged(teacher(batch)), batch.target)
        for key, values in outputs.items():
            found.setdefault(key, []).append(values.double().cpu())
    return {key: float(torch.cat(values).mean()) for key, values in found.items()}


@torch.no_grad()
def teacher_entropy(
    task: Task, teacher: TeacherSource, loader: Any, temperature: float, device: torch.device | str = "cpu"
) -> float | None:
    """Return the entropy of a teacher's soft targets on some 2,000 samples, as a share of the largest possible.

    None where there are none: of a task without classes, and of a teacher of which only the best classes are known.
    """
    teacher.to(torch.device(device))
    entropies, count = list[Tensor](), 0
    for batch in _batches(task, loader, device):
        if not teacher.can_teach(batch):
            continue
        outputs = task.arranged(teacher(batch)).softened(temperature)
        entropy = None if isinstance(outputs, TopK) else task.entropy(outputs.logits, temperature)
        if entropy is None:
            return None
        entropies.append(entropy * len(outputs.logits))
        count += len(outputs.logits)
        if count >= _ENTROPY_SAMPLES:
            break
    return float(torch.stack(entropies).sum()) / count if count else None


def as_array(x: Tensor) -> NDArray[Any]:
    """Return a tensor on the CPU for NumPy, which has no bfloat16."""
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def _batches(task: Task, loader: Any, device: torch.device | str) -> Iterator[Batch]:
    for batch in loader:
        yield task.read(move_data_to_device(batch, torch.device(device)))
