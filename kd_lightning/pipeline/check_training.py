"""Trainer, optimizer, scheduler and callbacks of a stage, before it is trained."""

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kd_lightning.callbacks import HyperparameterSchedule, QuantizationAwareTraining, TemperatureSchedule
from kd_lightning.configuration.arguments import errors_at
from kd_lightning.module import DistillationModule, configured
from kd_lightning.pipeline.recipe import Recipe


def check_limits(trainer: Trainer, arguments: Mapping[str, Any]) -> None:
    """Refuse what Lightning takes and nobody means.

    Args:
        trainer: As it was made.
        arguments: What it was made with.

    Raises:
        ValueError: For a training without a step or without an end, and for numbers out of range.
    """
    if trainer.max_steps == 0 or trainer.max_epochs == 0:
        name = "max_steps" if trainer.max_steps == 0 else "max_epochs"
        raise ValueError(f"expected {name} of 1 or more, got 0: nothing would be trained")
    if trainer.max_steps == -1 and arguments.get("max_epochs", -1) in (None, -1) and not arguments.get("max_time"):
        raise ValueError("expected max_steps of 1 or more, got -1: the training would not end; or give max_epochs")
    for name, least in (
        ("accumulate_grad_batches", 1),
        ("gradient_clip_val", 0),
        ("log_every_n_steps", 0),
        ("check_val_every_n_epoch", 1),
        ("num_sanity_val_steps", -1),
    ):
        value = arguments.get(name)
        if value is not None and not value >= least:
            raise ValueError(f"expected {name} of {least} or more, got {value}")


def check_optimizer(recipe: Recipe, module: DistillationModule, steps: float) -> None:
    """Make optimizer and scheduler, and step the scheduler to the end of the training."""
    parameters = {**dict(module.student.named_parameters()), **dict(module.objective.named_parameters())}
    with recipe.errors("optimizer"):
        optimizer: Any = configured(parameters, recipe.optimizer, None, SimpleNamespace())  # type: ignore[arg-type]
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected an optimizer, got {type(optimizer).__name__}")
        if recipe.scheduler is None:
            _check_rates([_rates(optimizer)])
    if recipe.scheduler is None:
        return
    with recipe.errors("scheduler"):
        length: Any = SimpleNamespace(estimated_stepping_batches=steps)
        made: Any = configured(parameters, recipe.optimizer, recipe.scheduler, length)
        optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
        if not hasattr(scheduler, "step"):
            raise TypeError(f"expected a scheduler, got {type(scheduler).__name__}")
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "ReduceLROnPlateau follows a metric, expected a scheduler that is stepped after each optimizer step, "
                "such as scheduler=cosine"
            )
        rates = [_rates(optimizer)]
        for _ in range(int(steps) if math.isfinite(steps) else 100):
            scheduler.step()
            rates.append(_rates(optimizer))
        negative = {name: x for name, x in (recipe.config.get("scheduler") or {}).items() if _is_negative(x)}
        _check_rates(rates, "".join(f", with {name}={x}" for name, x in negative.items()))


def _is_negative(value: object) -> bool:
    return isinstance(value, int | float) and value < 0


def _rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _check_rates(rates: list[list[float]], why: str = "") -> None:
    every = [rate for of_groups in rates for rate in of_groups]
    if not all(map(math.isfinite, every)) or min(every) < 0:
        got = next((rate for rate in every if not math.isfinite(rate)), min(every))
        raise ValueError(f"expected a learning rate of 0 or more, finite, got {got:g} in some step{why}")
    if not max(every) > 0:
        raise ValueError("expected lr above 0, got 0 in every step: nothing would be trained")


def length(trainer: Trainer, loader: Any) -> float:
    """Return the number of optimizer steps; infinite where a time ends the training, or nothing tells."""
    steps = float("inf") if trainer.max_steps == -1 else trainer.max_steps
    if trainer.max_epochs is None or trainer.max_epochs == -1:
        return steps
    try:
        batches = len(loader)
    except TypeError:  # an iterable data set has no length
        return steps
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return min(steps, trainer.max_epochs * max(1, math.ceil(batches / trainer.accumulate_grad_batches)))


def check_callbacks(
    recipe: Recipe, callbacks: Sequence[Callback], trainer: Trainer, module: DistillationModule
) -> None:
    """Let our own callbacks look at what they will change."""
    nodes, path = recipe.config.get("callbacks") or {}, recipe.paths.get("callbacks")
    names = list(nodes) if len(nodes) == len(callbacks) else [""] * len(callbacks)
    for name, callback in zip(names, callbacks, strict=True):
        with errors_at(*([f"{path}.{name}" if name else path] if path else []), arguments=nodes.get(name)):
            if not isinstance(callback, Callback):
                raise TypeError(f"expected a callback, got {type(callback).__name__}")
            if isinstance(callback, HyperparameterSchedule | TemperatureSchedule):
                callback.check(module)
            if isinstance(callback, QuantizationAwareTraining):
                callback.setup(trainer, module, "fit")
