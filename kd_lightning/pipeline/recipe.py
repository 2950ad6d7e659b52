"""What one training is made of."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import nn

from kd_lightning.configuration.arguments import errors_at
from kd_lightning.data import WithIds
from kd_lightning.losses.base import DistillationLoss
from kd_lightning.pipeline.results import Role
from kd_lightning.quantization import QuantizationSpec
from kd_lightning.teachers import Teacher, TeacherSource

if TYPE_CHECKING:
    from kd_lightning.pipeline.stage_folder import Finished


def put_around(data: LightningDataModule, wrap: Callable[[Any], Any]) -> None:
    """Put something around the training set of a data module, whose loader goes through ``around``."""
    data.around = [*getattr(data, "around", ()), wrap]  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class Quantizing:
    """What a network is quantised to, and where it comes from.

    Attributes:
        source: The stage whose weights it has, or begins with.
        in_float: The stage whose predictions it is compared with: the source, or the same further steps in float.
        spec: Bits, ranges and layers.
        training: Whether it is trained fake-quantised; its ranges alone are found without.
        images: How many training images find the ranges.
    """

    source: "Finished"
    in_float: "Finished"
    spec: QuantizationSpec
    training: bool
    images: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Factories for one training, since each stage and seed starts from fresh objects.

    Attributes:
        role: ``teacher``, ``assistant`` (between teacher and student), ``student`` (alone), ``control`` (on the
            teacher's hard labels), ``distilled``, ``continued`` (that one with further steps) or ``quantized``.
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
        check_teacher: Refuse a teacher at chance.
        taught_by: Label of the model that teaches this one; None where its source needs no other model, and for an
            assistant that learns from the labels alone.
        members: Labels of further models that teach it: of an ensemble.
        source: Makes the teacher's source, given the networks of ``taught_by`` and ``members``.
        stored_outputs: ``views`` and ``format`` of the teacher's outputs, where these are stored before the training;
            None for a live teacher.
        quantizing: Of a quantised network; None for one in float.
        paths: Where each part stands in the configuration, for errors: ``network`` in ``student.network``.
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
    check_teacher: bool = True
    taught_by: str | None = "teacher"
    members: Sequence[str] = ()
    source: Callable[..., TeacherSource] = Teacher
    stored_outputs: Mapping[str, Any] | None = None
    quantizing: Quantizing | None = None
    paths: Mapping[str, str] = field(default_factory=dict)

    def errors(self, *parts: str) -> AbstractContextManager[None]:
        """Let whatever goes wrong name the paths of parts, where these are known."""
        paths = [self.paths[part] for part in parts if part in self.paths]
        return errors_at(*paths, arguments=self.config.get(parts[0]) if len(parts) == 1 else None)

    @property
    def name(self) -> str:
        """As a person reads it: ``distilled-kd-T4-s0``."""
        own = f"{self.role}-{self.label}" if self.role == "assistant" else self.role
        return f"{own}-{self.method}-s{self.seed}"

    def training_data(self) -> LightningDataModule:
        """Make the data module; its batches say which samples they hold where a loss remembers samples."""
        # An assistant learns from the images that the teacher has learnt from; quantised networks from their source's.
        role = self.quantizing.source.recipe.role if self.quantizing is not None else self.role
        data = self.data(role={"assistant": "teacher", "continued": "distilled"}.get(role, role), seed=self.seed)
        if any(loss.needs_sample_ids for loss in self.losses().values()):
            put_around(data, WithIds)
        return data

    @property
    def is_taught(self) -> bool:
        if self.quantizing is not None and not self.quantizing.training:
            return False
        if self.role == "assistant":
            return self.taught_by is not None
        return self.role not in ("teacher", "student")

    @property
    def needs_teacher(self) -> bool:
        """Whether another model has to be finished before."""
        return self.is_taught and self.taught_by is not None
