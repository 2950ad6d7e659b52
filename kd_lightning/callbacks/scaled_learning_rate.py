"""Multiply learning rates without a scheduler's knowledge."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer


@contextmanager
def scaled_learning_rate(optimizer: Optimizer, factor: Callable[[], float]) -> Iterator[None]:
    """Multiply the learning rates while the optimizer steps, and no longer.

    What schedulers and checkpoints see is without the factor: any scheduler goes on as it is, and after a resume the
    factor is not applied a second time.

    Args:
        optimizer: Of any kind.
        factor: Asked before each step.
    """
    kept: list[Any] = []

    def before(*_: Any) -> None:
        kept[:] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor()

    def after(*_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, kept, strict=False):
            group["lr"] = rate
        kept.clear()

    hooks = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)
    try:
        yield
    finally:
        after()  # a step may have broken off
        for hook in hooks:
            hook.remove()
