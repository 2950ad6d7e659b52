"""Where a teacher's outputs come from."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from kd_lightning.outputs import Outputs
from kd_lightning.tasks.batch import Batch


class TeacherSource:
    """Gives a teacher's outputs for a batch; :class:`Teacher` runs a network for them, others read them from somewhere.

    It is no ``nn.Module`` on purpose: so it is in no checkpoint, optimizer, DDP wrap or moving average of the module
    that holds it.

    Attributes:
        network: For losses that look into the teacher; None where only its outputs can be reached.
        in_batch: Whether its outputs are parts of bare batches, to be taken out before anybody's ``training_step`` sees
            them; see :func:`~kd_lightning.tasks.batch.taught`.
    """

    network: nn.Module | None = None
    in_batch = False

    def __call__(self, batch: Batch, layers: Iterable[str] = ()) -> Outputs:
        """Return logits and the named layers' features, without a graph, for the very inputs that the student gets."""
        raise NotImplementedError

    def dry(self, batch: Batch, layers: Iterable[str] = ()) -> Outputs:
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

    def __deepcopy__(self, memo: dict[int, Any]) -> "TeacherSource":
        return self  # a moving average copies its module; the teacher is shared
