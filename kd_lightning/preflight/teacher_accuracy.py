"""Whether the teacher is any good on the training loader."""

import math

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.first_batches import SCAN, training_batches
from kd_lightning.outputs import class_dim
from kd_lightning.preflight.labels import check_labels
from kd_lightning.tasks import Classification
from kd_lightning.teachers import TeacherSource

_SAMPLES = 256
_TOO_FEW_TO_JUDGE = 100


@torch.no_grad()
def check_teacher_accuracy(module: LightningModule, teacher: TeacherSource, task: Classification) -> None:
    """Print the teacher's accuracy on some training samples; refuse a teacher at chance.

    Raises:
        ValueError: For an accuracy not above chance (1/C plus three standard errors), outputs that all lie in [0, 1]
            as a sigmoid's do, or labels out of range.
    """
    if teacher.learns:
        return
    precision = module.trainer.precision_plugin
    correct = count = classes = 0
    within_one = True
    for raw in training_batches(module, SCAN):
        batch = task.read(precision.convert_input(move_data_to_device(raw, module.device)))
        if batch.target is None:
            return
        if not teacher.can_teach(batch):
            continue
        with precision.forward_context():
            outputs = teacher(batch)
        if outputs.top_k is None:
            classes = outputs.logits.shape[class_dim(outputs.logits)]
            check_labels(batch.target, outputs.logits, task)
            within_one = within_one and bool(((outputs.logits >= 0) & (outputs.logits <= 1)).all())
        else:
            classes, within_one = max(classes, int(outputs.top_k.indices.max()) + 1), False
        hits = task.correct_outputs(outputs, batch.target)
        correct, count = correct + int(hits.sum()), count + hits.numel()
        if count >= _SAMPLES:
            break
    if count == 0:
        return
    accuracy, chance = correct / count, 1 / classes
    rank_zero_info(f"teacher: {accuracy:.1%} on {count} training samples (chance is {chance:.1%})")
    if count < _TOO_FEW_TO_JUDGE:
        return
    if accuracy <= chance + 3 * math.sqrt(chance * (1 - chance) / count):
        raise ValueError(
            f"the teacher is at chance on this loader: {accuracy:.1%} on {count} samples of {classes} classes, "
            f"expected well above {chance:.1%}: is the normalisation another than in its training, is the order of the "
            "classes, or were its weights never loaded? check_teacher=False (teacher.check=false on the command "
            "line) trains on it all the same"
        )
    if within_one:
        raise ValueError(
            f"expected logits from the teacher, got values between 0 and 1 for all classes of {count} samples: does it "
            "end in a sigmoid? leave that out of its forward"
        )
