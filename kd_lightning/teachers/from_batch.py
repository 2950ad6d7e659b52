"""A teacher whose outputs come with the batches."""

from collections.abc import Iterable

from kd_lightning.outputs import AnyOutputs
from kd_lightning.tasks.batch import Batch
from kd_lightning.teachers.base import BatchSource


class FromBatch(BatchSource):
    """Only the teacher's outputs can be reached: an API has given them, or another program has written them down.

    A training batch is one of:

    - ``(input, target, logits)``, or ``(input, target, outputs)`` with a mapping of outputs;
    - a mapping with ``teacher_logits``, or with ``teacher_indices`` and ``teacher_log_probs``, beside what the networks
      are called with, which does not get these;
    - ``Taught(batch, outputs)``, for any other batch.

    Outputs are ``logits``, or ``indices`` and ``log_probs`` of the k best classes
    (:class:`~kd_lightning.outputs.TopK`); and ``features.<layer>`` for losses that read layers. They have to be those
    of the very view of the sample that the student gets. The ``training_step`` of a module under
    :class:`~kd_lightning.Distillation` sees the batch without them. Batches that bring none, as in validation, are not
    compared with a teacher.

    Example:
        >>> import torch
        >>> from kd_lightning.tasks import Classification
        >>> batch = Classification().read((torch.zeros(2, 4), torch.tensor([0, 1]), torch.randn(2, 3)))
        >>> FromBatch()(batch).logits.shape
        torch.Size([2, 3])
    """

    in_batch = True

    def __call__(self, batch: Batch, layers: Iterable[str] = ()) -> AnyOutputs:
        outputs = batch.teacher
        if outputs is None:
            raise ValueError(
                "FromBatch: the batch brings no outputs of a teacher, expected (input, target, logits), a mapping with "
                "'teacher_logits' or 'teacher_indices' and 'teacher_log_probs', or Taught(batch, outputs): add them in "
                "the data set, or pass a teacher that runs"
            )
        missing = [name for name in layers if name not in outputs.features]
        if missing:
            raise ValueError(
                f"the batch does not bring the teacher's layers {missing}, expected 'features.{missing[0]}' among its "
                f"outputs, got {[f'features.{name}' for name in outputs.features] or 'no features'}: add them, or take "
                "losses that read no layer of the teacher"
            )
        return outputs
