"""Train on while a network is rounded to the values that fewer bits can hold."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_lightning.callbacks.scaled_learning_rate import scaled_learning_rate
from kd_lightning.losses.base import is_finite_number
from kd_lightning.namespaces import Callback
from kd_lightning.objective import DistillationObjective, find_objective
from kd_lightning.outputs import check_name, find_layer
from kd_lightning.progress import check_length_is_known, progress
from kd_lightning.quantization import (
    QuantizationSpec,
    is_prepared,
    prepare,
    quantized_layers,
    quantized_share,
    set_fake_quantization,
    set_observers,
    spec_of,
)
from kd_lightning.quantization.prepare import quantizers
from kd_lightning.quantization.quantizers import ActivationQuantizer, Quantizer
from kd_lightning.quantization.state import preparation_mismatch
from kd_lightning.teachers import TeacherSource
from kd_lightning.tracking.metrics import logs_this_step


@runtime_checkable
class _TrainsStudent(Protocol):
    """What a callback says that trains one network of the module, as ``Distillation`` does."""

    student_name: str
    teacher: TeacherSource


class QuantizationAwareTraining(Callback):
    """Fake-quantise a network while it is trained, whatever its losses are (Jacob et al., CVPR 2018).

    https://arxiv.org/abs/1712.05877. Start from a converged float network, with a small learning rate. The network is
    prepared in place, in every stage, so that ``trainer.test(ckpt_path=...)`` loads what was trained; it stays prepared
    afterwards. When each phase begins is a share of the optimizer steps (a float) or an epoch (an int), counted from 0,
    and follows from where the training is, also after a resume.

    A checkpoint keeps whether it rounds: one from before ``start`` is tested in float, and may well be what
    ``ModelCheckpoint(monitor=...)`` finds best. ``quantization/fake_quantize`` is logged, 0 before ``start`` and 1 from
    then on. Under DDP the processes average their ranges after each batch.

    Args:
        spec: Bits, and what stays in float; 8 bits everywhere unless given.
        start: When rounding begins. Ranges follow the data from the first batch. Learned scales are unused before: DDP
            takes that with ``strategy="ddp_find_unused_parameters_true"``.
        freeze_observers: When the ranges of activations stop to follow it.
        freeze_batch_norm: When batch norm is put into eval mode, as it is served.
        student: Name of the network in the module. Unless given, that of :class:`~kd_lightning.Distillation`, or
            ``student`` as in :class:`~kd_lightning.DistillationModule`, or the module itself without its losses.
        learning_rate_factor: Of the learning rates from ``start`` on, within each optimizer step: schedulers go on
            as they are, and ``LearningRateMonitor`` shows the rate without it.

    Raises:
        ValueError: For a time that never comes; at the start of a stage for a network that has nothing to quantise, is
            prepared with another spec, or is made only in the module's ``setup``; for a checkpoint of a float network;
            for callbacks that average weights, and for ``sync_batchnorm=True``.

    Example:
        >>> callback = QuantizationAwareTraining(QuantizationSpec(weight_bits=4, skip=("first", "last")), start=0.25)
    """

    def __init__(
        self,
        spec: QuantizationSpec | None = None,
        start: float | int = 0.0,
        freeze_observers: float | int = 0.75,
        freeze_batch_norm: float | int = 0.75,
        student: str = "",
        learning_rate_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(spec, QuantizationSpec | None):
            raise TypeError(
                f"expected a QuantizationSpec as spec=, got {spec!r}: pass for instance QuantizationSpec(weight_bits=8)"
            )
        check_name("student", student)
        self.spec = spec if spec is not None else QuantizationSpec()
        self.start, self.freeze_observers, self.freeze_batch_norm = start, freeze_observers, freeze_batch_norm
        self.student, self.learning_rate_factor = student, learning_rate_factor
        for name in ("start", "freeze_observers", "freeze_batch_norm"):
            _check_time(name, getattr(self, name))
        if start == 1.0 and isinstance(start, float):
            raise ValueError("expected start before the end, got 1.0: 0.0 rounds from the first step; epoch 1 is 1")
        if not is_finite_number(learning_rate_factor) or learning_rate_factor <= 0:
            raise ValueError(f"expected learning_rate_factor > 0, got {learning_rate_factor!r}: 1.0 leaves it as it is")
        self._network: nn.Module | None = None
        self._quantizers: list[Quantizer] = []
        self._norms: list[nn.Module] = []
        self._phase: tuple[bool, bool] | None = None
        self._undo = ExitStack()

    @property
    def state_key(self) -> str:
        """Lightning's name of this callback in a checkpoint; a module may have several networks that are rounded."""
        return self._generate_state_key(student=self.student)

    # Before training, in the order of the calls.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _check_trainer(trainer)
        before = [name for name, _ in pl_module.named_modules()] if is_prepared(pl_module) else None
        # What it makes has to be there, and so has what a loss adds to the student of a DistillationModule.
        pl_module.configure_model()
        network = self._find(trainer, pl_module)
        if not is_prepared(network):
            for teacher in _copying_teachers(trainer, pl_module):
                teacher.prepare(network)  # its copy is in float, whichever comes first in callbacks
            with _without_losses(network):
                prepare(network, self.spec)
                rank_zero_info(_summary(network))
        objective = find_objective(pl_module)
        changing = objective.changing_losses.values() if objective is not None else ()
        if before and changing and _further(pl_module, before):
            by_hand = ", ".join(f"{type(loss).__name__}.change" for loss in changing)
            raise ValueError(
                "a loss has changed the student after it was prepared, expected it to do so before: fit first, or "
                f"change the student by hand ({by_hand}) before validate and test"
            )
        if spec_of(network) != self.spec:
            raise ValueError(
                f"the network was prepared with {spec_of(network)}, expected {self.spec}: pass the spec that it has"
            )
        loading = network.register_load_state_dict_pre_hook(_refuse_float)  # type: ignore[no-untyped-call]
        self._undo.callback(loading.remove)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        trained_with = QuantizationSpec(**state_dict["spec"])
        if trained_with != self.spec:
            raise ValueError(f"the checkpoint was trained with {trained_with}, expected {self.spec}: pass that spec")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        times = (self.start, self.freeze_observers, self.freeze_batch_norm)
        if any(isinstance(time, float) for time in times):
            check_length_is_known(trainer)
        if isinstance(self.start, int) and 0 < (trainer.max_epochs or 0) <= self.start:
            raise ValueError(
                f"expected start before the end of {trainer.max_epochs} epochs, got epoch {self.start}: nothing would "
                "be rounded; epochs count from 0"
            )
        self._network, self._phase = self._find(trainer, pl_module), None
        if not is_prepared(self._network):
            raise ValueError(
                "the module's setup() has made the network anew after it was prepared, expected it to stay: make it in "
                "__init__ or configure_model"
            )
        with _without_losses(self._network):
            self._quantizers = list(quantizers(self._network).values())
            self._norms = [module for module in self._network.modules() if isinstance(module, _BatchNorm)]
        if _reached(self.freeze_observers, trainer) and not all(q.observed for q in self._quantizers):
            raise ValueError(
                "expected ranges to be known when they are frozen from the first step, got some that have seen no "
                "data: calibrate(prepare(network, spec), loader) before fit, or freeze_observers > 0"
            )
        if self.learning_rate_factor != 1:
            for optimizer in trainer.optimizers:
                self._undo.enter_context(scaled_learning_rate(optimizer, self._factor))

    # In training.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        assert self._network is not None
        rounding, frozen = _reached(self.start, trainer), _reached(self.freeze_observers, trainer)
        if self._phase != (rounding, frozen):
            set_fake_quantization(self._network, rounding)
            set_observers(self._network, not frozen)
            self._phase = rounding, frozen
        for quantizer in self._quantizers:
            quantizer.training = True  # also in parts of the network that the user keeps in eval mode
        if _reached(self.freeze_batch_norm, trainer):
            for norm in self._norms:
                if norm.training:
                    norm.eval()
                    self._undo.callback(norm.train)
        if logs_this_step(trainer):
            pl_module.log("quantization/fake_quantize", float(rounding))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size > 1 and self._phase is not None and not self._phase[1]:
            _average_ranges(trainer, self._quantizers)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._phase is not None and not self._phase[0]:
            rank_zero_warn(
                f"the training ended before start={self.start}: nothing was rounded, expected some steps that are; "
                "start earlier, or call calibrate(network, loader)"
            )

    # At the end.

    def state_dict(self) -> dict[str, Any]:
        return {"spec": asdict(self.spec)}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()

    def _leave(self) -> None:
        self._undo.close()
        self._network, self._norms, self._quantizers = None, [], []

    def _factor(self) -> float:
        return self.learning_rate_factor if self._phase is not None and self._phase[0] else 1.0

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> nn.Module:
        name = self.student or next((c.student_name for c in _training_callbacks(trainer)), "")
        if not name and isinstance(getattr(pl_module, "student", None), nn.Module):
            name = "student"
        try:
            return find_layer(pl_module, name)
        except ValueError as error:
            raise ValueError(
                f"{error}; a network that the module makes in setup() comes too late to be prepared: make it in "
                "__init__ or configure_model"
            ) from error


def _reached(time: float | int, trainer: Trainer) -> bool:
    return trainer.current_epoch >= time if isinstance(time, int) else progress(trainer) >= time


def _average_ranges(trainer: Trainer, found: list[Quantizer]) -> None:
    """Give all processes the mean of their ranges; DDP by itself would take those of the first process's samples."""
    buffers = [buffer for q in found if isinstance(q, ActivationQuantizer) for buffer in (q.low, q.high)]
    if buffers:
        mean = trainer.strategy.reduce(torch.stack(buffers), reduce_op="mean")
        torch._foreach_copy_(buffers, list(mean.unbind()))


def _training_callbacks(trainer: Trainer) -> list[_TrainsStudent]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, _TrainsStudent)]


def _copying_teachers(trainer: Trainer, module: LightningModule) -> list[TeacherSource]:
    teachers = [*(callback.teacher for callback in _training_callbacks(trainer)), getattr(module, "teacher", None)]
    return [teacher for teacher in teachers if isinstance(teacher, TeacherSource) and teacher.copies_student]


def _check_time(name: str, time: float | int) -> None:
    known = isinstance(time, int | float) and not isinstance(time, bool)
    if not known or not (0 <= time <= 1 if isinstance(time, float) else time >= 0):
        raise ValueError(
            f"expected {name} to be a share of the training in [0.0, 1.0] or an epoch (an int from 0), got {time!r}"
        )


def _check_trainer(trainer: Trainer) -> None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    # As WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging call their copy.
    averaging = next((type(c).__name__ for c in callbacks if hasattr(c, "_average_model")), None)
    if averaging is not None:
        raise ValueError(
            f"{averaging} averages weights from before rounding begins with those from after it, of which neither "
            "network was trained, and its copy does not switch; expected no average: fit with it in float first, then "
            "fit what it found without it and with QuantizationAwareTraining"
        )
    if getattr(trainer.strategy, "_layer_sync", None) is not None:
        raise ValueError(
            "sync_batchnorm=True replaces batch norm, and what quantises its output with it, expected it to stay: "
            "leave sync_batchnorm out, and take freeze_batch_norm=0.0 where batches are small"
        )


def _further(module: nn.Module, before: list[str]) -> bool:
    with _without_losses(module):
        return any(name not in before for name, _ in module.named_modules())


@contextmanager
def _without_losses(network: nn.Module) -> Iterator[None]:
    """Take the losses out of a module that is the student itself: their projectors are not served."""
    children = {parent: dict(parent._modules) for parent in network.modules()}
    hidden = {
        parent: named
        for parent, named in children.items()
        if any(isinstance(child, DistillationObjective) for child in named.values())
    }
    for parent, named in hidden.items():
        for name, child in named.items():
            if isinstance(child, DistillationObjective):
                del parent._modules[name]
    try:
        yield
    finally:
        for parent, named in hidden.items():
            now = {**named, **parent._modules}  # in their order, which is that of the parameters
            parent._modules.clear()
            parent._modules.update(now)


def _summary(network: nn.Module) -> str:
    report, share = quantized_layers(network), quantized_share(network)
    named: dict[str, list[str]] = {}
    for layer in report:
        if layer.note:
            named.setdefault(layer.note, []).append(layer.name)
    notes = [f"; {_some(names)} ({note})" for note, names in named.items()]
    count = sum(layer.weight_bits < 32 for layer in report)
    kinds = "convolutions and linear layers"
    if spec_of(network).embeddings:
        kinds = "convolutions, linear layers and embeddings"
    in_float = ", ".join(f"{kind} {parameters:,}" for kind, parameters in share.in_float.items())
    return (
        f"quantisation-aware training: {count} of {len(report)} {kinds} are quantised{''.join(notes)}; these are "
        f"{share.quantized:,} of {share.total:,} parameters ({share.quantized / share.total:.1%}); in float stay: "
        f"{in_float or 'none'}"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _refuse_float(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: object, *further: object
) -> None:
    """Say what is wrong before torch lists every quantiser as missing."""
    own = [name for name in state if name.startswith(prefix)]
    problem = preparation_mismatch(module.state_dict(), own)
    if own and problem:
        raise ValueError(f"the checkpoint does not fit {type(module).__name__}: {problem}")
