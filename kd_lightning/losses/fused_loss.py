"""What the losses have in common that compute the logits themselves, from hidden states and a head."""

from typing import Any

from torch import Tensor, nn

from kd_lightning.losses.base import DistillationLoss
from kd_lightning.outputs import Outputs, find_layer


class FusedLoss(DistillationLoss):
    """A loss of logits that at no time exist for all tokens; see :mod:`kd_lightning.losses.fused_linear`.

    The logits are the head's weight (and bias) times the layer's output, with nothing between the two and nothing
    after them; before training, that is compared with what the network gives. ``DistillationModule`` then leaves the
    heads out of each training step in which no other loss reads logits; validation and test run them. The weights stay
    the networks' own: the student's get their gradients, where they are tied to the embedding too. A strategy that
    splits weights (FSDP, DeepSpeed's stage 3) has no whole head to read: DDP does.

    Args:
        student_layer: Name of the layer whose output (B, S, D), or (B, D), the student's head takes.
        student_head: Name of the student's head, a linear layer.
        teacher_layer: Likewise; None for a loss that reads no layer of the teacher.
        teacher_head: Likewise, of the same vocabulary.
        weight: Factor of the term.
        memory: MB for the logits that are held at a time; 64 on a CPU, 512 elsewhere unless given.

    Raises:
        ValueError: For a memory ≤ 0, and for a teacher's layer without its head; in :meth:`attach`, for a head that is
            no linear layer.
    """

    reads_logits = False
    products_in_autocast = True

    def __init__(
        self,
        student_layer: str,
        student_head: str,
        teacher_layer: str | None = None,
        teacher_head: str | None = None,
        weight: float = 1.0,
        memory: float | None = None,
    ) -> None:
        super().__init__(weight, [student_layer], [] if teacher_layer is None else [teacher_layer])
        if (teacher_layer is None) != (teacher_head is None):
            raise ValueError(
                f"expected teacher_layer and teacher_head, got {teacher_layer!r} and {teacher_head!r}: name both"
            )
        if memory is not None and not memory > 0:
            raise ValueError(f"expected memory > 0, got {memory}: the megabytes for the logits held at a time")
        self.student_head: str = student_head
        self.teacher_head, self.memory = teacher_head, memory
        self._networks = _Networks()

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        head_of("student", student, self.student_head)
        if self.teacher_head is not None:
            if teacher is None:
                raise ValueError(
                    f"expected a teacher whose network is there, for its head {self.teacher_head!r}, got outputs "
                    "alone: pass Teacher(network), or take a loss on logits"
                )
            head_of("teacher", teacher, self.teacher_head)
        self._networks = _Networks(student, teacher)

    def student_side(self, student: Outputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the student's hidden states, (B, S, D) or (B, D), and its head's weight (V, D) and bias (V,)."""
        network = self._networks.student
        assert network is not None
        return student.features[self.student_layers[0]], *head_of("student", network, self.student_head)

    def teacher_side(self, teacher: Outputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the same of the teacher."""
        network = self._networks.teacher
        if self.teacher_head is None:
            raise ValueError(
                "the teacher gives more than its best classes, expected the layer and the head that its logits come "
                "from: pass teacher_layer= and teacher_head="
            )
        assert network is not None
        return teacher.features[self.teacher_layers[0]], *head_of("teacher", network, self.teacher_head)


def head_of(role: str, network: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Return the weight (V, D) and the bias (V,) of a network's head, as they are now.

    Raises:
        ValueError: For an unknown layer, and for one that is no plain linear layer.
    """
    head = find_layer(network, name)
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    inside = [child for child, _ in head.named_children() if child != "parametrizations"]
    if inside or not isinstance(weight, Tensor) or weight.ndim != 2:
        got = f"one with {', '.join(inside)} inside" if inside else "one without a weight (V, D)"
        raise ValueError(
            f"the {role}'s head {name!r} is a {type(head).__name__}, {got}, expected a plain linear layer, whose "
            "weight is all that it does: leave adapters and fake quantisation out of it, or take losses on logits"
        )
    return weight, bias


class _Networks:
    """Networks that a loss looks into, and does not own: in none of its parameters and states."""

    def __init__(self, student: nn.Module | None = None, teacher: nn.Module | None = None) -> None:
        self.student, self.teacher = student, teacher

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Networks":
        return self  # a moving average copies its module; what it needs of the loss are numbers
