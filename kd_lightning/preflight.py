"""What can be known to be wrong before the first training step."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from kd_lightning.checkpoint import mismatch
from kd_lightning.objective import DistillationObjective
from kd_lightning.outputs import Outputs, nearest_layers, run
from kd_lightning.tasks import Batch, Classification
from kd_lightning.teachers import Teacher

_SCAN = 100
"""Batches that are looked through for a labelled one, or for samples to judge the teacher on."""
_TEACHER_SAMPLES = 256
_TOO_FEW_TO_JUDGE = 100
_END = object()


def check_parts(teacher: Teacher | None, objective: DistillationObjective) -> None:
    """Raise ValueError when a loss needs a teacher and none is there."""
    if teacher is None and objective.needs_teacher:
        names = [name for name, loss in objective.named_losses().items() if loss.needs_teacher]
        raise ValueError(f"losses {names} need a teacher, got teacher=None: pass a Teacher, or leave these losses out")


def check_checkpoint(state: Mapping[str, Tensor], student: nn.Module) -> None:
    """Raise ValueError when a checkpoint does not hold this student."""
    problem = mismatch(student, state)
    if problem:
        raise ValueError(f"the checkpoint does not fit the student {type(student).__name__}: {problem}")


def dry_run(
    batches: Iterable[Any],
    student: nn.Module,
    teacher: Teacher | None,
    objective: DistillationObjective,
    task: Classification,
) -> None:
    """Run both networks on a few samples of the training, build the losses, compute them once.

    Leaves networks and random number generators as they were.

    Args:
        batches: Of the training; see :func:`training_batches` and :func:`loader_batches`.
        student: Without a trace of this afterwards.
        teacher: Likewise.
        objective: Has its projectors afterwards.
        task: Reads the batches.

    Raises:
        ValueError: With what was expected, what came and what to do.
    """
    _, batch = first_batch(batches, objective, task)
    few = _take(_labelled_first(batch, task), samples_needed(objective), _size(batch))
    args, kwargs, target = few
    student_outputs = dry_forward("student", student, args, kwargs, objective.student_layers)
    teacher_outputs = None
    if teacher is not None:
        teacher_outputs = dry_forward("teacher", teacher.network, args, kwargs, objective.teacher_layers)
    check_outputs(objective, student_outputs, teacher_outputs, target, task)
    if batch.target is not None:
        check_labels(batch.target, student_outputs.logits.shape[-1], task)


def first_batch(batches: Iterable[Any], objective: DistillationObjective, task: Classification) -> tuple[Any, Batch]:
    """Check the first batch of a training, the first labelled one where a loss needs labels.

    Returns:
        The batch as it came, and as the task reads it.

    Raises:
        ValueError: For an empty loader, NaN in the inputs, missing labels, and a batch smaller than a loss needs.
    """
    empty = True
    labels_needed = _need_labels(objective)
    for raw in islice(batches, _SCAN):
        empty = False
        batch = task.read(raw)
        _check_finite(batch)
        if not labels_needed or _labelled(batch, task):
            break
    else:
        if empty:
            raise ValueError(
                "the training loader is empty, expected at least one batch: is the data set smaller than a batch with "
                "drop_last=True, or its folder wrong?"
            )
        raise ValueError(
            f"losses {labels_needed} need labels, got none in the first {_SCAN} training batches (all -100, or no "
            "target): give the labels, or leave these losses out for unlabelled data"
        )
    size = _size(batch)
    name, loss = max(objective.named_losses().items(), key=lambda item: item[1].min_batch_size)
    if size is not None and size < loss.min_batch_size:
        raise ValueError(
            f"loss {name!r} compares samples and needs a batch of at least {loss.min_batch_size}, got {size}: raise "
            "the batch size"
        )
    return raw, batch


def samples_needed(objective: DistillationObjective) -> int:
    """Return how many samples the losses can be computed on, 2 at least."""
    return max(2, *(loss.min_batch_size for loss in objective.named_losses().values()))


@torch.no_grad()
def dry_forward(
    role: str, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], layers: Iterable[str]
) -> Outputs:
    """Run a network in eval mode, without a trace left in it.

    Raises:
        ValueError: For an unknown layer (nearest names and their output shapes are listed), or inputs that the network
            cannot take.
    """
    known = dict(network.named_modules())
    unknown = [name for name in layers if name not in known]
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with untouched_rng(), _uncompiled():
            parameter = next(network.parameters(), None)
            if parameter is not None:
                args, kwargs = (_fit(x, parameter) for x in (args, kwargs))
            try:
                if unknown:
                    raise unknown_layer(
                        role, network, unknown[0], lambda: network(*args, **kwargs), len(args[0]) if args else "some"
                    )
                return run(network, args, kwargs, layers)
            except (RuntimeError, TypeError, IndexError) as error:
                if "layer '" in str(error):  # of the capture: names the layer and the remedy already
                    raise ValueError(f"{role}: {error}") from error
                shapes = [tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
                raise ValueError(
                    f"the {role} {type(network).__name__} cannot take a batch of shape {', '.join(map(str, shapes))}: "
                    f"{str(error).splitlines()[0]}; expected inputs as the network was made for: check channels, image "
                    "size and the data module"
                ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_outputs(
    objective: DistillationObjective,
    student: Outputs,
    teacher: Outputs | None,
    target: Tensor | None,
    task: Classification,
) -> None:
    """Compare classes and labels, build the losses, and compute them once.

    Raises:
        ValueError: With what was expected, what came and what to do.
    """
    for role, outputs in (("student", student), ("teacher", teacher)):
        if outputs is not None:
            check_logits(role, outputs.logits)
    classes = student.logits.shape[-1]
    if teacher is not None and teacher.logits.shape[-1] != classes:
        raise ValueError(
            f"the student has {classes} classes and the teacher {teacher.logits.shape[-1]}, expected the same classes "
            "in the same order: set num_classes, or slice the teacher's logits in a module around it"
        )
    if target is not None:
        check_labels(target, classes, task)
    objective.build(student, teacher)
    with torch.no_grad():
        device = student.logits.device
        total, _ = objective(
            student,
            None if teacher is None else move_data_to_device(teacher, device),
            None if target is None else target.to(device),
        )
    if not torch.isfinite(total):
        raise ValueError(
            f"the losses give {total.item()} before the first step, expected a finite value: look for NaN or infinite "
            "weights in student and teacher"
        )


def check_labels(target: Tensor, classes: int, task: Classification) -> None:
    """Raise ValueError for a label that is no class, or probabilities over other classes."""
    if target.is_floating_point() and target.shape[-1] != classes:
        raise ValueError(f"the targets are probabilities over {target.shape[-1]} classes, expected {classes}")
    labels = task.labels(target)
    wrong = labels[((labels < 0) & (labels != -100)) | (labels >= classes)]
    if wrong.numel():
        raise ValueError(
            f"label {int(wrong[0])} is out of range, expected 0 to {classes - 1}, or -100 for an unlabelled sample: "
            "set num_classes to that of the data set, or map the labels"
        )


def check_logits(role: str, logits: Tensor, remedy: str = "leave the softmax out of its forward") -> None:
    """Raise ValueError for probabilities: no value negative, and each row's sum 1."""
    rows = logits.detach().float()
    if rows.shape[-1] > 1 and bool((rows >= 0).all()) and bool(((rows.sum(-1) - 1).abs() < 1e-2).all()):
        raise ValueError(
            f"expected logits from the {role}, got probabilities (no output is negative, each row sums to 1): {remedy}"
        )


@torch.no_grad()
def check_teacher_accuracy(module: LightningModule, teacher: Teacher, task: Classification) -> None:
    """Print the teacher's accuracy on some training samples; refuse a teacher at chance.

    Raises:
        ValueError: For an accuracy not above chance (1/C plus three standard errors), or labels out of range.
    """
    precision = module.trainer.precision_plugin
    correct = count = classes = 0
    for raw in training_batches(module, _SCAN):
        batch = task.read(precision.convert_input(move_data_to_device(raw, module.device)))
        if batch.target is None:
            return
        with precision.forward_context():
            logits = teacher(batch.args, batch.kwargs).logits
        classes = logits.shape[-1]
        check_labels(batch.target, classes, task)
        hits = task.correct(logits, batch.target)
        correct, count = correct + int(hits.sum()), count + hits.numel()
        if count >= _TEACHER_SAMPLES:
            break
    if count == 0:
        return
    accuracy, chance = correct / count, 1 / classes
    rank_zero_info(f"teacher: {accuracy:.1%} on {count} training samples (chance is {chance:.1%})")
    if count >= _TOO_FEW_TO_JUDGE and accuracy <= chance + 3 * math.sqrt(chance * (1 - chance) / count):
        raise ValueError(
            f"the teacher is at chance on this loader: {accuracy:.1%} on {count} samples of {classes} classes, "
            f"expected well above {chance:.1%}: is the normalisation another than in its training, is the order of the "
            "classes, or were its weights never loaded? Pass check_teacher=False to train on it all the same"
        )


def training_batches(module: LightningModule, count: int = _SCAN) -> Iterator[Any]:
    """Yield up to ``count`` batches of the training loader, on CPU, as ``training_step`` would get them.

    Runs in this process whatever the number of workers, and draws nothing from any random number generator that the
    training uses.
    """
    trainer = module.trainer
    with untouched_rng():
        # Lightning's own set-up of the loader would come too early here: it restores a loader's state after this.
        loader = trainer.fit_loop._data_source.dataloader()
    for batch in loader_batches(loader, count):
        with untouched_rng():
            transferred = _transferred(trainer, module, batch)
        yield transferred


def loader_batches(loader: Any, count: int = _SCAN) -> Iterator[Any]:
    """Yield up to ``count`` batches of a loader, likewise."""
    batches = _iterate(loader)
    for _ in range(count):
        with untouched_rng():  # for each batch: between them it is the caller's draws that count
            batch = next(batches, _END)
        if batch is _END:
            return
        yield batch


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Put the random number generators back to where they were."""
    error: BaseException | None = None
    with isolate_rng():  # which does not when it is left by an exception, or by a generator that is not run to its end
        try:
            yield
        except BaseException as caught:
            error = caught
    if error is not None:
        raise error


def _uncompiled() -> AbstractContextManager[object]:
    """Run compiled networks as they were written.

    Compiled for a few samples first, they would be compiled again at the first step: for any number, and slower.
    """
    eager: AbstractContextManager[object] = nullcontext()
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):  # since torch 2.6
        eager = torch.compiler.set_stance("force_eager")
    return eager


def _iterate(loader: Any) -> Iterator[Any]:
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        dataset, collate = loader.dataset, loader.collate_fn
        if loader.batch_sampler is None:
            for index in _unshared(loader.sampler):
                yield collate(dataset[index])
        else:
            for indices in _unshared(loader.batch_sampler):
                fetch = getattr(dataset, "__getitems__", None)
                yield collate(fetch(indices) if fetch else [dataset[i] for i in indices])
    elif isinstance(loader, DataLoader):
        yield from _unshared(loader)
    else:
        combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
        for batch, _, _ in combined:
            yield batch


def _unshared(source: Any) -> Iterator[Any]:
    """Iterate a sampler or a loader and put its generators back to where they were."""
    owners = (source, getattr(source, "sampler", None))
    states = [(g, g.get_state()) for g in (getattr(o, "generator", None) for o in owners) if g is not None]
    try:
        yield from source
    finally:
        for generator, state in states:
            generator.set_state(state)


def _transferred(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    for owner in (trainer.datamodule, module):  # type: ignore[attr-defined]
        if owner is not None:
            batch = owner.on_after_batch_transfer(owner.on_before_batch_transfer(batch, 0), 0)
    return batch


def _check_finite(batch: Batch) -> None:
    for x in (*batch.args, *batch.kwargs.values()):
        if isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all():
            bad = int((~x.isfinite()).sum())
            raise ValueError(
                f"the training inputs hold {bad} NaN or infinite values in a batch of shape {tuple(x.shape)}, expected "
                "finite numbers: look for a division by a standard deviation of zero, or a broken file"
            )


def _need_labels(objective: DistillationObjective) -> list[str]:
    return [name for name, loss in objective.named_losses().items() if loss.needs_labels and loss.weight > 0]


def _labelled(batch: Batch, task: Classification) -> bool:
    return batch.target is not None and bool((task.labels(batch.target) != -100).any())


def _labelled_first(batch: Batch, task: Classification) -> Batch:
    """Sort a batch so that the few samples taken from it include labelled ones."""
    if batch.target is None or batch.target.ndim != 1:
        return batch
    order = torch.argsort((task.labels(batch.target) == -100).long(), stable=True)
    return Batch(*(_map(lambda x: x[order] if len(x) == len(order) else x, part) for part in batch))


def _take(batch: Batch, count: int, size: int | None) -> Batch:
    if size is None:
        return batch
    return Batch(*(_map(lambda x: x[:count] if len(x) == size else x, part) for part in batch))


def _map(function: Any, part: Any) -> Any:
    return apply_to_collection(part, Tensor, lambda x: function(x) if x.ndim else x)


def _size(batch: Batch) -> int | None:
    tensors = [x for x in (*batch.args, *batch.kwargs.values()) if isinstance(x, Tensor) and x.ndim]
    return len(tensors[0]) if tensors else None


def _fit(data: Any, parameter: Tensor) -> Any:
    """Put data where a network is, floating-point inputs in its precision."""

    def move(x: Tensor) -> Tensor:
        return x.to(parameter.device, parameter.dtype if x.is_floating_point() else None)

    return apply_to_collection(data, Tensor, move)


def unknown_layer(
    role: str, network: nn.Module, name: str, forward: Callable[[], object], samples: object = "some"
) -> ValueError:
    """Return the error for a layer that is not there: with the nearest names, and their shapes in ``forward()``."""
    shapes: dict[str, str] = {}

    def note(layer: str, output: Any) -> None:
        shapes[layer] = str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__

    hooks = [
        module.register_forward_hook(lambda _module, _input, output, layer=layer: note(layer, output))
        for layer, module in network.named_modules()
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    nearest = ", ".join(f"{layer} {shapes.get(layer, '(did not run)')}" for layer in nearest_layers(network, name))
    return ValueError(
        f"the {role} {type(network).__name__} has no layer {name!r}, expected a name of named_modules(); nearest, with "
        f"their outputs for {samples} samples: {nearest}"
    )
