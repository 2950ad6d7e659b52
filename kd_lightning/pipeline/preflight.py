"""Each training is made once and run dry, so that none fails after those before it."""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kd_lightning.callbacks import (
    HyperparameterSchedule,
    OnPolicy,
    QuantizationAwareTraining,
    SequenceLevel,
    TemperatureSchedule,
)
from kd_lightning.configuration.arguments import errors_at, explained
from kd_lightning.data.contract import Data
from kd_lightning.dry_forward import dry_forward
from kd_lightning.export.batches import part, tensors
from kd_lightning.export.formats import require
from kd_lightning.first_batches import loader_batches, untouched_rng
from kd_lightning.losses.base import DistillationLoss
from kd_lightning.module import DistillationModule, configured
from kd_lightning.objective import DistillationObjective
from kd_lightning.outputs import TOP_K_REMEDY
from kd_lightning.pipeline.quantize import QuantizationPlan, check_can_be_quantized
from kd_lightning.pipeline.training import Training
from kd_lightning.preflight import check_parts, classes_of, dry_run
from kd_lightning.preflight.trainer import check_learning_rates, learning_rates, steps_of
from kd_lightning.preflight.weights import check_weights
from kd_lightning.stored_outputs.formats import Best, find_format
from kd_lightning.stored_outputs.manifest import check_can_be_replayed
from kd_lightning.tasks import Batch, Task
from kd_lightning.teachers import Stored

_SAMPLES = 256


def check_trainings(trainings: Sequence[Training], quantized: QuantizationPlan | None) -> None:
    """Make all parts of all trainings, and try what can be tried without training.

    Nothing of it stays: neither random number generators nor files are changed.

    Raises:
        ValueError: For what is wrong, with its path where the configuration is known.
        OSError: For files that cannot be read.
    """
    by_label = {training.label: training for training in trainings}
    deterministic = torch.are_deterministic_algorithms_enabled()
    if quantized is not None:
        require("the stage quantized", ("onnx", "onnxscript", "onnxruntime"), "onnx")
    with untouched_rng(), _silent():
        evaluated: list[tuple[Any, list[Batch]]] = []
        for training in by_label.values():
            losses = _losses(training)
            data = _training_data(training)
            known = [batches for config, batches in evaluated if config == training.config.get("data")]
            batches = known[0] if known else _evaluation_batches(training, data)
            evaluated.append((training.config.get("data"), batches))
            _check_training(training, by_label, losses, data, batches)
        if quantized is not None:
            check_can_be_quantized(by_label.values(), quantized)
    torch.use_deterministic_algorithms(deterministic)


def _losses(training: Training) -> dict[str, DistillationLoss]:
    with training.errors("losses"), _of_a_loss(training):
        losses = training.losses()
        DistillationObjective(losses)
    return losses


def _training_data(training: Training) -> Data:
    with training.errors("data"):
        data = training.make_data()
        data.check()
        data.setup("fit")
        if training.stored_outputs is not None or any(loss.needs_sample_ids for loss in training.losses().values()):
            data.check_can_be_wrapped()
        if training.stored_outputs is not None:
            check_can_be_replayed(data.training_set(), training.seed, training.stored_outputs["views"])
    return data


def _evaluation_batches(training: Training, data: Data) -> list[Batch]:
    """Return the first batch of the validation and of the test split, as the task reads them."""
    task, read = training.task, list[Batch]()
    with training.errors("data"):
        data.setup("validate")
        data.setup("test")
        for split, loader in (("validation", data.val_dataloader), ("test", data.test_dataloader)):
            raw = next(loader_batches(loader(), 1), None)
            if raw is None:
                raise ValueError(
                    f"the {split} split is empty, expected at least one batch: is its folder, or its size, right?"
                )
            batch = task.read(raw)
            _check_inputs(batch, split)
            if task.labelled and (batch.target is None or not bool(task.has_label(batch.target).any())):
                raise ValueError(f"the {split} split has no labels, expected (input, target): nothing could be scored")
            read.append(batch)
    return read


def _check_inputs(batch: Batch, split: str) -> None:
    inputs = {**{f"input {i}": x for i, x in enumerate(batch.args)}, **batch.kwargs}
    others = [f"{name} ({type(x).__name__})" for name, x in inputs.items() if not isinstance(x, Tensor) or not x.ndim]
    if others or (batch.args and batch.kwargs):
        got = f"{', '.join(others)} that is none" if others else "some by position and others by name"
        raise ValueError(
            f"a batch of the {split} split has {got}, expected tensors, one row a sample, all by position or all by "
            "name, with which networks are timed and exported: leave out of the batch what the network does not take"
        )
    if not all(bool(x.isfinite().all()) for x in tensors(batch) if x.is_floating_point()):
        raise ValueError(f"the {split} inputs hold NaN or infinite values, expected finite numbers")


def _check_training(
    training: Training,
    trainings: Mapping[str, Training],
    losses: dict[str, DistillationLoss],
    data: Data,
    evaluated: Sequence[Batch],
) -> None:
    """Make a training's parts and run them dry."""
    others: list[nn.Module] = []
    for label in (training.taught_by, *training.members):
        other = trainings.get(label or "")
        if other is None:
            continue
        with other.errors("network"):
            others.append(other.network())
    with training.errors("network"):
        network = training.network()
        if not isinstance(network, nn.Module):
            raise TypeError(f"expected an nn.Module, got {type(network).__name__}")
    with training.errors("teachers"):
        teacher = training.teacher(*others) if training.is_taught else None
    with training.errors("losses", "teachers"):
        if training.stored_outputs is not None:
            check_parts(Stored(), DistillationObjective(losses))
        module = training.module(network, teacher, losses)
    with training.errors("network", "losses", "data", *(["teachers"] if training.is_taught else [])):
        loader = data.train_dataloader()
        with _of_a_loss(training):
            batches, names = loader_batches(loader), data.class_names
            dry_run(batches, module.student, module.teacher, module.objective, module.task, class_names=names)
        if teacher is not None:
            teacher.start(module.student)
    width = _check_evaluation(training, module, evaluated)
    if training.stored_outputs is not None:
        with training.errors("stored_outputs"):
            _check_stored(training.stored_outputs, module.objective, training.task, width)
    if training.checkpoint is not None:
        with training.errors("checkpoint"):
            some = part(evaluated[0], slice(_SAMPLES))._replace(target=_first(evaluated[0].target, _SAMPLES))
            file = training.checkpoint if isinstance(training.checkpoint, Path) else None
            check_weights(training.network(), file, some, training.task, training.check_teacher)
        return
    with training.errors("callbacks"):
        callbacks = training.callbacks()
    with training.errors("trainer"):
        trainer = training.trainer(callbacks=[*callbacks, ModelCheckpoint(Path())], logger=False, default_root_dir=None)
    _check_optimizer(training, module, steps_of(trainer, loader))
    _check_callbacks(training, callbacks, trainer, module)


def _check_evaluation(training: Training, module: DistillationModule, batches: Sequence[Batch]) -> int:
    """Judge the untrained network on two samples of each split; return how many outputs it has for each unit."""
    task, width = training.task, 0
    for batch in batches:
        few = part(batch, slice(2))
        with training.errors("network", "data"):
            outputs = task.arranged(dry_forward("student", module.student, few.args, few.kwargs, ()))
            if batch.target is not None:
                task.check(batch.target, outputs.logits)
            task.check_dimensions(outputs.logits, batch.target)
        with training.errors("task"):
            width = classes_of(outputs)
            task.check_arguments(width)
            answers = task.answers(outputs)
            if task.labelled and batch.target is not None:
                task.headline.value(task.scores(outputs, batch.target[:2]).double().cpu().numpy())
                task.agreement(answers, answers)
    return width


def _check_stored(stored: Mapping[str, Any], objective: DistillationObjective, task: Task, width: int) -> None:
    format = find_format(stored["format"])
    format.width(width)
    if not isinstance(format, Best):
        return
    if not task.over_classes:
        raise ValueError(
            f"{type(task).__name__} has no classes of which some were the best, got format={stored['format']}: take "
            "float16"
        )
    losses = objective.named_losses().items()
    refused = [name for name, loss in losses if loss.needs_teacher and not loss.takes_top_k]
    if refused:
        raise ValueError(
            f"losses {refused} read the teacher's logits of all classes, got format={stored['format']}: {TOP_K_REMEDY}"
        )


def _check_optimizer(training: Training, module: DistillationModule, steps: float) -> None:
    """Make optimizer and scheduler, and step the scheduler to the end of the training."""
    parameters = {**dict(module.student.named_parameters()), **dict(module.objective.named_parameters())}
    with training.errors("optimizer"):
        optimizer: Any = configured(parameters, training.optimizer, None, SimpleNamespace())  # type: ignore[arg-type]
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected an optimizer, got {type(optimizer).__name__}")
        begun_with = learning_rates(optimizer)
        if training.scheduler is None:
            check_learning_rates([begun_with])
    if training.scheduler is None:
        return
    with training.errors("scheduler"):
        length: Any = SimpleNamespace(estimated_stepping_batches=steps)
        made: Any = configured(parameters, training.optimizer, training.scheduler, length)
        optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
        if not hasattr(scheduler, "step"):
            raise TypeError(f"expected a scheduler, got {type(scheduler).__name__}")
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "ReduceLROnPlateau follows a metric, expected a scheduler that is stepped after each optimizer step, "
                "such as scheduler=cosine"
            )
        rates = [learning_rates(optimizer)]
        for _ in range(int(steps) if math.isfinite(steps) else 100):
            scheduler.step()
            rates.append(learning_rates(optimizer))
        if not any(map(any, rates)) and not any(begun_with):
            with training.errors("optimizer"):  # whose rate the scheduler's follow
                check_learning_rates([begun_with])
        negative = {name: x for name, x in (training.config.get("scheduler") or {}).items() if _is_negative(x)}
        check_learning_rates(rates, "".join(f", with {name}={x}" for name, x in negative.items()))


def _check_callbacks(
    training: Training, callbacks: Sequence[Callback], trainer: Trainer, module: DistillationModule
) -> None:
    """Let our own callbacks look at what they will change."""
    nodes, path = training.config.get("callbacks") or {}, training.paths.get("callbacks")
    names = list(nodes) if len(nodes) == len(callbacks) else [""] * len(callbacks)
    for name, callback in zip(names, callbacks, strict=True):
        with errors_at(*([f"{path}.{name}" if name else path] if path else []), arguments=nodes.get(name)):
            if not isinstance(callback, Callback):
                raise TypeError(f"expected a callback, got {type(callback).__name__}")
            if isinstance(callback, HyperparameterSchedule | TemperatureSchedule | OnPolicy | SequenceLevel):
                callback.check(module)
            if isinstance(callback, QuantizationAwareTraining):
                callback.setup(trainer, module, "fit")


@contextmanager
def _of_a_loss(training: Training) -> Iterator[None]:
    """Let an error name the loss that it is about, by the loss's name or that of a layer."""
    try:
        yield
    except (ValueError, TypeError) as error:
        nodes, path = training.config.get("losses", {}), training.paths.get("losses")
        for name, node in nodes.items() if path is not None else ():
            layers = [layer for key, value in node.items() if "layer" in key for layer in _listed(value)]
            if str(error).startswith(f"loss {name!r}") or any(f"no layer {layer!r}" in str(error) for layer in layers):
                raise explained(error, node, f"{path}.{name}") from error
        raise


@contextmanager
def _silent() -> Iterator[None]:
    """Leave out warnings and what Lightning says of a Trainer: it is said when the stage runs."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _first(target: Tensor | None, count: int) -> Tensor | None:
    return None if target is None else target[:count]


def _is_negative(value: object) -> bool:
    return isinstance(value, int | float) and value < 0


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
