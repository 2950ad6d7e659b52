"""The headline as a metric that is logged."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torchmetrics import Metric

from kd_lightning.headline import Headline
from kd_lightning.outputs import AnyOutputs


class Scoring(Protocol):
    """What the metric asks a task."""

    headline: Headline

    def scores(self, outputs: AnyOutputs, target: Tensor) -> Tensor: ...


class HeadlineMetric(Metric):
    """The task's headline over all batches and processes, from the sum of the scores and their number.

    NaN where no unit had a label.
    """

    higher_is_better = None
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, task: Scoring) -> None:
        super().__init__()
        self._task = task
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, outputs: AnyOutputs, target: Tensor) -> None:
        scores = self._task.scores(outputs, target).detach()
        scores = scores.to(torch.float32 if scores.device.type == "mps" else torch.float64)
        self.total = self.total + scores.sum(0)  # takes the shape of one unit's scores
        self.count = self.count + len(scores)

    def written(self) -> str:
        """Say the figure with its name: ``accuracy 78.1 %``."""
        return f"{self._task.headline.name} {self._task.headline.write(float(self.compute()))}"

    def compute(self) -> Any:
        if not self.count:
            return torch.tensor(float("nan"), device=self.count.device)
        mean = (self.total / self.count).cpu().numpy()[None]
        return torch.tensor(self._task.headline.value(mean), dtype=torch.float32, device=self.count.device)
