"""How far a training is, as schedules, teachers and quantisation-aware training go by it."""

import math

from lightning.pytorch import Trainer


def progress(trainer: Trainer, steps: int | None = None) -> float:
    """Return the share of the optimizer steps taken, in [0, 1]; or that of a number of steps."""
    taken = trainer.global_step if steps is None else steps
    return min(taken / max(trainer.estimated_stepping_batches, 1), 1.0)


def check_length_is_known(trainer: Trainer) -> None:
    """Raise ValueError when there is no progress to speak of."""
    length = trainer.estimated_stepping_batches
    if not math.isfinite(length) or length < 1:
        got = "an unknown one" if length < 0 or not math.isfinite(length) else length
        raise ValueError(
            f"a schedule needs the number of optimizer steps, got {got}: pass the Trainer max_steps, or max_epochs "
            "with a loader that has a length"
        )
