"""Any divergence of two language models from their last hidden states, as a loss."""

import functools
from collections.abc import Callable, Mapping
from inspect import signature

from torch import Tensor

from kd_lightning.losses.base import check_temperature, padding
from kd_lightning.losses.fused_linear_divergence import fused_linear_divergence
from kd_lightning.losses.fused_loss import FusedLoss
from kd_lightning.losses.jensen_shannon import jensen_shannon
from kd_lightning.losses.sequence_kl import forward_kl, reverse_kl, symmetric_kl
from kd_lightning.losses.skewed_kl import skewed_forward_kl, skewed_reverse_kl
from kd_lightning.losses.total_variation import total_variation
from kd_lightning.outputs import Outputs

_BY_NAME: Mapping[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        forward_kl,
        jensen_shannon,
        reverse_kl,
        skewed_forward_kl,
        skewed_reverse_kl,
        symmetric_kl,
        total_variation,
    )
}


class FusedDivergence(FusedLoss):
    """A divergence without logits of all tokens; see :func:`~kd_lightning.losses.fused_linear_divergence`.

    For the forward KL, :class:`~kd_lightning.losses.FusedKL` takes two thirds of the time.

    Args:
        divergence: Name of a function of this package: ``reverse_kl``, ``symmetric_kl``, ``skewed_forward_kl``,
            ``skewed_reverse_kl``, ``jensen_shannon``, ``total_variation``; or a function of student and teacher logits
            (n, V) and ``temperature``, such as ``functools.partial(jensen_shannon, beta=0.3)``.
        student_layer: Name of the layer whose output the student's head takes, see
            :class:`~kd_lightning.losses.fused_loss.FusedLoss`.
        student_head: Name of the student's head.
        teacher_layer: Name of the layer whose output the teacher's head takes.
        teacher_head: Name of the teacher's head.
        temperature: T > 0, passed on to the divergence.
        weight: Factor of the term.
        memory: MB for the logits of both sides that are held at a time; 64 on a CPU, 512 elsewhere unless given.

    Raises:
        ValueError: For an unknown name, a function without ``temperature`` or with a bound one, and numbers out of
            their ranges.

    Example:
        >>> loss = FusedDivergence("reverse_kl", "norm", "head", "norm", "head")
    """

    def __init__(
        self,
        divergence: str | Callable[..., Tensor],
        student_layer: str,
        student_head: str,
        teacher_layer: str,
        teacher_head: str,
        temperature: float = 1.0,
        weight: float = 1.0,
        memory: float | None = None,
    ) -> None:
        super().__init__(student_layer, student_head, teacher_layer, teacher_head, weight, memory)
        check_temperature(temperature)
        if isinstance(divergence, str) and divergence not in _BY_NAME:
            raise ValueError(
                f"expected divergence to be one of {', '.join(_BY_NAME)}, got {divergence!r}: pass a function "
                "for others"
            )
        self.divergence = _BY_NAME[divergence] if isinstance(divergence, str) else divergence
        bound = isinstance(self.divergence, functools.partial) and "temperature" in self.divergence.keywords
        if bound or "temperature" not in signature(self.divergence).parameters:
            raise ValueError(
                "expected a divergence that takes temperature=, got one "
                f"{'that has it bound' if bound else 'without'}: pass temperature= to FusedDivergence, where it can be "
                "scheduled"
            )
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        hidden, head, bias = self.student_side(student)
        of_teacher, teacher_head, teacher_bias = self.teacher_side(teacher)
        return fused_linear_divergence(
            functools.partial(self.divergence, temperature=self.temperature),
            hidden,
            head,
            of_teacher,
            teacher_head,
            padding(hidden, target),
            memory=self.memory,
            student_bias=bias,
            teacher_bias=teacher_bias,
        )
