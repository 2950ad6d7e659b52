"""Run one training: fit the network, test it as the task says, leave what later stages and the verdict need."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.checkpoint import load_weights
from kd_lightning.data.contract import Data
from kd_lightning.data.inputs import inputs_of
from kd_lightning.evaluation import Evaluation, as_array, beside_teacher, evaluate, teacher_entropy
from kd_lightning.export.batches import feed, on_cpu, part, tensors
from kd_lightning.first_batches import loader_batches
from kd_lightning.objective import DistillationObjective, find_objective
from kd_lightning.outputs import Outputs, run
from kd_lightning.pipeline.folder import (
    LAST,
    AtomicCheckpointIO,
    FinishedStage,
    StageFolder,
    StageMark,
    agreed,
    held_by_ranks,
)
from kd_lightning.pipeline.measure import parameters, size_mb
from kd_lightning.pipeline.training import Answers, Training
from kd_lightning.preflight import check_parts, dry_run
from kd_lightning.quantization import prepare
from kd_lightning.records import Result
from kd_lightning.stored_outputs import StoredOutputs, store_outputs
from kd_lightning.stored_outputs.reader import read_complete
from kd_lightning.stored_outputs.store import Store
from kd_lightning.tasks import Batch, Task
from kd_lightning.teachers import Stored, Teacher, TeacherSource
from kd_lightning.tracking.runs import is_rank_zero

_STEPS_BETWEEN_CHECKPOINTS = 50


def run_stage(
    training: Training,
    teacher: FinishedStage | None,
    stages: Path,
    make_logger: Callable[[Path], Logger | None],
    callbacks: list[Callback],
    judge: FinishedStage | None = None,
) -> FinishedStage:
    """Train and test one network, or take it from ``stages`` where one with the same fingerprint was finished before.

    Where another process is at work on it, that is waited for.

    Args:
        training: What to train.
        teacher: The model that teaches it, already finished.
        stages: Folder of all stages.
        make_logger: Given the stage's folder, in which an earlier attempt may have left its journal. Not called for a
            stage that is reused.
        callbacks: Of the caller, such as a progress display.
        judge: The teacher by whose answers it is judged, for a task whose test units have no labels, or with whose
            outputs its own are compared.
    """
    data = training.make_data()
    identities = (stage.folder.identity() if stage is not None else None for stage in (teacher, judge))
    folder = StageFolder(stages, training, training.fingerprint(data, *identities))
    finished = partial(
        FinishedStage,
        training=training,
        folder=folder,
        architecture=partial(_architecture, training, data, teacher),
        inputs=partial(inputs_of, data, training.config.get("data")),
    )
    with held_by_ranks(folder.path, f"the stage {training.name}"):
        result = folder.result()
        if agreed(result is not None):
            assert result is not None
            return finished(result=result, reused=True)
        logger = make_logger(folder.path)
        answers = judge.answers() if judge is not None and training.is_judged_by_teacher else None
        beside = judge if training.is_beside_teacher else None
        _make(training, data, teacher, folder, logger, callbacks, answers, beside)
        result = folder.result()
    assert result is not None
    return finished(result=result, reused=False)


def result_of(
    model: Training | Result, task: Task, tested: Evaluation, validation: Evaluation, **others: Any
) -> Result:
    """Return the record of a model on the test split, with its headline on the validation split.

    Args:
        model: Says which it is.
        task: Says what it is worth.
        tested: On the test split.
        validation: On the other one.
        others: Of :class:`~kd_lightning.records.Result`.
    """
    figures = {**others.pop("figures", {}), "val": validation.value(task)}
    return Result(
        role=model.role,
        label=model.label,
        method=model.method,
        seed=model.seed,
        answers=as_array(tested.answers),
        scores=as_array(tested.scores.double()),
        target_digest=tested.digest(),
        learned_nothing=task.learned_nothing(tested.answers, tested.scores, tested.target),
        figures=figures,
        **others,
    )


def with_members(training: Training, finished: Mapping[str, FinishedStage]) -> Training:
    """Let a training's teacher have the networks of its further members, and its config say which these are."""
    if not training.members:
        return training
    members, teacher = [finished[label] for label in training.members], training.teacher
    return replace(
        training,
        config={**training.config, "members": [member.folder.identity() for member in members]},
        teacher=lambda network: teacher(network, *(member.network() for member in members)),
        members=(),
    )


def store_teachers_outputs(training: Training, teacher: FinishedStage, stages: Path, stored: set[Path]) -> None:
    """Write the teacher's outputs for the samples of a training, where they are not there yet.

    Args:
        training: Whose samples these are.
        teacher: The finished model that teaches it.
        stages: Folder of all stages.
        stored: What was written or looked through before, for a training with the same needs; is added to.

    Raises:
        ValueError: For losses that look into the teacher's network.
    """
    assert training.stored_outputs is not None
    objective = DistillationObjective(training.losses())
    check_parts(Stored(), objective)
    data = training.make_data()
    data.setup("fit")
    path = _path_of_outputs(training, data, teacher, stages)
    if path in stored:
        return
    stored.add(path)
    with held_by_ranks(path, f"the storing of the teacher's outputs for {training.name}"):
        store_outputs(
            teacher.network(),
            data.training_set(),
            path,
            views=training.stored_outputs["views"],
            format=training.stored_outputs["format"],
            layers=objective.teacher_layers,
            batch_size=training.stored_outputs["batch_size"],
            device=training.trainer(callbacks=[], logger=False, default_root_dir=None).strategy.root_device,
            seed=_seed_of_outputs(training, data),
            task=training.task,
            collate_fn=data.collate_fn(),
        )


def _make(
    training: Training,
    data: Data,
    teacher: FinishedStage | None,
    folder: StageFolder,
    logger: Logger | None,
    callbacks: list[Callback],
    judge: Answers | None,
    beside: FinishedStage | None,
) -> None:
    """Train and test, and write what stays."""
    seed_everything(training.seed, verbose=False)
    network, fit = training.network(), _Fit()
    data.setup("fit")
    if training.checkpoint is not None:
        if isinstance(training.checkpoint, Path):
            load_weights(network, training.checkpoint)
    elif training.quantization is not None and not training.quantization.trained:
        begun = time.perf_counter()
        training.quantization.calibrate(network, data)
        fit = _Fit(seconds=time.perf_counter() - begun)
    else:
        stored = None
        if teacher is not None and training.needs_teacher and training.stored_outputs is not None:
            stored = _path_of_outputs(training, data, teacher, folder.path.parent)
        source = _teacher_of(training, data, teacher if training.needs_teacher else None, stored)
        fit = _fit(training, network, data, source, folder, logger, callbacks)
        if stored is not None:
            fit = fit._replace(storing=read_complete(Store(stored)).seconds)
    if is_rank_zero():
        result, validation = _test(training, network, data, fit, judge, beside)
        if training.quantization is not None:
            result = training.quantization.serve(result, network, data, folder.file, judge)
        kept = None if training.task.labelled or training.role != "teacher" else validation
        folder.finish(network, result, fit.losses, kept, _example(training.task, data))
    if fit.trainer is not None:
        fit.trainer.strategy.barrier("the stage's files are written")
    elif torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _example(task: Task, data: Data) -> dict[str, Any] | None:
    """Return the inputs of one sample, as an exported file gets them; None where they are more than tensors."""
    batch = task.read(next(iter(data.val_dataloader())))
    if not all(isinstance(x, Tensor) for x in tensors(batch)):
        return None
    return feed(on_cpu(part(batch, slice(1)), "an example"))


def _teacher_of(
    training: Training, data: Data, teacher: FinishedStage | None, stored: Path | None
) -> TeacherSource | None:
    """Return the source of a training's teacher; stored outputs are put around the training set of its data."""
    if not training.is_taught:
        return None
    if teacher is None:
        return training.teacher()
    if stored is None:
        return training.teacher(teacher.network())
    # Beneath the others: it looks at the data set itself.
    data.wrap(partial(StoredOutputs, path=stored, teacher=teacher.network()), innermost=True)
    return Stored()


def _path_of_outputs(training: Training, data: Data, teacher: FinishedStage, stages: Path) -> Path:
    """Name the folder by all that its content depends on, so that variants with the same needs share it."""
    content = {
        "teacher": teacher.folder.identity(),
        "data": training.identity_of(data),
        "layers": DistillationObjective(training.losses()).teacher_layers,
        "seed": _seed_of_outputs(training, data),
        **{key: value for key, value in (training.stored_outputs or {}).items() if key != "batch_size"},
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    return stages / f"outputs-{digest[:12]}"


def _seed_of_outputs(training: Training, data: Data) -> int:
    """Return the seed of the augmentation; the same for all trainings where there is none."""
    return training.seed if data.augmented else 0


class _Fit(NamedTuple):
    """What came of the fit.

    Attributes:
        seconds: That it took, over all attempts.
        storing: Seconds that storing the teacher's outputs took before it; None of a live teacher.
        teacher: The source of the teacher's outputs.
        losses: What they have learnt.
        first: The losses' temperatures at the first step, by loss.
        last: Those at the last step.
        trainer: That fitted.
    """

    seconds: float = 0.0
    storing: float | None = None
    teacher: TeacherSource | None = None
    losses: Mapping[str, Tensor] = {}
    first: Mapping[str, float] = {}
    last: Mapping[str, float] = {}
    trainer: Trainer | None = None


class FirstTemperatures(Callback):
    """Remembers the losses' temperatures at the first step, also after a resume."""

    def __init__(self) -> None:
        self.temperatures: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        objective = find_objective(pl_module)
        if trainer.global_step == 0 and not self.temperatures and objective is not None:
            self.temperatures = objective.temperatures()  # schedules, which come before this callback, have set them

    def state_dict(self) -> dict[str, Any]:
        return dict(self.temperatures)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.temperatures = state_dict


def _fit(
    training: Training,
    network: nn.Module,
    data: Data,
    teacher: TeacherSource | None,
    folder: StageFolder,
    logger: Logger | None,
    callbacks: list[Callback],
) -> _Fit:
    """Fit the network, from its last checkpoint where there is one."""
    timer, first, own = Timer(), FirstTemperatures(), training.callbacks()
    has_monitor = any(isinstance(callback, LearningRateMonitor) for callback in own)
    rates = [] if logger is None or has_monitor else [LearningRateMonitor("step")]
    checkpoints = ModelCheckpoint(
        dirpath=folder.path,
        filename=LAST.removesuffix(".ckpt"),
        every_n_epochs=_epochs_between_checkpoints(data),
        save_on_train_epoch_end=True,  # between epochs a resumed training is bitwise the uninterrupted one
        enable_version_counter=False,
    )
    module = training.module(network, teacher)
    trainer = training.trainer(
        callbacks=[*own, *callbacks, *rates, timer, first, checkpoints, StageMark(folder.fingerprint)],
        logger=logger or False,
        default_root_dir=folder.path,
    )
    if isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    try:
        trainer.fit(module, datamodule=data.module, ckpt_path=folder.last_checkpoint(), weights_only=True)
    except SIGTERMException:
        raise
    except SystemExit as error:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from error
    if trainer.received_sigterm:  # after the last batch: the Trainer has not told
        raise SIGTERMException
    module.cpu()
    objective = module.objective
    return _Fit(
        timer.time_elapsed("train"),
        teacher=teacher,
        losses=objective.state_dict(),
        first=first.temperatures,
        last=objective.temperatures(),
        trainer=trainer,
    )


def _test(
    training: Training,
    network: nn.Module,
    data: Data,
    fit: _Fit,
    judge: Answers | None,
    beside: FinishedStage | None,
) -> tuple[Result, Tensor]:
    """Judge the network on the validation split and, this once, on the test split.

    Returns:
        The result, and its answers on the validation split.
    """
    data.setup("validate")
    data.setup("test")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.eval().to(device)

    def answering(batch: Batch) -> Outputs:
        return run(network, batch.args, batch.kwargs)

    validation, tested = (
        evaluate(training.task, answering, loader, answers, device)
        for loader, answers in zip((data.val_dataloader(), data.test_dataloader()), judge or (None, None), strict=True)
    )
    figures = {"train_seconds": fit.seconds, "params": float(parameters(network)), "size_mb": size_mb(network)}
    figures |= {"store_seconds": fit.storing} if fit.storing is not None else {}
    if beside is not None:
        figures |= _beside(training.task, answering, beside.network(), data, device)
    last = next(iter(fit.last.values()), None)
    if fit.teacher is not None and last is not None:
        entropy = teacher_entropy(training.task, fit.teacher, data.train_dataloader(), last, device)
        figures |= {"teacher_entropy": entropy} if entropy is not None else {}
    network.cpu()
    temperature = _range(fit.first, fit.last)
    result = result_of(training, training.task, tested, validation, figures=figures, temperature=temperature)
    return result, validation.answers


def _beside(
    task: Task, answering: Callable[[Batch], Outputs], teacher: nn.Module, data: Data, device: torch.device
) -> dict[str, float]:
    teacher = teacher.eval().to(device)
    return beside_teacher(
        task, answering, lambda batch: run(teacher, batch.args, batch.kwargs), data.test_dataloader(), device
    )


def _range(first: Mapping[str, float], last: Mapping[str, float]) -> float | tuple[float, float] | None:
    """Return the first loss's temperature; where it was scheduled or learnt, that at the first and the last step."""
    for name, temperature in last.items():
        begun = first.get(name, temperature)
        return temperature if begun == temperature else (begun, temperature)
    return None


def _architecture(training: Training, data: Data, teacher: FinishedStage | None) -> nn.Module:
    network, objective = training.network(), DistillationObjective(training.losses())
    if training.is_taught and objective.changing_losses:
        data.setup("fit")
        batches = loader_batches(data.train_dataloader())
        source = Teacher(teacher.network()) if teacher is not None else training.teacher()
        dry_run(batches, network, source, objective, training.task)
    specs = [callback.spec for callback in training.callbacks() if isinstance(callback, QuantizationAwareTraining)]
    if specs:
        prepare(network, specs[0])
    elif training.quantization is not None:
        training.quantization.prepare(network)
    return network


def _epochs_between_checkpoints(data: Data) -> int:
    try:
        steps = len(data.train_dataloader())
    except TypeError:  # an iterable data set has no length
        return 1
    return math.ceil(_STEPS_BETWEEN_CHECKPOINTS / max(steps, 1))
