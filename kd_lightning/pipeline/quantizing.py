"""The stage ``quantized``: fewer bits, without and with training for them, and the control in float."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.configuration.arguments import explained
from kd_lightning.export.metadata import check_normalisation
from kd_lightning.objective import DistillationObjective, find_objective
from kd_lightning.pipeline.recipe import Quantizing, Recipe
from kd_lightning.pipeline.serving import described
from kd_lightning.pipeline.stage_folder import Finished
from kd_lightning.quantization import QuantizationSpec, calibrate, exportable, prepare
from kd_lightning.tasks import Classification

Run = Callable[[Recipe], Finished]


@dataclass(frozen=True, kw_only=True)
class QuantizedStage:
    """Quantises the teacher, the student alone and the distilled student.

    The distilled student is quantised without training (PTQ) and with (QAT): it goes on from its weights, with its
    losses and its teacher, a small learning rate that falls to zero, and fake quantisation from the first step. Beside
    it, the same further steps in float, since these alone may be what helps.

    Attributes:
        spec: Of all but the following.
        weights_only: Of a further post-training quantisation of the distilled student; None for none.
        steps: Of the training, further ones.
        learning_rate: As a share of that of the students.
        freeze_observers: Share of the steps after which the ranges of activations stay.
        freeze_batch_norm: Share of the steps after which the statistics of batch norm stay.
        calibration_images: How many training images find the ranges where there is no training.
    """

    spec: QuantizationSpec = field(default_factory=QuantizationSpec)
    weights_only: QuantizationSpec | None = None
    steps: int = 150
    learning_rate: float = 0.1
    freeze_observers: float = 0.75
    freeze_batch_norm: float = 0.75
    calibration_images: int = 256

    def __post_init__(self) -> None:
        for name in ("steps", "calibration_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected quantized.{name} of 1 or more, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"expected quantized.learning_rate > 0, a share, got {self.learning_rate}")

    def count(self, recipes: Iterable[Recipe]) -> int:
        """Return how many stages there will be for these recipes."""
        seeds = {recipe.seed for recipe in recipes if recipe.role == "distilled"}
        each = 3 + (self.weights_only is not None)
        return sum(recipe.role in ("teacher", "student") for recipe in recipes) + each * len(seeds)

    def run(self, finished: Sequence[Finished], run: Run) -> list[Finished]:
        """Quantise what is finished.

        Args:
            finished: All stages so far.
            run: Runs one recipe.
        """
        chosen, done = best_distilled(finished), list[Finished]()
        for stage in finished:
            if stage.recipe.role in ("teacher", "student"):
                done.append(run(self._post_training(stage, self.spec)))
            elif stage.result.label == chosen:
                continued = run(self._continued(stage))
                made = [self._post_training(stage, self.spec), self._aware(stage, continued)]
                if self.weights_only is not None:
                    made.append(self._post_training(stage, self.weights_only))
                done += [continued, *map(run, made)]
        return done

    def _post_training(self, source: Finished, spec: QuantizationSpec) -> Recipe:
        short, long = names_of(spec)
        role = source.recipe.role
        return replace(
            source.recipe,
            role="quantized",
            label=f"{role} PTQ {long}" if role == "distilled" and spec == self.spec else f"{role} {long}",
            method=f"{role}-ptq-{short}",
            config=_config(source, {"spec": asdict(spec), "calibration_images": self.calibration_images}),
            network=source.network,
            checkpoint=None,
            quantizing=Quantizing(
                source=source, in_float=source, spec=spec, training=False, images=self.calibration_images
            ),
        )

    def _continued(self, source: Finished) -> Recipe:
        return replace(
            source.recipe,
            role="continued",
            label="continued",
            config=_config(source, {"steps": self.steps, "learning_rate": self.learning_rate}),
            network=partial(_to_train, source),
            callbacks=lambda: [*source.recipe.callbacks(), _LossesGoOn(source)],
            optimizer=partial(_scaled, source.recipe.optimizer, self.learning_rate),
            scheduler=CosineAnnealingLR,
            trainer=partial(source.recipe.trainer, max_steps=self.steps, max_epochs=-1),
            members=(),  # the source has their networks
        )

    def _aware(self, source: Finished, continued: Finished) -> Recipe:
        """Make the recipe of quantisation-aware training: that of the control in float, and the callback."""
        short, long = names_of(self.spec)
        freezing = {"freeze_observers": self.freeze_observers, "freeze_batch_norm": self.freeze_batch_norm}
        settings = {"steps": self.steps, "learning_rate": self.learning_rate, **freezing}

        def callbacks() -> list[Callback]:
            aware = QuantizationAwareTraining(self.spec, student="student", **freezing)
            return [*continued.recipe.callbacks(), aware]

        return replace(
            continued.recipe,
            role="quantized",
            label=f"distilled QAT {long}",
            method=f"distilled-qat-{short}",
            config=_config(source, {"spec": asdict(self.spec), **settings}),
            callbacks=callbacks,
            quantizing=Quantizing(source=source, in_float=continued, spec=self.spec, training=True, images=0),
        )


def check_can_be_quantized(recipes: Iterable[Recipe], settings: QuantizedStage) -> None:
    """Quantise each kind of network once, untrained, so that nothing fails after the training that could have before.

    Raises:
        ValueError: For a network without a layer to quantise, a layer name that it does not have, bits for which no
            runtime has operators; for a mean and a std of the data that a file's inputs cannot have; for losses that
            change the student's architecture.
    """
    checked = []
    for recipe in recipes:
        changing = list(DistillationObjective(recipe.losses()).changing_losses)
        if recipe.role == "distilled" and changing:
            raise ValueError(
                f"quantized: losses {changing} of {recipe.name} change the student's architecture, so it cannot go on "
                "training as it was trained: leave quantized out of the stages"
            )
        if recipe.role not in ("teacher", "student", "distilled") or recipe.config.get("network") in checked:
            continue
        checked.append(recipe.config.get("network"))
        data = recipe.training_data()
        data.prepare_data()
        data.setup("fit")
        batch, said = next(iter(data.train_dataloader())), described(data)
        for name in ("spec", "weights_only"):
            spec = getattr(settings, name)
            if spec is not None:
                try:
                    exportable(calibrate(prepare(recipe.network(), spec), [batch]))
                    check_normalisation(said["mean"], said["std"], Classification().read(batch))
                except ValueError as error:
                    cannot = ValueError(f"{recipe.name} cannot be quantized: {error}")
                    raise explained(cannot, asdict(spec), f"quantized.{name}") from error


def best_distilled(finished: Sequence[Finished]) -> str | None:
    """Return the label of the distilled model that is the best on the validation images, over its seeds."""
    accuracies: dict[str, list[float]] = {}
    for stage in finished:
        if stage.recipe.role == "distilled":
            accuracies.setdefault(stage.result.label, []).append(stage.result.val_accuracy)
    return max(accuracies, key=lambda label: float(np.mean(accuracies[label])), default=None)


def names_of(spec: QuantizationSpec) -> tuple[str, str]:
    """Name bits for a run and for a reader: ``int8``; ``w4`` and ``4-bit weights``."""
    weights, activations = spec.weight_bits, spec.activation_bits
    if weights == activations == 8:
        return "int8", "int8"
    if activations is None:
        return f"w{weights}", f"{weights}-bit weights"
    return f"w{weights}a{activations}", f"{weights}-bit weights, {activations}-bit activations"


def _config(source: Finished, settings: dict[str, Any]) -> dict[str, Any]:
    return {**source.recipe.config, "quantized": {**settings, "source": source.folder.identity()}}


def _to_train(source: Finished) -> nn.Module:
    return source.network().train()  # Trainer.fit leaves modes as they are


class _LossesGoOn(Callback):
    """Begin with what the losses have learnt: a new projector would pull the student's features elsewhere."""

    def __init__(self, source: Finished) -> None:
        self.source = source

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            pl_module.configure_model()  # makes the projectors; ahead of a checkpoint of these very steps
            objective = find_objective(pl_module)
            assert objective is not None
            objective.load_state_dict(self.source.losses())


def _scaled(optimizer: Callable[..., Optimizer], factor: float, parameters: Any) -> Optimizer:
    made = optimizer(parameters)
    for group in made.param_groups:
        group["lr"] *= factor
    return made
