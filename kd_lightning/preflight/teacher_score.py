"""Whether the teacher is any good on the training loader."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kd_lightning.first_batches import SCAN, training_batches
from kd_lightning.outputs import TopK, class_dim
from kd_lightning.tasks import Batch, HeadlineMetric, Task
from kd_lightning.teachers import TeacherSource

_SAMPLES = 256
_TOO_FEW_TO_JUDGE = 100


@torch.no_grad()
def check_teacher_score(
    module: LightningModule, teacher: TeacherSource, task: Task, read: Callable[[Any], Batch] | None = None
) -> None:
    """Print the teacher's headline on some training samples; refuse a teacher that knows nothing of them.

    Args:
        module: Whose training loader it is.
        teacher: That is to teach.
        task: Says what a good answer is.
        read: Reads a batch; the task unless given.

    Raises:
        ValueError: For a headline not better than that of a model that knows nothing (by three standard errors),
            outputs that all lie in [0, 1] as a sigmoid's do where logits are expected, or labels that do not fit.
    """
    if teacher.learns or not task.labelled:
        return
    precision = module.trainer.precision_plugin
    scores, targets, width = list[Tensor](), list[Tensor](), 0
    beside = {
        key: metric.to(module.device)
        for key, metric in task.metrics().items(keep_base=True)
        if isinstance(metric, HeadlineMetric) and key != task.headline.key
    }
    within_one = task.gives_logits
    for raw in training_batches(module, SCAN):
        batch = (read or task.read)(precision.convert_input(move_data_to_device(raw, module.device)))
        if batch.target is None:
            return
        if not teacher.can_teach(batch):
            continue
        with precision.forward_context():
            outputs = task.arranged(teacher(batch))
        if isinstance(outputs, TopK):
            width, within_one = max(width, int(outputs.indices.max()) + 1), False
        else:
            logits = outputs.logits
            width = logits.shape[class_dim(logits)]
            task.check(batch.target, logits)
            within_one = within_one and bool(((logits >= 0) & (logits <= 1)).all())
        scores.append(task.scores(outputs, batch.target))
        targets.append(batch.target)
        for metric in beside.values():
            metric.update(outputs, batch.target)
        if sum(map(len, scores)) >= _SAMPLES:
            break
    count = sum(map(len, scores))
    if count == 0:
        return
    found, headline = torch.cat(scores), task.headline
    value = headline.write(headline.value(found.cpu().numpy()))
    nothing = task.knows_nothing(torch.cat(targets), width)
    known = "" if nothing is None else f" (chance is {headline.write(nothing)})"
    also = "".join(f", {metric.written()}" for metric in beside.values())
    rank_zero_info(f"teacher: {headline.name} {value}{also} on {count} training {headline.units}{known}")
    if count < _TOO_FEW_TO_JUDGE:
        return
    if nothing is not None and task.is_no_better(found, nothing):
        sigmoid = ", or does it end in a sigmoid, as all outputs lie between 0 and 1" if within_one else ""
        raise ValueError(
            f"the teacher is at chance on this loader: {headline.name} {value} on {count} {headline.units}, "
            f"expected well {'above' if headline.higher_is_better else 'below'} {headline.write(nothing)}: is the "
            "normalisation another than in its training, is the order of the classes, or were its weights never "
            f"loaded{sigmoid}? check_teacher=False (teacher.check=false on the command line) trains on it all the same"
        )
    if within_one:
        raise ValueError(
            f"expected logits from the teacher, got values between 0 and 1 for all outputs of {count} "
            f"{headline.units}: does it end in a sigmoid? leave that out of its forward"
        )
