"""Curriculum Temperature for Knowledge Distillation (Li et al., AAAI 2023), https://arxiv.org/abs/2211.16231."""

import torch
from torch import Tensor, nn

from kd_lightning.losses.base import DistillationLoss, check_not_negative
from kd_lightning.outputs import Outputs


class CurriculumTemperature(DistillationLoss):
    """Another loss at a temperature that is learnt against the student: T = T₀ + ΔT·σ(θ), one T for all samples.

    The student lowers the loss, θ raises it: the gradient that reaches θ is the true one times −``strength``. The
    authors raise the strength from 0 to 1 along a cosine in the first 10 of 240 epochs: schedule
    ``losses.<name>.strength``, as ``callbacks=[curriculum_temperature]`` does. Their code writes the factor as a λ that
    falls from 0 to −1; here a negative strength is refused, as it would train T with the student. Their variant with a
    temperature for each sample is not here.

    θ is a parameter like the student's: it takes its learning rate and, unless given a group of its own, its weight
    decay, which pulls T to T₀ + ΔT/2. Advice, not measured: no weight decay for θ.

    Args:
        loss: Has a ``temperature`` and computes with it as a tensor, as :class:`~kd_lightning.losses.KD` does.
        minimum: T₀ > 0.
        span: ΔT > 0; T stays between ``minimum`` and ``minimum + span``. As θ starts at 1, T starts at 15.62.
        strength: How strongly θ works against the student, ≥ 0; at 0 the loss leaves θ where it is.
        weight: Factor of the term.

    Raises:
        ValueError: For a loss without a temperature, one with a weight of its own, and numbers out of their ranges.
    """

    def __init__(
        self,
        loss: DistillationLoss,
        minimum: float = 1.0,
        span: float = 20.0,
        strength: float = 1.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight, loss.student_layers, loss.teacher_layers, loss.gather)
        if getattr(loss, "temperature", None) is None:
            raise ValueError(f"expected a loss with a temperature, got {type(loss).__name__}: wrap for instance KD()")
        if loss.weight != 1:
            raise ValueError(
                f"expected a loss of weight 1, got {loss.weight}: pass the weight to CurriculumTemperature"
            )
        if not (minimum > 0 and span > 0):
            raise ValueError(f"expected minimum > 0 and span > 0, got {minimum} and {span}: the authors take 1 and 20")
        check_not_negative(strength=strength)
        self.loss = loss
        self.minimum, self.span, self.strength = minimum, span, strength
        self.theta = nn.Parameter(torch.tensor(1.0))
        self.take_after(loss)

    @property
    def temperature(self) -> Tensor:
        """The present T, without a graph; it is logged, and cannot be set."""
        return self._learnt().detach()

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        self.loss.build(student, teacher)

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        self.loss.attach(student, teacher)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        check_not_negative(strength=self.strength)  # again, as it may be scheduled
        temperature = _scale_gradient(self._learnt(), -self.strength)
        self._pass_on(temperature)
        try:
            value: Tensor = self.loss(student, teacher, target)
        finally:
            self._pass_on(temperature.detach())  # a graph that outlives the step can be neither copied nor pickled
        # Theta gets a gradient also where nothing counts: DDP waits for one.
        return value + 0.0 * temperature

    def _learnt(self) -> Tensor:
        return self.minimum + self.span * torch.sigmoid(self.theta)

    def _pass_on(self, temperature: Tensor) -> None:
        setattr(self.loss, "temperature", temperature)  # noqa: B010


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x itself; its gradient is multiplied by the factor."""
    return x.detach() + factor * (x - x.detach())
