"""Each stage is made once and run dry, so that none fails after those before it were trained."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from kd_lightning.configuration.arguments import errors_at, explained
from kd_lightning.dry_forward import dry_forward
from kd_lightning.export.formats import require
from kd_lightning.first_batches import loader_batches, untouched_rng
from kd_lightning.losses.base import DistillationLoss
from kd_lightning.module import DistillationModule
from kd_lightning.objective import DistillationObjective
from kd_lightning.pipeline.check_checkpoint import check_checkpoint
from kd_lightning.pipeline.check_training import check_callbacks, check_optimizer, length
from kd_lightning.pipeline.quantizing import QuantizedStage, check_can_be_quantized
from kd_lightning.pipeline.recipe import Recipe
from kd_lightning.preflight import check_parts, dry_run
from kd_lightning.stored_outputs.formats import Best, find_format
from kd_lightning.tasks import Batch, Classification
from kd_lightning.teachers.stored import Stored


def check_recipes(recipes: Sequence[Recipe], quantized: QuantizedStage | None, recall_classes: Sequence[int]) -> None:
    """Make all parts of all stages, and try what can be tried without training.

    Nothing of it stays: neither random number generators nor files are changed.

    Raises:
        ValueError: For what is wrong, with its path where the recipe knows it.
        OSError: For files that cannot be read.
    """
    by_label = {recipe.label: recipe for recipe in recipes}
    deterministic = torch.are_deterministic_algorithms_enabled()
    if quantized is not None:
        require("the stage quantized", ("onnx", "onnxscript", "onnxruntime"), "onnx")
    with untouched_rng(), _silent():
        evaluated: list[tuple[Any, list[Batch]]] = []
        for recipe in by_label.values():
            losses = _losses(recipe)
            data = _training_data(recipe)
            known = [batches for config, batches in evaluated if config == recipe.config.get("data")]
            batches = known[0] if known else _evaluation_batches(recipe, data)
            evaluated.append((recipe.config.get("data"), batches))
            classes = _check_stage(recipe, by_label, losses, data, batches)
            wrong = [number for number in recall_classes if not 0 <= number < classes]
            with errors_at("recall_classes"):
                if wrong:
                    raise ValueError(f"expected classes from 0 to {classes - 1}, got {wrong[0]}")
        if quantized is not None:
            check_can_be_quantized(by_label.values(), quantized)
    torch.use_deterministic_algorithms(deterministic)


def _losses(recipe: Recipe) -> dict[str, DistillationLoss]:
    with recipe.errors("losses"), _of_a_loss(recipe):
        losses = recipe.losses()
        DistillationObjective(losses)
    return losses


def _training_data(recipe: Recipe) -> LightningDataModule:
    with recipe.errors("data"):
        data = recipe.training_data()
        if not isinstance(data, LightningDataModule):
            raise TypeError(f"expected a LightningDataModule, got {type(data).__name__}")
        data.prepare_data()
        data.setup("fit")
    return data


def _evaluation_batches(recipe: Recipe, data: LightningDataModule) -> list[Batch]:
    """Return the first batch of the validation and of the test split, as the task reads them."""
    task, read = Classification(), list[Batch]()
    with recipe.errors("data"):
        data.setup("validate")
        data.setup("test")
        for split, loader in (("validation", data.val_dataloader), ("test", data.test_dataloader)):
            raw = next(loader_batches(loader(), 1), None)
            if raw is None:
                raise ValueError(
                    f"the {split} split is empty, expected at least one batch: is its folder, or its size, right?"
                )
            batch = task.read(raw)
            if len(batch.args) != 1 or batch.kwargs or not isinstance(batch.args[0], Tensor):
                got = f"a mapping of {', '.join(batch.kwargs)}" if batch.kwargs else type(batch.args[0]).__name__
                raise ValueError(
                    f"a batch of the {split} split is {got}, expected (input, target) with one tensor as input, which "
                    "networks are timed and exported with: return such pairs, or train with DistillationModule in a "
                    "script, which takes mappings"
                )
            if batch.target is None or bool((task.labels(batch.target) == -100).all()):
                raise ValueError(f"the {split} split has no labels, expected (input, target): nothing could be scored")
            if batch.args[0].is_floating_point() and not bool(batch.args[0].isfinite().all()):
                raise ValueError(f"the {split} inputs hold NaN or infinite values, expected finite numbers")
            read.append(batch)
    return read


def _check_stage(
    recipe: Recipe,
    recipes: Mapping[str, Recipe],
    losses: dict[str, DistillationLoss],
    data: LightningDataModule,
    evaluated: Sequence[Batch],
) -> int:
    """Make a stage's parts and run them dry; return the number of classes."""
    others: list[nn.Module] = []
    for label in (recipe.taught_by, *recipe.members):
        other = recipes.get(label or "")
        if other is None:
            continue
        with other.errors("network"):
            others.append(other.network())
    with recipe.errors("network"):
        network = recipe.network()
        if not isinstance(network, nn.Module):
            raise TypeError(f"expected an nn.Module, got {type(network).__name__}")
    with recipe.errors("teachers"):
        teacher = recipe.source(*others) if recipe.is_taught else None
    with recipe.errors("losses", "teachers"):
        if recipe.stored_outputs is not None:
            check_parts(Stored(), DistillationObjective(losses))
        module = DistillationModule(network, teacher, losses, recipe.optimizer, recipe.scheduler)
    with recipe.errors("network", "losses", "data", *(["teachers"] if recipe.is_taught else [])):
        loader = data.train_dataloader()
        with _of_a_loss(recipe):
            batches, names = loader_batches(loader), getattr(data, "class_names", None)
            dry_run(batches, module.student, module.teacher, module.objective, module.task, class_names=names)
        if teacher is not None:
            teacher.start(module.student)
    with recipe.errors("network", "data"):
        classes = _check_evaluation(module, evaluated)
    if recipe.stored_outputs is not None:
        with recipe.errors("stored_outputs"):
            _check_stored(recipe.stored_outputs, module.objective, classes)
    if recipe.checkpoint is not None:
        with recipe.errors("checkpoint"):
            check_checkpoint(recipe, recipe.checkpoint, evaluated[0])
        return classes
    with recipe.errors("callbacks"):
        callbacks = recipe.callbacks()
    with recipe.errors("trainer"):
        trainer = recipe.trainer(callbacks=[*callbacks, ModelCheckpoint(Path())], logger=False, default_root_dir=None)
    check_optimizer(recipe, module, length(trainer, loader))
    check_callbacks(recipe, callbacks, trainer, module)
    return classes


def _check_evaluation(module: DistillationModule, batches: Sequence[Batch]) -> int:
    classes = 0
    for batch in batches:
        outputs = dry_forward("student", module.student, (batch.args[0][:2],), {}, ())
        classes = outputs.logits.shape[-1]
        module.task.check(batch.target, outputs.logits)
    return classes


def _check_stored(stored: Mapping[str, Any], objective: DistillationObjective, classes: int) -> None:
    format = find_format(stored["format"])
    format.width(classes)
    if isinstance(format, Best):
        objective.check_takes_top_k(f"format={stored['format']}")


@contextmanager
def _of_a_loss(recipe: Recipe) -> Iterator[None]:
    """Let an error name the loss that it is about, by the loss's name or that of a layer."""
    try:
        yield
    except (ValueError, TypeError) as error:
        nodes, path = recipe.config.get("losses", {}), recipe.paths.get("losses")
        for name, node in nodes.items() if path is not None else ():
            layers = [layer for key, value in node.items() if "layer" in key for layer in _listed(value)]
            if str(error).startswith(f"loss {name!r}") or any(f"no layer {layer!r}" in str(error) for layer in layers):
                raise explained(error, node, f"{path}.{name}") from error
        raise


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


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
