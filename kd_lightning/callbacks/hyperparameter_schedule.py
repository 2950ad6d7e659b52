"""Change a hyper-parameter while training goes on."""

from operator import attrgetter

from lightning.pytorch import LightningModule, Trainer

from kd_lightning.losses.base import DistillationLoss, is_finite_number
from kd_lightning.namespaces import Callback
from kd_lightning.objective import DistillationObjective, find_objective
from kd_lightning.progress import check_length_is_known, progress
from kd_lightning.schedules import Schedule
from kd_lightning.tracking.metrics import logs_this_step

_GRID = tuple(i / 1000 for i in range(1001))
"""Where a schedule is looked at before the training; each step's value is looked at again."""


class HyperparameterSchedule(Callback):
    """Set an attribute of the LightningModule from a schedule, before each training batch.

    Progress is the share of optimizer steps taken, so a schedule is the same under gradient accumulation and goes on
    where it was after a resume. The value is logged under its path, with slashes.

    Args:
        path: Dotted path from the LightningModule, such as ``"losses.dkd.weight"``. With the ``Distillation`` callback
            ``losses`` are that callback's.
        schedule: Progress in [0, 1] to a value; see ``kd_lightning.schedules``.

    Raises:
        ValueError: At the start of ``fit``, when the path does not lead to a number, the length of the training is
            not known, or the schedule leads to a value that is not finite, a negative weight, or a temperature ≤ 0.

    Example:
        >>> from kd_lightning.schedules import warmup
        >>> callback = HyperparameterSchedule("losses.hint.weight", warmup(100.0, duration=0.1))
    """

    def __init__(self, path: str, schedule: Schedule) -> None:
        super().__init__()
        _check_callable(schedule)
        if not isinstance(path, str):
            raise TypeError(f"expected path to be a word such as 'losses.kd.weight', got {path!r}: name what it sets")
        self.path = path
        self.schedule = schedule
        self._owner, _, self._name = path.rpartition(".")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_length_is_known(trainer)
        self.check(pl_module)

    def check(self, pl_module: LightningModule) -> None:
        """Raise ValueError when the path does not lead to a number, or the schedule to one that it cannot be."""
        try:
            owner = self._find_owner(pl_module)
            value = getattr(owner, self._name)
        except AttributeError as error:
            raise ValueError(f"schedule path {self.path!r}: {error}{_known(pl_module)}") from error
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"schedule path {self.path!r} leads to a {type(value).__name__}, expected a number")
        for share in _GRID:
            self._value(owner, share)

    def _value(self, owner: object, share: float) -> float:
        of_loss = isinstance(owner, DistillationLoss)
        positive, not_negative = of_loss and self._name == "temperature", of_loss and self._name == "weight"
        return value_at(share, self.path, self.schedule, positive=positive, not_negative=not_negative)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        share = progress(trainer)
        owner = self._find_owner(pl_module)
        value = self._value(owner, share)
        setattr(owner, self._name, value)
        if logs_this_step(trainer):
            pl_module.log(self.path.replace(".", "/"), value)

    def _find_owner(self, module: LightningModule) -> object:
        if not self._owner:
            return module
        root, _, rest = self._owner.partition(".")
        # The module's own attribute first; then the objective that the Distillation callback hung on it.
        start = module if hasattr(module, root) else find_objective(module)
        return attrgetter(f"{root}.{rest}" if rest else root)(start)


class TemperatureSchedule(Callback):
    """Set the temperature of the losses from a schedule, before each training batch.

    The loss softens student and teacher by it and carries its square, so all three move together. It is logged as
    ``kd/temperature``.

    Args:
        schedule: Progress in [0, 1] to a temperature > 0; see ``kd_lightning.schedules``.
        loss: Name of the loss; all that have a temperature unless given, but those that learn theirs.

    Raises:
        ValueError: At the start of ``fit``, when no such loss is there, when it learns its temperature
            (:class:`~kd_lightning.losses.CurriculumTemperature`), the length of the training is not known, or the
            schedule leads to a temperature that is not positive.

    Example:
        >>> from kd_lightning.schedules import linear
        >>> callback = TemperatureSchedule(linear(8.0, 1.0))
    """

    def __init__(self, schedule: Schedule, loss: str | None = None) -> None:
        super().__init__()
        _check_callable(schedule)
        self.schedule = schedule
        self.loss = loss

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_length_is_known(trainer)
        self.check(pl_module)

    def check(self, pl_module: LightningModule) -> None:
        """Raise ValueError when no such loss is there, or a temperature of the schedule is not positive."""
        for share in _GRID:
            value_at(share, "temperature", self.schedule, positive=True)
        objective = find_objective(pl_module)
        found = objective.temperatures() if objective is not None else {}
        numbers = _numbers(objective) if objective is not None else []
        if self.loss is not None and self.loss not in found:
            raise ValueError(f"no loss {self.loss!r} has a temperature to schedule; those that have one: {list(found)}")
        if not found:
            raise ValueError("no loss has a temperature to schedule, expected for instance losses={'kd': KD()}")
        if not numbers or self.loss not in (None, *numbers):
            learning = [self.loss] if self.loss is not None else list(found)
            raise ValueError(
                f"losses {learning} learn their temperature, expected one that is a number: leave TemperatureSchedule "
                "out; the strength of CurriculumTemperature is what HyperparameterSchedule can schedule"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        share = progress(trainer)
        value = value_at(share, "temperature", self.schedule, positive=True)
        objective = find_objective(pl_module)
        assert objective is not None
        for name in _numbers(objective):
            if self.loss in (None, name):
                setattr(objective.losses[name], "temperature", value)  # noqa: B010


def _check_callable(schedule: object) -> None:
    if not callable(schedule):
        raise TypeError(f"expected schedule to be a function of progress, got {type(schedule).__name__}")


def value_at(
    share: float, name: str, schedule: Schedule, *, positive: bool = False, not_negative: bool = False
) -> float:
    """Return the value of a schedule, which has to be a finite number; and above 0, or not below, where that is asked.

    Raises:
        ValueError: With the name of what is scheduled.
    """
    try:
        value = schedule(share)
    except TypeError as error:
        raise ValueError(
            f"the schedule of {name!r} cannot be computed ({error}), expected numbers as its arguments"
        ) from error
    if is_finite_number(value) and not (positive and value <= 0) and not (not_negative and value < 0):
        return value
    expected = "above 0" if positive else "of 0 or more" if not_negative else "that are finite numbers"
    raise ValueError(
        f"the schedule of {name!r} gives {value!r} after {share:.1%} of the training, expected values {expected} "
        "throughout: change its start, end or values"
    )


def _numbers(objective: DistillationObjective) -> list[str]:
    """Return the names of the losses whose temperature is a plain number: a tensor is learnt."""
    losses = objective.named_losses().items()
    return [name for name, loss in losses if isinstance(getattr(loss, "temperature", None), int | float)]


def _known(module: LightningModule) -> str:
    objective = find_objective(module)
    return f"; losses here: {list(objective.named_losses())}" if objective is not None else ""
