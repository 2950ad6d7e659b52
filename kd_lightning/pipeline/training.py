"""What one training is: its parts, whose outputs it learns from, and what its outcome depends on."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn

from kd_lightning.configuration.arguments import errors_at
from kd_lightning.data import WithIds
from kd_lightning.data.contract import Data, make_data
from kd_lightning.durable_files import sha256_of
from kd_lightning.losses.base import DistillationLoss
from kd_lightning.module import DistillationModule
from kd_lightning.objective import DistillationObjective
from kd_lightning.records import Result, Role
from kd_lightning.source_code import hashes_of, package_hash
from kd_lightning.tasks import Task
from kd_lightning.teachers import Stored, Teacher, TeacherSource


class Answers(NamedTuple):
    """What a model answers on the two splits that it is judged on; see :meth:`kd_lightning.tasks.Task.answers`."""

    validation: Tensor
    test: Tensor


class Quantizes(Protocol):
    """How a network is quantised; :class:`~kd_lightning.pipeline.quantize.Quantization`."""

    @property
    def trained(self) -> bool:
        """Whether it is trained fake-quantised; without, its ranges alone are found."""

    def prepare(self, network: nn.Module) -> nn.Module:
        """Make it one that fake-quantises, in place."""

    def calibrate(self, network: nn.Module, data: Data) -> None:
        """Prepare it, and find the ranges of its activations in training samples."""

    def serve(self, result: Result, network: nn.Module, data: Data, file: Path, teacher: Answers | None) -> Result:
        """Write the file that serves it, and return the result of that file.

        Args:
            result: Of the network.
            network: In eval mode, on the CPU.
            data: Set up for validation and test.
            file: To be written.
            teacher: Its answers, where models are judged by them.
        """


@dataclass(frozen=True, kw_only=True)
class Training:
    """Factories for one training, since each seed starts from fresh objects.

    Attributes:
        role: ``teacher``, ``assistant`` (between teacher and student), ``student`` (alone), ``control`` (on the
            teacher's hard labels), ``distilled``, ``continued`` (that one with further steps) or ``quantized``.
        label: The model's row in the verdict; runs of several seeds share it.
        method: What it is trained with, as a run's name has it, such as ``kd-T4``.
        seed: Of initialisation and data order.
        config: All that decides the outcome; fingerprinted, and logged as parameters.
        task: What a batch means, and what a good answer is.
        network: Makes the network to train.
        losses: Makes the losses, by name.
        data: Makes the data module, given ``role`` and ``seed`` if it takes them.
        trainer: Makes the Trainer, given ``callbacks``, ``logger`` and ``default_root_dir``.
        optimizer: See :class:`~kd_lightning.DistillationModule`.
        scheduler: Likewise.
        callbacks: Makes further callbacks.
        data_of: The role whose training data it gets; its own unless given.
        checkpoint: Finished weights: nothing is trained, the network is only tested. ``"pretrained"`` where it is made
            with them.
        check_teacher: Refuse a teacher at chance.
        taught_by: Label of the model that teaches this one; None where its teacher's source needs no other model, and
            for an assistant that learns from the labels alone.
        members: Labels of further models that teach it: of an ensemble.
        teacher: Makes the teacher's source, given the networks of ``taught_by`` and ``members``.
        stored_outputs: ``views``, ``format`` and ``batch_size`` of the teacher's outputs, where these are stored before
            the training; None for a live teacher.
        quantization: Of a quantised network; None for one in float.
        paths: Where each part stands in the configuration, for errors: ``network`` in ``student.network``.
    """

    role: Role
    label: str
    method: str
    seed: int
    config: Mapping[str, Any]
    task: Task
    network: Callable[[], nn.Module]
    losses: Callable[[], dict[str, DistillationLoss]]
    data: Callable[..., LightningDataModule]
    trainer: Callable[..., Trainer]
    optimizer: Callable[..., Any]
    scheduler: Callable[..., Any] | None = None
    callbacks: Callable[[], list[Callback]] = list
    data_of: Role | None = None
    checkpoint: Path | Literal["pretrained"] | None = None
    check_teacher: bool = True
    taught_by: str | None = "teacher"
    members: Sequence[str] = ()
    teacher: Callable[..., TeacherSource] = Teacher
    stored_outputs: Mapping[str, Any] | None = None
    quantization: Quantizes | None = None
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

    def make_data(self) -> Data:
        """Make the data module; its batches say which samples they hold where a loss or a callback remembers them."""
        data = make_data(self.data, self.data_of or self.role, self.seed)
        remembering = [*self.losses().values(), *self.callbacks()]
        if any(getattr(part, "needs_sample_ids", False) for part in remembering):
            data.wrap(WithIds)
        return data

    def module(
        self,
        network: nn.Module,
        teacher: TeacherSource | None,
        losses: Mapping[str, DistillationLoss] | None = None,
    ) -> DistillationModule:
        """Make the module that trains a network, with new losses unless some are given."""
        return DistillationModule(
            network,
            teacher,
            self.losses() if losses is None else losses,
            self.optimizer,
            self.scheduler,
            task=self.task,
            check_teacher=self.check_teacher,
        )

    @property
    def is_taught(self) -> bool:
        if self.quantization is not None and not self.quantization.trained:
            return False
        if self.role == "assistant":
            return self.taught_by is not None
        return self.role not in ("teacher", "student")

    @property
    def needs_teacher(self) -> bool:
        """Whether another model has to be finished before."""
        return self.is_taught and self.taught_by is not None

    @property
    def is_judged_by_teacher(self) -> bool:
        """Whether its scores are its agreement with the finished teacher, as test units have no labels."""
        return not self.task.labelled and self.role != "teacher"

    @property
    def is_beside_teacher(self) -> bool:
        """Whether its outputs are compared with those of the finished teacher, which is more than their answers."""
        return self.task.has_beside and self.role != "teacher"

    def code(self) -> dict[str, str]:
        """Hash the code that it runs; see :mod:`kd_lightning.source_code`."""
        makes = (type(self.task), self.network, self.losses, self.data, self.trainer, self.callbacks, self.teacher)
        return {"kd_lightning": package_hash(), **hashes_of(self.config, (*makes, self.optimizer, self.scheduler))}

    def identity_of(self, data: Data) -> Any:
        """Return what changes with the samples: the data module's word for it, or its configuration and code."""
        config = self.config.get("data")
        return data.fingerprint() or [config, hashes_of(config, (self.data,))]

    def fingerprint(self, data: Data, teacher: str | None, judge: str | None = None) -> str:
        """Hash all that decides the outcome: config, data, code, teacher, and the weights that it starts from.

        Args:
            data: Made by :meth:`make_data`.
            teacher: What identifies the finished model ``taught_by``, where there is one.
            judge: What identifies the finished teacher by whose answers it is judged, where test units have no labels,
                or with whose outputs its own are compared.
        """
        config, of_data = dict(self.config), data.fingerprint()
        if of_data is not None:
            # It speaks of this role's samples: the teacher's do not change with the number of the student's labels.
            config["data"] = of_data
        if "task" in config:
            config["task"] = {key: value for key, value in config["task"].items() if key not in self.task.shown}
        content = {
            "config": config,
            "code": self.code(),
            "teacher": teacher if self.needs_teacher else None,
            "judge": judge if self.is_judged_by_teacher or self.is_beside_teacher else None,
            "checkpoint": self._digest_of_weights(),
            "folder": _files_in(self.config.get("network")),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def _digest_of_weights(self) -> str | None:
        if not isinstance(self.checkpoint, str):
            return None if self.checkpoint is None else sha256_of(self.checkpoint)
        digest = hashlib.sha256()
        for name, value in self.network().state_dict().items():
            digest.update(name.encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


PRETRAINED: Literal["pretrained"] = "pretrained"
"""The ``checkpoint`` of a network that is made with its finished weights, such as one of a package or a hub."""


def taught_through(
    training: Training,
    source: Mapping[str, Any],
    make: Callable[..., Any],
    instantiate: Callable[[Mapping[str, Any]], Callable[..., TeacherSource]],
    taught_by: str,
    members: Sequence[str] = (),
) -> Training:
    """Give a training its teacher's source, with what the source takes and its configuration does not give.

    That is the network of the model ``taught_by`` for a ``network``, those of the members for ``teachers``, and what
    the losses read of the teacher for ``layers``.

    Args:
        training: Of a student that is taught.
        source: Configuration, as in ``conf/teachers/``.
        make: Its target.
        instantiate: Turns a configuration into its target, bound to these arguments.
        taught_by: Label of a model.
        members: Labels of the models in an ensemble.

    Raises:
        ValueError: For a ``taught_by`` that the source has no use for, and checkpoints that are not there.
    """
    takes = signature(make).parameters
    one = "network" in takes and source.get("network") is None
    labels = [taught_by] if one else list(members)
    if taught_by != "teacher" and not one:
        raise ValueError(
            f"taught_by={taught_by} names one network, which {make.__name__} does not take: choose teachers=live or "
            "teachers=runtime, or leave taught_by out"
        )

    def made(*networks: nn.Module) -> TeacherSource:
        given: dict[str, Any] = {}
        if labels:
            given = {"network": networks[0]} if one else {"teachers": networks}
        if "layers" in takes and "layers" not in source:
            given["layers"] = DistillationObjective(training.losses()).teacher_layers
        return instantiate({key: value for key, value in source.items() if key not in given})(**given)

    return replace(
        training,
        method=training.method if make is Teacher else f"{training.method}-{make.__name__}",
        config={**training.config, "teachers": source, "checkpoints": dict(_digests(source))},
        taught_by=labels[0] if labels else None,
        members=labels[1:],
        teacher=made,
    )


def taught_from_disk(
    training: Training, make: Callable[..., Any], taught_by: str, stored_outputs: Mapping[str, Any]
) -> Training:
    """Let a training read its teacher's outputs from the disk, where they are written before it begins.

    Raises:
        ValueError: For another source than the network itself.
    """
    if make not in (Teacher, Stored):
        raise ValueError(
            f"the stage store_outputs writes what one network gives, expected teachers=stored, got {make.__name__}: "
            "choose that, or leave the stage out"
        )
    decisive = {key: value for key, value in stored_outputs.items() if key != "batch_size"}
    config = {**training.config, "stored_outputs": decisive}
    return replace(training, config=config, taught_by=taught_by, stored_outputs=stored_outputs)


def _files_in(network: Any) -> list[tuple[str, int, int]] | None:
    """Tell files apart in the folder that a network is read from, by name, size and time: it may be written anew."""
    folder = network.get("name") if isinstance(network, Mapping) else None
    if not isinstance(folder, str) or not Path(folder).is_dir():
        return None
    found = ((file.name, file.stat()) for file in sorted(Path(folder).iterdir()) if file.is_file())
    return [(name, state.st_size, state.st_mtime_ns) for name, state in found]


def _digests(part: Any) -> Iterator[tuple[str, str]]:
    """Find checkpoints in a configuration: a file of the same name may have other weights tomorrow."""
    if isinstance(part, Mapping):
        path = part.get("checkpoint")
        if isinstance(path, str):
            if not Path(path).is_file():
                raise ValueError(f"teachers: checkpoint={path}: there is no such file")
            yield path, sha256_of(Path(path))
    for item in part.values() if isinstance(part, Mapping) else part if isinstance(part, list | tuple) else ():
        yield from _digests(item)
