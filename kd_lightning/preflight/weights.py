"""Whether the weights in a file are a finished network's."""

from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from kd_lightning.checkpoint import load_weights
from kd_lightning.outputs import Outputs, run
from kd_lightning.preflight.outputs import classes_of
from kd_lightning.tasks import Batch, Task

_TOO_FEW_TO_JUDGE = 50
_REMEDY = "teacher.check=false trains on it all the same"


@torch.no_grad()
def check_weights(network: nn.Module, file: Path | None, batch: Batch, task: Task, check_score: bool = True) -> None:
    """Refuse weights that are not finite, a network that knows nothing, and one with its classes in another order.

    Args:
        network: Gets the weights.
        file: A checkpoint of them; None for a network that has them.
        batch: Of validation samples, on the CPU.
        task: Says what a good answer is.
        check_score: Whether to look at more than finite weights.

    Raises:
        ValueError: With what was expected, what came and what to do.
    """
    if file is not None:
        load_weights(network, file)
    held_by = file or type(network).__name__
    state = network.state_dict().items()
    broken = [name for name, x in state if x.is_floating_point() and not bool(x.isfinite().all())]
    if broken:
        raise ValueError(f"{held_by} holds NaN or infinite weights in {', '.join(broken[:3])}, expected finite ones")
    if not check_score or batch.target is None or not task.labelled:
        return
    outputs = task.arranged(run(network.eval(), batch.args, batch.kwargs))
    scores, headline = task.scores(outputs, batch.target), task.headline
    if len(scores) < _TOO_FEW_TO_JUDGE:
        return
    value = headline.value(scores.double().numpy())
    said = f"{headline.name} {headline.write(value)} on {len(scores)} validation {headline.units}"
    renamed = _with_classes_renamed(task, outputs, batch)
    if renamed is not None and renamed > max(value + 0.2, 0.5):
        raise ValueError(
            f"{held_by} has {said}, and would have {headline.write(renamed)} with its classes in another order, "
            f"expected the data set's: sort the classes as in its training. {_REMEDY}"
        )
    nothing = task.knows_nothing(batch.target, classes_of(outputs))
    if nothing is not None and task.is_no_better(scores, nothing):
        raise ValueError(
            f"{held_by} is at chance: {said}, expected well {'above' if headline.higher_is_better else 'below'} "
            f"{headline.write(nothing)}: is it trained, on inputs normalised as these are? {_REMEDY}"
        )


def _with_classes_renamed(task: Task, outputs: Outputs, batch: Batch) -> float | None:
    """Return the accuracy with the best order of the classes; None where samples have not one class each."""
    target, classes = batch.target, classes_of(outputs)
    if not task.over_classes or target is None or target.ndim != 1 or target.is_floating_point():
        return None
    labelled = task.has_label(target)
    labels, answers = target[labelled], task.answers(outputs)[labelled]
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (answers.numpy(), labels.numpy()), 1)
    rows, columns = linear_sum_assignment(-confusion)
    return float(confusion[rows, columns].sum() / len(labels))
