"""The stage ``quantized``: fewer bits, without and with training for them, and the control in float."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.configuration.arguments import explained
from kd_lightning.data.contract import Data
from kd_lightning.evaluation import evaluate
from kd_lightning.export import export, integer_operators
from kd_lightning.export.batches import part
from kd_lightning.export.metadata import check_normalisation
from kd_lightning.objective import DistillationObjective, find_objective
from kd_lightning.pipeline.folder import FinishedStage, held
from kd_lightning.pipeline.measure import OpenFile
from kd_lightning.pipeline.run import result_of
from kd_lightning.pipeline.training import Answers, Training
from kd_lightning.quantization import QuantizationSpec, calibrate, exportable, prepare, quantized_layers
from kd_lightning.records import Quantized, Result, best_on_validation
from kd_lightning.tasks import Task

Run = Callable[[Training], FinishedStage]

_EXAMPLES, _LEAST = 256, 0.5


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How one network is quantised, and what the file that serves it is compared with.

    Attributes:
        source: Label of the model whose weights it has, or begins with.
        spec: Bits, ranges and layers.
        trained: Whether it is trained fake-quantised; its ranges alone are found without.
        samples: How many training samples find the ranges.
        task: Says what a good answer is, and how far answers agree.
        in_float: What the network in float answers on the test split, (N, ...): the source, or the one with the same
            further steps.
    """

    source: str
    spec: QuantizationSpec
    trained: bool
    samples: int
    task: Task
    in_float: NDArray[Any]

    def prepare(self, network: nn.Module) -> nn.Module:
        return prepare(network, self.spec)

    def calibrate(self, network: nn.Module, data: Data) -> None:
        batches = math.ceil(self.samples / (data.batch_size or 1))
        calibrate(self.prepare(network), data.train_dataloader(), batches, self.task)

    def serve(self, result: Result, network: nn.Module, data: Data, file: Path, teacher: Answers | None) -> Result:
        """Export a quantised network, and let the file answer.

        Args:
            result: Of the fake-quantised network.
            network: In eval mode, on the CPU.
            data: Set up for test and validation, whose samples the file sees.
            file: To be written.
            teacher: Its answers, where models are judged by them.
        """
        precision = "int4" if self.spec.weight_bits <= 4 else "int8"
        # What is less than equal is stated in the verdict, after all the training: refused is what is wrong altogether.
        _export(network, self.task, data, file, precision)
        answering = OpenFile(file)
        validation, tested = (
            evaluate(self.task, answering, loader, answers)
            for loader, answers in zip(
                (data.val_dataloader(), data.test_dataloader()), teacher or (None, None), strict=True
            )
        )
        layers = quantized_layers(network)
        return result_of(
            result,
            self.task,
            tested,
            validation,
            figures={
                **result.figures,
                "file_mb": file.stat().st_size / 1e6,
                "quantized_layers": sum(layer.weight_bits < 32 for layer in layers),
                "integer_operators": sum(integer_operators(file).integer.values()),
                "agreement_fp32": self._agreement(tested.answers, self.in_float),
                "agreement_file": self._agreement(tested.answers, result.answers),
            },
            temperature=result.temperature,
            quantized=Quantized(
                source=self.source,
                training=self.trained,
                weight_bits=self.spec.weight_bits,
                activation_bits=self.spec.activation_bits,
                float_layers=tuple(layer.name for layer in layers if layer.weight_bits == 32),
                mismatch=self.spec.mismatch(),
            ),
        )

    def _agreement(self, answers: Tensor, other: NDArray[Any]) -> float:
        return float(self.task.agreement(answers, torch.from_numpy(other)).double().mean())


@dataclass(frozen=True, kw_only=True)
class QuantizationPlan:
    """Quantises the teacher, the student alone and the distilled student.

    The distilled student is quantised without training (PTQ) and with (QAT): it goes on from its weights, with its
    losses and its teacher, a small learning rate that falls to zero, and fake quantisation from the first step. Beside
    it, the same further steps in float, since these alone may be what helps.

    Attributes:
        spec: Bits, ranges and layers of all but the following.
        weights_only: Those of a further post-training quantisation of the distilled student; None for none.
        steps: Number of further steps of the distilled student.
        learning_rate: As a share of that of the students.
        freeze_observers: Share of the steps after which the ranges of activations stay.
        freeze_batch_norm: Share of the steps after which the statistics of batch norm stay.
        calibration_samples: How many training samples find the ranges where there is no training.
    """

    spec: QuantizationSpec = field(default_factory=QuantizationSpec)
    weights_only: QuantizationSpec | None = None
    steps: int = 150
    learning_rate: float = 0.1
    freeze_observers: float = 0.75
    freeze_batch_norm: float = 0.75
    calibration_samples: int = 256

    def __post_init__(self) -> None:
        for name in ("steps", "calibration_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected quantized.{name} of 1 or more, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"expected quantized.learning_rate > 0, a share, got {self.learning_rate}")

    def count(self, trainings: Iterable[Training]) -> int:
        """Return how many stages there will be for these trainings."""
        seeds = {training.seed for training in trainings if training.role == "distilled"}
        each = 3 + (self.weights_only is not None)
        return sum(training.role in ("teacher", "student") for training in trainings) + each * len(seeds)

    def run(self, finished: Sequence[FinishedStage], run: Run) -> list[FinishedStage]:
        """Quantise what is finished.

        Args:
            finished: All stages so far.
            run: Runs one training.
        """
        chosen, done = _best_distilled(finished), list[FinishedStage]()
        for stage in finished:
            if stage.training.role in ("teacher", "student"):
                done.append(run(self._post_training(stage, self.spec)))
            elif stage.result.label == chosen:
                continued = run(self._continued(stage))
                made = [self._post_training(stage, self.spec), self._aware(stage, continued)]
                if self.weights_only is not None:
                    made.append(self._post_training(stage, self.weights_only))
                done += [continued, *map(run, made)]
        return done

    def _post_training(self, source: FinishedStage, spec: QuantizationSpec) -> Training:
        short, long = names_of(spec)
        role = source.training.role
        return replace(
            source.training,
            role="quantized",
            data_of=source.training.data_of or role,
            label=f"{role} PTQ {long}" if role == "distilled" and spec == self.spec else f"{role} {long}",
            method=f"{role}-ptq-{short}",
            config=_config(source, {"spec": asdict(spec), "calibration_samples": self.calibration_samples}),
            network=source.network,
            checkpoint=None,
            quantization=self._quantization(source, source, spec, trained=False),
        )

    def _continued(self, source: FinishedStage) -> Training:
        training = source.training
        return replace(
            training,
            role="continued",
            data_of=training.data_of or training.role,
            label="continued",
            config=_config(source, {"steps": self.steps, "learning_rate": self.learning_rate}),
            network=lambda: source.network().train(),  # Trainer.fit leaves modes as they are
            callbacks=lambda: [*training.callbacks(), _LossesGoOn(source.losses)],
            optimizer=partial(_scaled, training.optimizer, self.learning_rate),
            scheduler=CosineAnnealingLR,
            trainer=partial(training.trainer, max_steps=self.steps, max_epochs=-1),
            members=(),  # the source has their networks
        )

    def _aware(self, source: FinishedStage, continued: FinishedStage) -> Training:
        """Return quantisation-aware training: that of the control in float, and the callback."""
        short, long = names_of(self.spec)
        freezing = {"freeze_observers": self.freeze_observers, "freeze_batch_norm": self.freeze_batch_norm}
        settings = {"steps": self.steps, "learning_rate": self.learning_rate, **freezing}

        def callbacks() -> list[Callback]:
            aware = QuantizationAwareTraining(self.spec, student="student", **freezing)
            return [*continued.training.callbacks(), aware]

        return replace(
            continued.training,
            role="quantized",
            label=f"distilled QAT {long}",
            method=f"distilled-qat-{short}",
            config=_config(source, {"spec": asdict(self.spec), **settings}),
            callbacks=callbacks,
            quantization=self._quantization(source, continued, self.spec, trained=True),
        )

    def _quantization(
        self, source: FinishedStage, in_float: FinishedStage, spec: QuantizationSpec, trained: bool
    ) -> Quantization:
        return Quantization(
            source=source.result.label,
            spec=spec,
            trained=trained,
            samples=self.calibration_samples,
            task=source.training.task,
            in_float=in_float.result.answers,
        )


def check_can_be_quantized(trainings: Iterable[Training], plan: QuantizationPlan) -> None:
    """Quantise each kind of network once, untrained, so that nothing fails after the training that could have before.

    Raises:
        ValueError: For a network without a layer to quantise, a layer name that it does not have, bits for which no
            runtime has operators; for a mean and a std of the data that a file's inputs cannot have; for losses that
            change the student's architecture.
    """
    checked = []
    for training in trainings:
        changing = list(DistillationObjective(training.losses()).changing_losses)
        if training.role == "distilled" and changing:
            raise ValueError(
                f"quantized: losses {changing} of {training.name} change the student's architecture, so it cannot go "
                "on training as it was trained: leave quantized out of the stages"
            )
        if training.role not in ("teacher", "student", "distilled") or training.config.get("network") in checked:
            continue
        checked.append(training.config.get("network"))
        data = training.make_data()
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        for name in ("spec", "weights_only"):
            spec = getattr(plan, name)
            if spec is not None:
                try:
                    exportable(calibrate(prepare(training.network(), spec), [batch], task=training.task))
                    check_normalisation(data.mean, data.std, training.task.read(batch))
                except ValueError as error:
                    cannot = ValueError(f"{training.name} cannot be quantized: {error}")
                    raise explained(cannot, asdict(spec), f"quantized.{name}") from error


def float_file(stage: FinishedStage, data: Data) -> Path:
    """Return a trained network's file in fp32, which is written where it is not there yet, or damaged."""
    with held(stage.folder.path, f"the stage {stage.training.name}"):
        if not stage.folder.has_file():
            data.setup("validate")
            _export(stage.network(), stage.training.task, data, stage.folder.file)
            stage.folder.record_file()
    return stage.folder.file


def names_of(spec: QuantizationSpec) -> tuple[str, str]:
    """Name bits for a run and for a reader: ``int8``; ``w4`` and ``4-bit weights``."""
    weights, activations = spec.weight_bits, spec.activation_bits
    if weights == activations == 8:
        return "int8", "int8"
    if activations is None:
        return f"w{weights}", f"{weights}-bit weights"
    return f"w{weights}a{activations}", f"{weights}-bit weights, {activations}-bit activations"


def _best_distilled(finished: Sequence[FinishedStage]) -> str | None:
    """Return the label of the distilled model that is the best on the validation split, over its seeds."""
    distilled = [stage for stage in finished if stage.training.role == "distilled"]
    if not distilled:
        return None
    return best_on_validation([stage.result for stage in distilled], distilled[0].training.task.headline)


def _export(network: nn.Module, task: Task, data: Data, file: Path, precision: str = "float32") -> None:
    """Write a network's file, compared with it on samples of the validation split."""
    batch = task.read(next(iter(data.val_dataloader())))
    some = part(batch, slice(_EXAMPLES))
    export(
        network,
        some.kwargs or some.args,
        file,
        precision=precision,
        task=task,
        classes=(data.class_names or ()) if task.gives_logits else (),
        mean=data.mean,
        std=data.std,
        least_agreement=_LEAST,
    )


def _config(source: FinishedStage, settings: dict[str, Any]) -> dict[str, Any]:
    return {**source.training.config, "quantized": {**settings, "source": source.folder.identity()}}


class _LossesGoOn(Callback):
    """Begin with what the losses have learnt: a new projector would pull the student's features elsewhere."""

    def __init__(self, learnt: Callable[[], Mapping[str, Tensor]]) -> None:
        self.learnt = learnt

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            pl_module.configure_model()  # makes the projectors; ahead of a checkpoint of these very steps
            objective = find_objective(pl_module)
            assert objective is not None
            objective.load_state_dict(self.learnt())


def _scaled(optimizer: Callable[..., Optimizer], factor: float, parameters: Any) -> Optimizer:
    made = optimizer(parameters)
    for group in made.param_groups:
        group["lr"] *= factor
    return made
