"""One stage: train a network, test it, leave what later stages and the verdict need."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.checkpoint import load_weights
from kd_lightning.first_batches import loader_batches
from kd_lightning.module import DistillationModule
from kd_lightning.objective import DistillationObjective
from kd_lightning.outputs import TopK, run
from kd_lightning.pipeline.checkpoint_io import AtomicCheckpointIO
from kd_lightning.pipeline.fingerprint import fingerprint_of
from kd_lightning.pipeline.latency import parameters, size_mb
from kd_lightning.pipeline.lock import agreed, held_by_ranks
from kd_lightning.pipeline.recipe import Recipe
from kd_lightning.pipeline.results import Result
from kd_lightning.pipeline.serving import post_training, serve
from kd_lightning.pipeline.stage_folder import LAST, Finished, OfStage, StageFolder
from kd_lightning.pipeline.teaching import teacher_for
from kd_lightning.preflight import dry_run
from kd_lightning.quantization import prepare
from kd_lightning.tasks import Batch, Classification
from kd_lightning.tasks.base import relative_entropy
from kd_lightning.teachers import Teacher, TeacherSource
from kd_lightning.tracking.runs import is_rank_zero

_STEPS_BETWEEN_CHECKPOINTS = 50
_ENTROPY_SAMPLES = 2000


def train(
    recipe: Recipe,
    network: nn.Module,
    data: LightningDataModule,
    teacher: TeacherSource | None,
    folder: StageFolder,
    logger: Logger | None,
    callbacks: list[Callback],
) -> tuple[float, DistillationObjective, Trainer]:
    """Fit the network, from its last checkpoint where there is one.

    Returns:
        The seconds that took, over all attempts; the losses as they are at the end; the Trainer.
    """
    data.prepare_data()
    data.setup("fit")
    timer = Timer()
    checkpoints = ModelCheckpoint(
        dirpath=folder.path,
        filename=LAST.removesuffix(".ckpt"),
        every_n_epochs=_epochs_between_checkpoints(data),
        save_on_train_epoch_end=True,  # between epochs a resumed training is bitwise the uninterrupted one
        enable_version_counter=False,
    )
    module = DistillationModule(
        network,
        teacher,
        recipe.losses(),
        recipe.optimizer,
        recipe.scheduler,
        check_teacher=recipe.check_teacher,
    )
    trainer = recipe.trainer(
        callbacks=[*recipe.callbacks(), *callbacks, timer, checkpoints, OfStage(folder.fingerprint)],
        logger=logger or False,
        default_root_dir=folder.path,
    )
    if isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=folder.last_checkpoint(), weights_only=True)
    except SIGTERMException:
        raise
    except SystemExit as error:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from error
    if trainer.received_sigterm:  # after the last batch: the Trainer has not told
        raise SIGTERMException
    module.cpu()
    return timer.time_elapsed("train"), module.objective, trainer


def test(
    recipe: Recipe,
    network: nn.Module,
    data: LightningDataModule,
    teacher: TeacherSource | None,
    seconds: float,
    temperatures: Mapping[str, float],
) -> Result:
    """Score the network on the validation split and, this once, on the test split."""
    data.setup("validate")
    data.setup("test")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.eval().to(device)
    val_predictions, val_target = _predict(network, data.val_dataloader(), device)
    predictions, target = _predict(network, data.test_dataloader(), device)
    temperature = next(iter(temperatures.values()), None)
    entropy = None
    if teacher is not None and temperature is not None:
        entropy = _teacher_entropy(teacher, data.train_dataloader(), temperature, device)
    network.cpu()
    return Result(
        role=recipe.role,
        label=recipe.label,
        method=recipe.method,
        seed=recipe.seed,
        predictions=predictions.numpy(),
        target=target.numpy(),
        val_accuracy=float((val_predictions == val_target).float().mean()),
        train_seconds=seconds,
        parameters=parameters(network),
        size_mb=size_mb(network),
        temperature=temperature,
        teacher_entropy=entropy,
    )


def run_stage(
    recipe: Recipe,
    teacher: Finished | None,
    stages: Path,
    make_logger: Callable[[str | None, Callable[[str | None], None]], Any],
    callbacks: list[Callback],
) -> Finished:
    """Train and test one network, or take it from ``stages`` where one with the same fingerprint was finished before.

    Where another process is at work on it, that is waited for.

    Args:
        recipe: What to train.
        teacher: Already finished.
        stages: Folder of all stages.
        make_logger: Given the id of the run that an earlier attempt was logged to, or None, and what is to be called
            with this attempt's. Not called for a stage that is reused.
        callbacks: Of the caller, such as a progress display.
    """
    data = recipe.training_data()
    folder = StageFolder(stages, recipe, fingerprint_of(recipe, data, teacher))
    finished = partial(
        Finished, recipe=recipe, folder=folder, architecture=partial(_architecture, recipe, data, teacher)
    )
    with held_by_ranks(folder.path, f"the stage {recipe.name}"):
        result = folder.read()
        if agreed(result is not None):
            assert result is not None
            return finished(result=result, reused=True)
        logger = make_logger(folder.run_id, folder.remember)
        _make(recipe, data, teacher, folder, logger, callbacks)
        result = folder.read()
    assert result is not None
    return finished(result=result, reused=False)


def _make(
    recipe: Recipe,
    data: LightningDataModule,
    teacher: Finished | None,
    folder: StageFolder,
    logger: Logger | None,
    callbacks: list[Callback],
) -> None:
    """Train and test, and write what stays."""
    seed_everything(recipe.seed, verbose=False)
    network, seconds, objective = recipe.network(), 0.0, None
    source, trainer = None, None
    if recipe.checkpoint is not None:
        load_weights(network, recipe.checkpoint)
        data.prepare_data()
    elif recipe.quantizing is not None and not recipe.quantizing.training:
        data.prepare_data()
        seconds = post_training(network, data, recipe.quantizing)
    else:
        source = teacher_for(recipe, data, teacher if recipe.needs_teacher else None, folder.path.parent)
        seconds, objective, trainer = train(recipe, network, data, source, folder, logger, callbacks)
    if is_rank_zero():
        # Scheduled or learnt temperatures have moved.
        temperatures = objective.temperatures() if objective is not None else {}
        result = test(recipe, network, data, source, seconds, temperatures)
        if recipe.quantizing is not None:
            result = serve(result, network, data, folder.file, recipe.quantizing)
        folder.finish(network, result, objective.state_dict() if objective is not None else {})
    if trainer is not None:
        trainer.strategy.barrier("the stage's files are written")
    elif torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _architecture(recipe: Recipe, data: LightningDataModule, teacher: Finished | None) -> nn.Module:
    network, objective = recipe.network(), DistillationObjective(recipe.losses())
    if recipe.is_taught and objective.changing_losses:
        data.prepare_data()
        batches = loader_batches(data.train_dataloader())
        source = Teacher(teacher.network()) if teacher is not None else recipe.source()
        dry_run(batches, network, source, objective, Classification())
    specs = [callback.spec for callback in recipe.callbacks() if isinstance(callback, QuantizationAwareTraining)]
    if recipe.quantizing is not None:
        specs.append(recipe.quantizing.spec)
    if specs:
        prepare(network, specs[0])
    return network


def _epochs_between_checkpoints(data: LightningDataModule) -> int:
    try:
        steps = len(data.train_dataloader())
    except TypeError:  # an iterable data set has no length
        return 1
    return math.ceil(_STEPS_BETWEEN_CHECKPOINTS / max(steps, 1))


@torch.inference_mode()
def _predict(network: nn.Module, loader: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    predictions, targets = [], []
    for batch in _batches(loader, device):
        predictions.append(run(network, batch.args, batch.kwargs).logits.argmax(-1).cpu())
        assert batch.target is not None
        targets.append(batch.target.cpu())
    return torch.cat(predictions), torch.cat(targets)


@torch.no_grad()
def _teacher_entropy(teacher: TeacherSource, loader: Any, temperature: float, device: torch.device) -> float | None:
    teacher.to(device)
    entropies: list[Tensor] = []
    count = 0
    for batch in _batches(loader, device):
        if not teacher.can_teach(batch):
            continue
        outputs = teacher(batch).softened(temperature)
        if isinstance(outputs, TopK):
            return None
        entropies.append(relative_entropy(outputs.logits, temperature) * len(outputs.logits))
        count += len(outputs.logits)
        if count >= _ENTROPY_SAMPLES:
            break
    return float(torch.stack(entropies).sum()) / count if count else None


def _batches(loader: Any, device: torch.device) -> Iterator[Batch]:
    for batch in loader:
        yield Classification().read(move_data_to_device(batch, device))
