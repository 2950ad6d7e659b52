"""How long a Trainer trains, and the learning rates on the way."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer


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


def steps_of(trainer: Trainer, loader: Any) -> float:
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


def learning_rates(optimizer: Optimizer) -> list[float]:
    """Return the learning rate of each group of parameters."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def check_learning_rates(rates: Sequence[Sequence[float]], why: str = "") -> None:
    """Raise ValueError unless all are 0 or more, and one is above.

    Args:
        rates: By step and group of parameters.
        why: What may have led to it, for the error.
    """
    every = [rate for of_groups in rates for rate in of_groups]
    if not all(map(math.isfinite, every)) or min(every) < 0:
        got = next((rate for rate in every if not math.isfinite(rate)), min(every))
        raise ValueError(f"expected a learning rate of 0 or more, finite, got {got:g} in some step{why}")
    if not max(every) > 0:
        raise ValueError("expected lr above 0, got 0 in every step: nothing would be trained")
