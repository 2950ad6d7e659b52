"""Try ``training_step`` before training, without a trace in the module, and without its weights a second time."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kd_lightning.borrowed_weights import BorrowedWeights
from kd_lightning.dry_forward import uncompiled, unknown_layer
from kd_lightning.first_batches import untouched_rng
from kd_lightning.namespaces import of_both
from kd_lightning.student_calls import Seen, StudentCalls
from kd_lightning.tasks import Batch, unwrapped
from kd_lightning.tasks.batch import Unwrapped


class Rehearsal:
    """A copy of a module whose ``training_step`` runs on some batches, where nothing is logged.

    It has the module's own weights, whose bits stay as they are: a large student does not need its memory twice.

    Attributes:
        returned: What the last step returned; None where it broke off.

    ``setup`` and ``configure_model`` are called on the copy: the Trainer calls those of the module itself only after
    the callbacks' ``setup``.

    Raises:
        ValueError: For a module that cannot be copied.
    """

    def __init__(self, module: LightningModule, trainer: Trainer, calls: StudentCalls) -> None:
        self.trainer, self.calls = trainer, calls
        self._weights, self.returned = BorrowedWeights(), None
        shareable = (Dataset, DataLoader, *of_both(LightningDataModule))
        # No step changes a data set, and it may be as large as the memory.
        shared = [x for x in vars(module).values() if isinstance(x, shareable)]
        with untouched_rng():
            try:
                self.module = self._weights.copy(module, {id(x): x for x in shared})
            except Exception as error:
                raise ValueError(
                    f"{type(module).__name__} cannot be copied ({error}), expected to try its training_step on a copy "
                    "before training: keep what cannot be copied out of its attributes, or give that a __deepcopy__"
                ) from error
            self.module.trainer = trainer
            if getattr(self.module, "_compiler_ctx", None) is not None:
                # torch.compile(module) has put methods on the instance that go on working on the module itself.
                for name in ("forward", "training_step"):
                    vars(self.module).pop(name, None)
            for part in self.module.modules():
                if isinstance(part, of_both(LightningModule)):
                    vars(part)["log"] = _silent
            with uncompiled(), self._weights.kept_apart():
                self.module.setup("fit")
                self.module.configure_model()

    def move_along(self, module: LightningModule) -> None:
        """Have the weights of the module where that is now."""
        self._weights.renew(self.module, module)
        self.module.to(module.device)

    def run(self, batch: Any, layers: tuple[str, ...] = ()) -> Seen:
        """Return what was seen of the student in a step.

        A step that breaks off after the student has run has shown enough: it may want something that only a running
        training has, such as the optimizer for its learning rate.

        Raises:
            ValueError: For a step that breaks off before, or in which the student does not run exactly once; for an
                unknown layer, with the nearest ones.
        """
        known = dict(self.calls.student_of(self.module).named_modules())
        for name in layers:
            if name not in known:
                student = self.calls.student_of(self.module)
                raise unknown_layer("student", student, name, lambda: self.run(batch), "some")
        self.calls.logits.layer_in(self.calls.student_of(self.module))  # is refused by its own name, where it is none
        seen, self.returned = Seen(), None
        try:
            with (
                untouched_rng(),
                uncompiled(),
                self._weights.kept_apart(),
                torch.enable_grad(),
                self.trainer.precision_plugin.forward_context(),
                self.calls.watch(self.module, layers, once=True) as seen,
            ):
                self.returned = self._step(batch)
        except Exception as error:
            if seen.problem:
                raise ValueError(seen.problem) from error
            ran = (
                (seen.outputs or not self.calls.outputs)
                and (seen.inputs or not self.calls.inputs)
                and all(name in seen.features for name in layers)
            )
            # Of the features' checks, which come when the step has ended.
            if not ran or "layer '" in str(error):
                first_line = str(error).partition("\n")[0]
                raise ValueError(
                    f"training_step of {type(self.module).__name__}, tried on a copy before training, failed before "
                    f"the student's outputs were there: {type(error).__name__}: {first_line}; "
                    f"{_remedy(batch, self.calls.student_of(self.module))}"
                ) from error
        return seen

    def _step(self, batch: Any) -> Any:
        self.trainer.precision_plugin.convert_module(self.module)
        batch = unwrapped(batch).batch
        parameter = next(self.module.parameters(), None)
        if parameter is not None:
            batch = self.module.transfer_batch_to_device(batch, parameter.device, 0)
        batch = self.trainer.precision_plugin.convert_input(batch)
        step: Callable[..., object] = self.module.training_step
        # What the step says to a logger by itself is silenced, too.
        loggers, self.trainer.loggers = self.trainer.loggers, []
        try:
            return step(batch, 0) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else step(batch)
        finally:
            self.trainer.loggers = loggers


def _remedy(batch: Any, student: nn.Module) -> str:
    weight = next((p for p in student.parameters() if p.is_floating_point()), None)
    doubles: list[bool] = []
    apply_to_collection(batch, Tensor, lambda x: doubles.append(x.dtype == torch.float64))
    if any(doubles) and weight is not None and weight.dtype != torch.float64:
        return (
            "the batch is float64 and the student's weights are not, expected one precision: convert in the data set, "
            f'x.to({weight.dtype}), or pass the Trainer precision="64-true"'
        )
    return (
        "does the batch fit the step? If it is for want of what on_fit_start or on_train_start make, make that in "
        "__init__, setup or configure_model"
    )


def read_as_in_training(
    rehearsal: Rehearsal,
    target: Callable[[Any], Tensor | None],
    unwrap: Callable[[Any], Unwrapped] = unwrapped,
) -> Callable[[Any], Batch]:
    """Return what reads a batch as the student's arguments in ``training_step``, whatever is done to it there."""

    def read(batch: Any) -> Batch:
        batch, samples, teacher = unwrap(batch)
        args, kwargs = rehearsal.run(batch).inputs[0]
        return Batch(args, kwargs, target(batch), samples, teacher)

    return read


def few(batch: Any, count: int) -> Any:
    """Return the first samples of a batch that is a tensor, or a tuple, list or dict of tensors of one length.

    Any other is returned whole.
    """
    if isinstance(batch, Tensor):
        return batch[:count]
    if type(batch) not in (tuple, list, dict):
        return batch
    parts = batch.values() if isinstance(batch, dict) else batch
    if not all(isinstance(x, Tensor) and x.ndim for x in parts) or len({len(x) for x in parts}) != 1:
        return batch
    return (
        {k: x[:count] for k, x in batch.items()} if isinstance(batch, dict) else type(batch)(x[:count] for x in parts)
    )


def _silent(*args: Any, **kwargs: Any) -> None:
    pass
