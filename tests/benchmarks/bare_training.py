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
from lightning.pytorch import LightningDataModule, seed_everything
from omegaconf import OmegaConf
from torch import Tensor, nn

from kd_lightning.callbacks import HyperparameterSchedule
from kd_lightning.cli import conf_dir, pipeline
from kd_lightning.data.loaders import View
from kd_lightning.first_batches import loader_batches
from kd_lightning.objective import DistillationObjective
from kd_lightning.outputs import Outputs, Samples, run
from kd_lightning.pipeline.recipe import Recipe
from kd_lightning.pipeline.stage import run_stage
from kd_lightning.pipeline.stage_folder import Finished
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
def remember(data: LightningDataModule, teacher: nn.Module) -> Remembered:
    """Run the teacher once over the training images, in batches of the training's size, on which rounding depends."""
    data.prepare_data()
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
        recipes: Of all students, by label, with seed 0; those of variants have the role ``distilled``.
        teachers: The finished teacher, and what it calls assistants, by label.
        data: With the distilled student's training images.
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
        self.teachers: dict[str, Finished] = {}
        for recipe in (job.teacher, *job.assistants):
            taught_by = self.teachers.get(recipe.taught_by or "")
            self.teachers[recipe.label] = run_stage(recipe, taught_by, job.work_dir, lambda run_id, known: None, [])
        self.recipes = {recipe.label: recipe for recipe in job.students}
        distilled = next(recipe for recipe in job.students if recipe.role == "distilled")
        self.data = distilled.training_data()
        self._remembered: dict[tuple[str, bool], Remembered] = {}

    def train(self, recipe: Recipe, steps: int | None = None) -> nn.Module:
        """Return the network that the pipeline's stage of this recipe ends with; ``steps`` in place of its own."""
        return train(recipe, self.teachers[recipe.taught_by or "teacher"].network, self.remembered(recipe), steps)

    def remembered(self, recipe: Recipe) -> "Remembered":
        teacher, labelled_alone = recipe.taught_by or "teacher", recipe.role == "student"
        if (teacher, labelled_alone) not in self._remembered:
            outputs = remember(recipe.training_data(), self.teachers[teacher].network())
            self._remembered[teacher, labelled_alone] = outputs
        return self._remembered[teacher, labelled_alone]

    def entropy(self, recipe: Recipe, temperature: float) -> float:
        """Return the teacher's relative entropy, on as many of the training images as the pipeline takes."""
        logits = self.remembered(recipe).teacher.logits
        batches = _batches(recipe.training_data().train_dataloader())
        few = -(-min(len(logits), 2000) // self.data.batch_size)
        return float(relative_entropy(logits[torch.cat([next(batches) for _ in range(few)])], temperature))


def train(
    recipe: Recipe, teacher_network: Callable[[], nn.Module], remembered: Remembered, steps: int | None = None
) -> nn.Module:
    """Return the network that the pipeline's stage of this recipe would end with; ``steps`` in place of its own."""
    seed_everything(recipe.seed, verbose=False)
    network = recipe.network()
    teacher = Teacher(teacher_network())  # here, as it draws from the generator that projectors are drawn from, too
    data = recipe.training_data()
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    objective = DistillationObjective(recipe.losses())
    dry_run(loader_batches(loader), network, teacher, objective, Classification())
    steps = steps or int(recipe.config["trainer"]["max_steps"])
    flat = _flattened([*network.parameters(), *objective.parameters()])
    optimizer = recipe.optimizer([flat])
    scheduler = None
    if recipe.scheduler is not None:
        length = {"total_steps", "T_max"} & signature(recipe.scheduler).parameters.keys()
        scheduler = recipe.scheduler(optimizer, **dict.fromkeys(length, steps))
    schedules = [callback for callback in recipe.callbacks() if isinstance(callback, HyperparameterSchedule)]
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


def validation_accuracy(network: nn.Module, data: LightningDataModule) -> float:
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
def predict(network: nn.Module, data: LightningDataModule, split: str) -> tuple[Tensor, Tensor]:
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
