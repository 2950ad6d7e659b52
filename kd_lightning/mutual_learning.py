"""Deep Mutual Learning (Zhang et al., CVPR 2018), https://arxiv.org/abs/1706.00384."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kd_lightning.divergence import Divergence, Part, parts_of
from kd_lightning.dry_forward import dry_forward
from kd_lightning.first_batches import training_batches
from kd_lightning.losses.base import DistillationLoss
from kd_lightning.module import configured
from kd_lightning.objective import DistillationObjective
from kd_lightning.outputs import Outputs, run
from kd_lightning.preflight import check_factories, dry_run
from kd_lightning.resume import Resumption, begin_with_next_epoch, rng_states
from kd_lightning.tasks import Batch, HeadlineMetric, Task, or_classification
from kd_lightning.teachers import TeacherSource
from kd_lightning.tracking.metrics import logs_this_step


class MutualLearning(LightningModule):
    """Two or more students that learn from the labels and from each other's predictions, without a teacher.

    The loss of student k is the mean over its peers l of the losses with l's detached predictions in the teacher's
    place. With ``{"hard_label": HardLabel(), "kd": KD(temperature=1.0)}`` it is that of the paper:
    L_k = CE(y, p_k) + 1/(K − 1)·Σ_{l≠k} KL(p_l ‖ p_k). All students take their step at once, on predictions from before
    it; the paper's algorithm lets them take turns, with new predictions after each, at twice the forward passes.

    ``train/loss/<student>``, each of its terms, ``val/acc/<student>`` and ``val/agreement``, the share on which all
    students agree, are logged. A checkpoint's ``state_dict`` has a student's weights under ``students.<name>.``;
    :func:`~kd_lightning.load_student` takes the name.

    Args:
        students: By name; of any architectures with the same classes.
        losses: By name; each student gets a copy of its own, ``objectives.<student>.losses.<name>`` as the path of a
            :class:`~kd_lightning.callbacks.HyperparameterSchedule`.
        optimizer: Called with the parameters of all students and losses. As peers' predictions are detached, each
            student's step is that of an optimizer of its own; only clipping by the norm goes over all.
        scheduler: See :class:`~kd_lightning.DistillationModule`.
        task: Reads and scores batches; classification unless given.

    Raises:
        ValueError: For fewer than two students, the same network twice, losses that read layers or look into a network,
            or none that compares; at the start of ``fit``, for whatever :mod:`kd_lightning.preflight` finds.

    Example:
        >>> from kd_lightning.losses import KD, HardLabel
        >>> module = MutualLearning(
        ...     students={"wide": nn.Linear(4, 3), "deep": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))},
        ...     losses={"hard_label": HardLabel(), "kd": KD(temperature=1.0)},
        ...     optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        ... )
    """

    def __init__(
        self,
        students: Mapping[str, nn.Module],
        losses: Mapping[str, DistillationLoss],
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        task: Task | None = None,
    ) -> None:
        super().__init__()
        objective = DistillationObjective(losses)
        _check(students, objective)
        check_factories(optimizer, scheduler)
        self.students = nn.ModuleDict(students)
        self.objectives = nn.ModuleDict({name: copy.deepcopy(objective) for name in students})
        self.task = or_classification(task)
        self._optimizer, self._scheduler = optimizer, scheduler
        self._resumption = Resumption()
        self._built = False
        self._divergence = Divergence()
        self._scores: dict[str, HeadlineMetric] = {}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: student(*args, **kwargs) for name, student in self.students.items()}

    def setup(self, stage: str) -> None:
        if stage == "fit" and not self._built:
            for name, student in self.students.items():
                for peer, network in self.students.items():
                    if peer != name:
                        objective = self._objective(name)
                        dry_run(training_batches(self), student, _Peer(peer, network), objective, self.task)
            self._built = True

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configured(dict(self.named_parameters()), self._optimizer, self._scheduler, self.trainer)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        read = self.task.read(batch)
        outputs = self._outputs(read)
        detached = {name: Outputs(of.logits.detach()) for name, of in outputs.items()}
        losses, values = [], {}
        for name, own in outputs.items():
            peers = [of for peer, of in detached.items() if peer != name]
            student = own._replace(samples=read.samples)
            results = [self._objective(name)(student, peer, read.target) for peer in peers]
            losses.append(sum(total for total, _ in results) / len(peers))
            values[f"train/loss/{name}"] = losses[-1].detach()
            for term in results[0][1]:
                raw = [terms[term].raw.detach() for _, terms in results]
                values[f"train/loss/{name}/{term}"] = sum(raw) / len(peers)
        total: Tensor = sum(losses)
        self._divergence.watch(self.trainer, total, lambda: self._parts(read, outputs))
        if logs_this_step(self.trainer):
            size = len(next(iter(detached.values())).logits)
            self.log("train/loss", total.detach(), prog_bar=True, batch_size=size)
            self.log_dict(values, batch_size=size)
        return total

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._score(self.task.read(batch), "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._score(self.task.read(batch), "test")

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return each student's logits."""
        return {name: of.logits for name, of in self._outputs(self.task.read(batch)).items()}

    def on_fit_start(self) -> None:
        self._divergence = Divergence()
        self._scores = {}  # after trainer.validate they hold inference tensors, which cannot be updated in a fit

    def on_train_start(self) -> None:
        self._resumption.on_train_start(self.trainer)

    def on_train_epoch_start(self) -> None:
        self._resumption.on_train_epoch_start(self.trainer)

    def on_train_end(self) -> None:
        self._divergence.check_weights(self.students)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._divergence.check_weights(self.students)
        checkpoint["rng_states"] = rng_states()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None:
            begin_with_next_epoch(self.trainer, checkpoint)
        self._resumption.states = checkpoint.get("rng_states")

    def _outputs(self, batch: Batch) -> dict[str, Outputs]:
        students = self.students.items()
        return {name: self.task.arranged(run(student, batch.args, batch.kwargs)) for name, student in students}

    def _parts(self, batch: Batch, outputs: Mapping[str, Outputs]) -> Iterator[Part]:
        for name, of in outputs.items():
            yield from parts_of(batch, self.students[name], of, None, {}, f"student {name!r}")

    def _objective(self, name: str) -> DistillationObjective:
        objective = self.objectives[name]
        assert isinstance(objective, DistillationObjective)
        return objective

    def _score(self, batch: Batch, prefix: str) -> None:
        outputs = self._outputs(batch)
        if batch.target is not None:
            for name, of in outputs.items():
                metric = self._scores.setdefault(f"{prefix}/{self.task.headline.key}/{name}", HeadlineMetric(self.task))
                metric.to(self.device).update(of, batch.target)
        for key, metric in self._scores.items():
            if key.startswith(prefix) and metric.count:
                self.log(key, metric, on_step=False, on_epoch=True, metric_attribute=key)
        first, *others = (self.task.without_padding(self.task.answers(of), batch.target) for of in outputs.values())
        self._log_mean(f"{prefix}/agreement", torch.stack([self.task.agreement(first, o) for o in others]).amin(0))

    def _log_mean(self, name: str, hits: Tensor) -> None:
        if hits.numel():
            self.log(name, hits.float().mean(), on_step=False, on_epoch=True, sync_dist=True, batch_size=hits.numel())


class _Peer(TeacherSource):
    """Another student, before training."""

    def __init__(self, name: str, student: nn.Module) -> None:
        self.name, self.student = name, student

    def dry(self, batch: Batch, layers: Iterable[str] = ()) -> Outputs:
        return dry_forward(f"student {self.name!r}", self.student, batch.args, batch.kwargs, layers)


def _check(students: Mapping[str, nn.Module], objective: DistillationObjective) -> None:
    if len(students) < 2 or len({id(student) for student in students.values()}) < len(students):
        raise ValueError(
            f"expected two or more students, each a network of its own, got {list(students)}: pass for instance "
            "students={'a': network, 'b': other}"
        )
    losses = objective.named_losses()
    looking = [
        name
        for name, loss in losses.items()
        if loss.student_layers or loss.teacher_layers or loss.needs_teacher_network or name in objective.changing_losses
    ]
    if looking:
        raise ValueError(
            f"losses {looking} read layers or look into a network, expected losses on logits: students learn from each "
            "other's predictions; leave them out"
        )
    if not objective.needs_teacher:
        raise ValueError(
            f"losses {list(losses)} compare nothing with a peer, expected one that does, such as 'kd': KD()"
        )
