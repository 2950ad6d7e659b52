"""How far a training is, as schedules, teachers and quantisation-aware training go by it."""

import math

from lightning.pytorch import Trainer


def progress(trainer: Trainer, steps: int | None = None) -> float:
    """Return the share of the training done, in [0, 1].

    That of the optimizer steps; of the epochs where their number is known, and the loader has no length.

    Args:
        trainer: Of the training.
        steps: Of a number of steps, in place of those taken.
    """
    length = trainer.estimated_stepping_batches
    if _is_unknown(length) and trainer.max_epochs:
        return min(max(trainer.current_epoch / trainer.max_epochs, 0.0), 1.0)
    taken = trainer.global_step if steps is None else steps
    return min(taken / max(length, 1), 1.0)


def check_length_is_known(trainer: Trainer) -> None:
    """Raise ValueError when there is no progress to speak of."""
    length = trainer.estimated_stepping_batches
    if _is_unknown(length):
        if (trainer.max_epochs or 0) > 1:
            return  # by epochs
    elif length >= 1:
        return
    got = "an unknown one" if _is_unknown(length) else length
    raise ValueError(
        f"a schedule needs the number of optimizer steps, got {got}: pass the Trainer max_steps, or max_epochs with a "
        "loader that has a length; without one, max_epochs of 2 or more, by which it then goes"
    )


def _is_unknown(length: float) -> bool:
    return length < 0 or not math.isfinite(length)
