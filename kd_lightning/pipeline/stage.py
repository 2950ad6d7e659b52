"""One stage: train a network, test it, leave what later stages and the verdict need."""

import hashlib
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from kd_lightning.checkpoint import load_student, load_weights
from kd_lightning.losses.base import DistillationLoss
from kd_lightning.module import DistillationModule
from kd_lightning.objective import DistillationObjective
from kd_lightning.outputs import run
from kd_lightning.pipeline.files import write_atomically
from kd_lightning.pipeline.latency import parameters, size_mb
from kd_lightning.pipeline.results import Result, Role
from kd_lightning.tasks import Classification
from kd_lightning.teachers import Teacher
from kd_lightning.tracking.metrics import relative_entropy
from kd_lightning.tracking.runs import is_rank_zero

_log = logging.getLogger(__name__)
_WEIGHTS, _LAST, _RESULT, _PREDICTIONS, _RUN_ID = "final.ckpt", "last.ckpt", "result.json", "predictions.npz", "run_id"
_STEPS_BETWEEN_CHECKPOINTS = 50
_ENTROPY_SAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one training is made of: factories, since each stage and seed starts from fresh objects.

    Attributes:
        role: ``teacher``, ``student`` (alone), ``control`` (on the teacher's hard labels) or ``distilled``.
        label: The model's row in the verdict; runs of several seeds share it.
        method: What it is trained with, as a run's name has it, such as ``kd-T4``.
        seed: Of initialisation and data order.
        config: All that decides the outcome; fingerprinted, and logged as parameters.
        network: Makes the network to train.
        losses: Makes the losses, by name.
        data: Makes the data module, given ``role`` and ``seed``.
        trainer: Makes the Trainer, given ``callbacks``, ``logger`` and ``default_root_dir``.
        optimizer: See :class:`~kd_lightning.DistillationModule`.
        scheduler: Likewise.
        callbacks: Makes further callbacks.
        checkpoint: Finished weights: nothing is trained, the network is only tested.
    """

    role: Role
    label: str
    method: str
    seed: int
    config: Mapping[str, Any]
    network: Callable[[], nn.Module]
    losses: Callable[[], dict[str, DistillationLoss]]
    data: Callable[..., LightningDataModule]
    trainer: Callable[..., Trainer]
    optimizer: Callable[..., Any]
    scheduler: Callable[..., Any] | None = None
    callbacks: Callable[[], list[Callback]] = list
    checkpoint: Path | None = None

    @property
    def name(self) -> str:
        """As a person reads it: ``distilled-kd-T4-s0``."""
        return f"{self.role}-{self.method}-s{self.seed}"

    @property
    def needs_teacher(self) -> bool:
        return self.role not in ("teacher", "student")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A stage that is done."""

    recipe: Recipe
    result: Result
    folder: Path
    fingerprint: str
    run_id: str | None

    def network(self) -> nn.Module:
        """Make the trained network anew, on the CPU."""
        network = self.recipe.network()
        load_weights(network, self.folder / _WEIGHTS)
        return network.eval()


class StageFolder:
    """What a stage keeps on disk; ``result.json`` is written last, so that a stage is finished or it is not."""

    def __init__(self, stages: Path, recipe: Recipe, fingerprint: str) -> None:
        self.path = stages / f"{recipe.name}-{fingerprint[:12]}"
        self.recipe, self.fingerprint = recipe, fingerprint

    @property
    def run_id(self) -> str | None:
        """Of the tracking run that this stage was logged to, if it was begun before."""
        file = self.path / _RUN_ID
        return file.read_text().strip() if file.is_file() else None

    def begin(self, run_id: str | None) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if run_id is not None:
            write_atomically(self.path / _RUN_ID, run_id.encode())

    def last_checkpoint(self) -> Path | None:
        """Return the checkpoint of an interrupted training, if there is one that can be read."""
        file = self.path / _LAST
        if not file.is_file():
            return None
        try:
            load_student(file)
        except ValueError as error:
            _log.warning("%s; the training starts again", error)
            return None
        return file

    def finish(self, network: nn.Module, result: Result) -> None:
        weights, predictions = io.BytesIO(), io.BytesIO()
        torch.save({"state_dict": network.state_dict()}, weights)
        write_atomically(self.path / _WEIGHTS, weights.getvalue())
        np.savez_compressed(predictions, predictions=result.predictions, target=result.target)
        write_atomically(self.path / _PREDICTIONS, predictions.getvalue())
        content = {"fingerprint": self.fingerprint, "result": result.to_dict()}
        write_atomically(self.path / _RESULT, json.dumps(content, indent=2).encode())
        (self.path / _LAST).unlink(missing_ok=True)

    def read(self) -> Result | None:
        """Return the result of a finished stage, None where it is not finished, or its files are torn."""
        try:
            content = json.loads((self.path / _RESULT).read_text())
            if content["fingerprint"] != self.fingerprint:
                return None
            load_student(self.path / _WEIGHTS)
            with np.load(self.path / _PREDICTIONS, allow_pickle=False) as arrays:
                fields = {key: value for key, value in content["result"].items() if key != "accuracy"}
                fields |= {"label": self.recipe.label, "predictions": arrays["predictions"], "target": arrays["target"]}
                return Result(**fields)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError) as error:
            _log.warning("%s is damaged (%s); the stage runs again", self.path, error)
            return None


def fingerprint_of(recipe: Recipe, data: LightningDataModule, teacher: Finished | None) -> str:
    """Hash all that decides a stage's outcome: its config, data, code, teacher, and the weights it starts from."""
    of_data = getattr(data, "fingerprint", None)
    content = {
        "config": recipe.config,
        "data": of_data() if of_data is not None else type(data).__qualname__,
        "code": _code_version(),
        "teacher": teacher.fingerprint if teacher is not None and recipe.needs_teacher else None,
        "checkpoint": recipe.checkpoint and hashlib.sha256(recipe.checkpoint.read_bytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def train(
    recipe: Recipe,
    network: nn.Module,
    data: LightningDataModule,
    teacher: Finished | None,
    folder: StageFolder,
    logger: Logger | None,
    callbacks: list[Callback],
) -> tuple[float, Trainer]:
    """Fit the network, from its last checkpoint where there is one; return the seconds that took, over all attempts."""
    data.prepare_data()
    data.setup("fit")
    timer = Timer()
    checkpoints = ModelCheckpoint(
        dirpath=folder.path,
        filename=_LAST.removesuffix(".ckpt"),
        every_n_epochs=_epochs_between_checkpoints(data),
        save_on_train_epoch_end=True,  # between epochs a resumed training is bitwise the uninterrupted one
        enable_version_counter=False,
    )
    module = DistillationModule(
        network,
        Teacher(teacher.network()) if teacher is not None else None,
        recipe.losses(),
        recipe.optimizer,
        recipe.scheduler,
    )
    trainer = recipe.trainer(
        callbacks=[*recipe.callbacks(), *callbacks, timer, checkpoints],
        logger=logger or False,
        default_root_dir=folder.path,
    )
    trainer.fit(module, datamodule=data, ckpt_path=folder.last_checkpoint(), weights_only=True)
    module.cpu()
    return timer.time_elapsed("train"), trainer


def test(
    recipe: Recipe, network: nn.Module, data: LightningDataModule, teacher: Finished | None, seconds: float
) -> Result:
    """Score the network on the validation split and, this once, on the test split."""
    data.setup("validate")
    data.setup("test")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.eval().to(device)
    val_predictions, val_target = _predict(network, data.val_dataloader(), device)
    predictions, target = _predict(network, data.test_dataloader(), device)
    temperature = next(iter(DistillationObjective(recipe.losses()).temperatures().values()), None)
    entropy = None
    if teacher is not None and temperature is not None:
        entropy = _teacher_entropy(teacher.network().to(device), data.train_dataloader(), temperature, device)
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
    make_logger: Callable[[str | None], Any],
    callbacks: list[Callback],
) -> tuple[Finished, bool]:
    """Train and test one network, or take it from ``stages`` where it was finished before.

    Args:
        recipe: What to train.
        teacher: Already finished.
        stages: Folder of all stages.
        make_logger: Given the id of the run that an earlier attempt was logged to, or None. Not called for a stage
            that is reused.
        callbacks: Of the caller, such as a progress display.

    Returns:
        The stage, and whether it was reused: the same fingerprint of config, data, code and teacher was found.
    """
    data = recipe.data(role=recipe.role, seed=recipe.seed)
    folder = StageFolder(stages, recipe, fingerprint_of(recipe, data, teacher))
    result = folder.read()
    reused = result is not None
    if result is None:
        logger = make_logger(folder.run_id)
        if is_rank_zero():
            folder.begin(logger.run_id if logger is not None else None)
        seed_everything(recipe.seed, verbose=False)
        network, seconds, trainer = recipe.network(), 0.0, None
        if recipe.checkpoint is not None:
            load_weights(network, recipe.checkpoint)
            data.prepare_data()
        else:
            seconds, trainer = train(recipe, network, data, teacher, folder, logger, callbacks)
        if is_rank_zero():
            folder.finish(network, test(recipe, network, data, teacher, seconds))
        if trainer is not None:
            trainer.strategy.barrier("the stage's files are written")
        result = folder.read()
        assert result is not None
    finished = Finished(
        recipe=recipe, result=result, folder=folder.path, fingerprint=folder.fingerprint, run_id=folder.run_id
    )
    return finished, reused


def _epochs_between_checkpoints(data: LightningDataModule) -> int:
    try:
        steps = len(data.train_dataloader())
    except TypeError:  # an iterable data set has no length
        return 1
    return math.ceil(_STEPS_BETWEEN_CHECKPOINTS / max(steps, 1))


@torch.inference_mode()
def _predict(network: nn.Module, loader: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    predictions, targets = [], []
    for args, kwargs, target in _batches(loader, device):
        predictions.append(run(network, args, kwargs).logits.argmax(-1).cpu())
        assert target is not None
        targets.append(target.cpu())
    return torch.cat(predictions), torch.cat(targets)


@torch.inference_mode()
def _teacher_entropy(network: nn.Module, loader: Any, temperature: float, device: torch.device) -> float:
    entropies: list[Tensor] = []
    count = 0
    for args, kwargs, _ in _batches(loader, device):
        logits = run(network, args, kwargs).logits
        entropies.append(relative_entropy(logits, temperature) * len(logits))
        count += len(logits)
        if count >= _ENTROPY_SAMPLES:
            break
    return float(torch.stack(entropies).sum()) / count


def _batches(loader: Any, device: torch.device) -> Iterator[Any]:
    from lightning.fabric.utilities.apply_func import move_data_to_device

    for batch in loader:
        yield Classification().read(move_data_to_device(batch, device))


@cache
def _code_version() -> str:
    """Hash this package's sources, and name what it computes with."""
    digest = hashlib.sha256(f"torch {torch.__version__} lightning {lightning.__version__}".encode())
    package = Path(__file__).parent.parent
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return digest.hexdigest()
