"""Whether the weights in a file are a teacher's."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from kd_lightning.checkpoint import load_weights
from kd_lightning.outputs import run
from kd_lightning.pipeline.recipe import Recipe
from kd_lightning.tasks import Classification

_SAMPLES, _TOO_FEW_TO_JUDGE = 256, 50


@torch.no_grad()
def check_checkpoint(recipe: Recipe, file: Path, batch: Any) -> None:
    """Refuse weights that are not finite, and a network that is at chance or has its classes in another order."""
    network = recipe.network()
    load_weights(network, file)
    state = network.state_dict().items()
    broken = [name for name, x in state if x.is_floating_point() and not bool(x.isfinite().all())]
    if broken:
        raise ValueError(f"{file} holds NaN or infinite weights in {', '.join(broken[:3])}, expected finite ones")
    if not recipe.check_teacher:
        return
    task = Classification()
    logits = run(network.eval(), (batch.args[0][:_SAMPLES],), {}).logits
    labels = task.labels(batch.target[:_SAMPLES])
    if logits.ndim != 2 or len(labels) < _TOO_FEW_TO_JUDGE:
        return
    classes, predicted = logits.shape[-1], logits.argmax(-1)
    right, chance = float((predicted == labels).float().mean()), 1 / classes
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (predicted.numpy(), labels.numpy()), 1)
    rows, columns = linear_sum_assignment(-confusion)
    renamed = confusion[rows, columns].sum() / len(labels)
    if renamed > max(right + 0.2, 0.5):
        raise ValueError(
            f"{file} has {right:.1%} of {len(labels)} validation images right, and would have {renamed:.1%} with its "
            "classes in another order, expected the data set's: sort the classes as in its training. "
            "teacher.check=false trains on it all the same"
        )
    if right <= chance + 3 * math.sqrt(chance * (1 - chance) / len(labels)):
        raise ValueError(
            f"{file} is at chance: {right:.1%} of {len(labels)} validation images of {classes} classes right, expected "
            f"well above {chance:.1%}: is it trained, on images normalised as these are? teacher.check=false trains on "
            "it all the same"
        )
