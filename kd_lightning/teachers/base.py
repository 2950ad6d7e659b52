"""Where a teacher's outputs come from."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.outputs import AnyOutputs
from kd_lightning.tasks.batch import Batch


class TeacherSource:
    """Gives a teacher's outputs for a batch; :class:`Teacher` runs a network for them, others read them from somewhere.

    It is no ``nn.Module`` on purpose: so it is in no checkpoint, optimizer, DDP wrap or moving average of the module
    that holds it.

    Attributes:
        network: For losses that look into the teacher; None where only its outputs can be reached.
        in_batch: Whether its outputs are parts of bare batches, to be taken out before anybody's ``training_step`` sees
            them; see :func:`~kd_lightning.tasks.batch.taught`.
        learns: Whether it changes with the student: nothing is wrong with it when it is at chance before training, and
            it is scored in each validation.
        copies_student: Whether :meth:`prepare` copies the student as it is then: what changes the student's layers
            later, and is not to reach the copy, calls it first.
        peers: Networks that are trained along with the student, by name. The losses hold them: they are in the
            optimizer and in the checkpoint, and follow the module.
        scheduled: Whether :meth:`after_step` goes by the progress, so that the length of the training has to be known.
    """

    network: nn.Module | None = None
    in_batch = False
    learns = False
    copies_student = False
    peers: Mapping[str, nn.Module] = {}
    scheduled = False

    def __call__(self, batch: Batch, layers: Iterable[str] = ()) -> AnyOutputs:
        """Return logits and the named layers' features, without a graph, for the very inputs that the student gets."""
        raise NotImplementedError

    def dry(self, batch: Batch, layers: Iterable[str] = ()) -> AnyOutputs:
        """Return the same for a few samples before the training, without leaving a trace.

        Raises:
            ValueError: For layers that this source cannot give.
        """
        raise NotImplementedError

    def can_teach(self, batch: Batch) -> bool:
        """Tell whether this source has outputs for a batch: those that come with training batches are in no other."""
        return True

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Move what there is to move; ``dtype`` concerns floating-point weights only."""

    # Of a training, in the order of the calls; nothing by default.

    def prepare(self, student: nn.Module) -> None:
        """Get to know the student ahead of :meth:`dry`: maybe a copy of it, maybe with weights that still change."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where a checkpoint was written; after :meth:`prepare` with the student itself."""

    def start(self, student: nn.Module) -> None:
        """Begin: the student has the weights with which training starts, or goes on."""

    def after_step(self, student: nn.Module, progress: float) -> None:
        """Follow an optimizer step; ``progress`` is the share of the steps that were taken before it."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed training needs, for the checkpoint."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "TeacherSource":
        return self  # a moving average copies its module; the teacher is shared


class BatchSource(TeacherSource):
    """Reads outputs that come with a batch: nothing runs, and batches without any are not compared with a teacher."""

    def dry(self, batch: Batch, layers: Iterable[str] = ()) -> AnyOutputs:
        return self(batch, layers)

    def can_teach(self, batch: Batch) -> bool:
        return batch.teacher is not None


def peers_of(teacher: object) -> Mapping[str, nn.Module]:
    """Return the networks that are trained along with the student; none with most teachers."""
    return teacher.peers if isinstance(teacher, TeacherSource) else {}
