"""A student's training without a Trainer, for searches of hundreds: three times as fast, and bitwise the pipeline's.

The teacher's outputs are computed once and remembered, as the images of Fashion-MNIST are not augmented; batches are
indexed out of one tensor; nothing is logged or saved. What is left is a plain loop around the network, the losses, the
optimizer and the scheduler that the pipeline makes. tests/integration/test_method_search.py compares the weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature

import hydra
import torch
from lightning.pytorch import seed_everything
from omegaconf import OmegaConf
from torch import Tensor, nn

from kd_lightning.callbacks import HyperparameterSchedule
from kd_lightning.cli import conf_dir
from kd_lightning.configuration.assembling import pipeline
from kd_lightning.data.contract import Data
from kd_lightning.data.loaders import View
from kd_lightning.first_batches import loader_batches
from kd_lightning.objective import DistillationObjective
from kd_lightning.outputs import Outputs, Samples, run
from kd_lightning.pipeline.folder import FinishedStage
from kd_lightning.pipeline.run import run_stage
from kd_lightning.pipeline.training import Training
from kd_lightning.preflight import dry_run
from kd_lightning.tasks import Classification
from kd_lightning.tasks.base import relative_entropy
from kd_lightning.teachers import Teacher

LAYERS = ("block3", "block4", "hidden")
"""Of the teacher, whose outputs are remembered."""


@dataclass(frozen=True)
class Remembered:
    """The training images of a data module, and what the teacher says of each."""

    images: Tensor
    target: Tensor
    teacher: Outputs

    def batch(self, ids: Tensor, layers: tuple[str, ...]) -> tuple[Tensor, Tensor, Outputs]:
        features = {name: self.teacher.features[name][ids] for name in layers}
        return self.images[ids], self.target[ids], Outputs(self.teacher.logits[ids], features)


@torch.no_grad()
def remember(data: Data, teacher: nn.Module) -> Remembered:
    """Run the teacher once over the training images, in batches of the training's size, on which rounding depends."""
    data.setup("fit")
    dataset = data.training_set()
    assert dataset.augment is None, "augmented images are others in each epoch"
    images, target = dataset.__getitems__(range(len(dataset)))
    parts = [run(teacher.eval(), [part], {}, LAYERS) for part in images.split(data.batch_size)]
    features = {name: torch.cat([part.features[name] for part in parts]) for name in LAYERS}
    return Remembered(images, target, Outputs(torch.cat([part.logits for part in parts]), features))


class Job:
    """An experiment of Fashion-MNIST: its variants and its teachers, which are trained where they are not there yet.

    Attributes:
        trainings: Of all students, by label, with seed 0; those of variants have the role ``distilled``.
        teachers: The finished teacher, and what it calls assistants, by label.
        data: With the distilled student's training images.
        task: Says what a good answer is.
    """

    def __init__(self, experiment: str | None, overrides: Sequence[str] = ()) -> None:
        given = [f"experiment=fashion_mnist/{experiment}"] if experiment is not None else []
        given += [*overrides, "seeds=[0]", "logger=null"]
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            config = hydra.compose("config", given)
            stages = [stage for stage in config.stages if stage not in ("quantized", "verdict")]
            job = pipeline(OmegaConf.merge(config, {"stages": stages}), overrides=given)
        assert job.teacher is not None
        self.reference = job.reference
        self.teachers: dict[str, FinishedStage] = {}
        for training in (job.teacher, *job.assistants):
            taught_by = self.teachers.get(training.taught_by or "")
            self.teachers[training.label] = run_stage(training, taught_by, job.work_dir, lambda folder: None, [])
        self.trainings = {training.label: training for training in job.students}
        distilled = next(training for training in job.students if training.role == "distilled")
        self.data = distilled.make_data()
        for split in ("fit", "validate", "test"):
            self.data.setup(split)
        self.task = distilled.task
        self._remembered: dict[tuple[str, bool], Remembered] = {}

    def train(self, training: Training, steps: int | None = None) -> nn.Module:
        """Return the network that the pipeline's stage of this training ends with; ``steps`` in place of its own."""
        return train(training, self.teachers[training.taught_by or "teacher"].network, self.remembered(training), steps)

    def remembered(self, training: Training) -> "Remembered":
        teacher, labelled_alone = training.taught_by or "teacher", training.role == "student"
        if (teacher, labelled_alone) not in self._remembered:
            outputs = remember(training.make_data(), self.teachers[teacher].network())
            self._remembered[teacher, labelled_alone] = outputs
        return self._remembered[teacher, labelled_alone]

    def entropy(self, training: Training, temperature: float) -> float:
        """Return the teacher's relative entropy, on as many of the training images as the pipeline takes."""
        logits = self.remembered(training).teacher.logits
        batches = _batches(training.make_data().train_dataloader())
        few = -(-min(len(logits), 2000) // self.data.batch_size)
        return float(relative_entropy(logits[torch.cat([next(batches) for _ in range(few)])], temperature))


def train(
    training: Training, teacher_network: Callable[[], nn.Module], remembered: Remembered, steps: int | None = None
) -> nn.Module:
    """Return the network that the pipeline's stage of this training would end with; ``steps`` in place of its own."""
    seed_everything(training.seed, verbose=False)
    network = training.network()
    teacher = Teacher(teacher_network())  # here, as it draws from the generator that projectors are drawn from, too
    data = training.make_data()
    data.setup("fit")
    loader = data.train_dataloader()
    objective = DistillationObjective(training.losses())
    dry_run(loader_batches(loader), network, teacher, objective, Classification())
    steps = steps or int(training.config["trainer"]["max_steps"])
    flat = _flattened([*network.parameters(), *objective.parameters()])
    optimizer = training.optimizer([flat])
    scheduler = None
    if training.scheduler is not None:
        length = {"total_steps", "T_max"} & signature(training.scheduler).parameters.keys()
        scheduler = training.scheduler(optimizer, **dict.fromkeys(length, steps))
    schedules = [callback for callback in training.callbacks() if isinstance(callback, HyperparameterSchedule)]
    network.train()
    for step, ids in zip(range(steps), _batches(loader), strict=False):
        for schedule in schedules:
            _, name, attribute = schedule.path.split(".")
            setattr(objective.losses[name], attribute, schedule.schedule(step / steps))
        images, target, of_teacher = remembered.batch(ids, objective.teacher_layers)
        student = run(network, [images], {}, objective.student_layers)
        student = student._replace(samples=Samples(ids, len(remembered.target)))
        total, _ = objective(student, of_teacher if objective.needs_teacher else None, target)
        flat.grad.zero_()
        total.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return network


def validation_accuracy(network: nn.Module, data: Data) -> float:
    predictions, target = predict(network, data, "validation")
    return float((predictions == target).float().mean())


def _flattened(parameters: list[nn.Parameter]) -> nn.Parameter:
    """Put all parameters into one: Adam computes the same element by element, in a tenth of the calls."""
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, own, gradient in zip(parameters, flat.detach().split(sizes), flat.grad.split(sizes), strict=True):
        parameter.data, parameter.grad = own.view_as(parameter), gradient.view_as(parameter)
    return flat


@torch.inference_mode()
def predict(network: nn.Module, data: Data, split: str) -> tuple[Tensor, Tensor]:
    """Return the predictions and the labels of the split ``validation`` or ``test``."""
    loader = data.val_dataloader() if split == "validation" else data.test_dataloader()
    pairs = [(network.eval()(images).argmax(-1), target) for images, target in loader]
    return torch.cat([predictions for predictions, _ in pairs]), torch.cat([target for _, target in pairs])


def _batches(loader: torch.utils.data.DataLoader) -> Iterator[Tensor]:
    """Yield the samples of each batch, epoch after epoch."""
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        order = torch.tensor([key.sample if isinstance(key, View) else key for key in loader.sampler])
        yield from order.split(loader.batch_size)
        epoch += 1
