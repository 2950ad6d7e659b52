"""From a composed configuration to a pipeline."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import hydra
from hydra.errors import HydraException
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from kd_lightning.configuration.arguments import ConfigurationError, check_arguments, errors_at
from kd_lightning.configuration.keys import STAGES, check_keys
from kd_lightning.configuration.names import method_name, pipeline_name, sweep_of
from kd_lightning.configuration.parts import Part, by_name, target_of
from kd_lightning.pipeline.pipeline import Pipeline
from kd_lightning.pipeline.quantize import QuantizationPlan
from kd_lightning.pipeline.training import PRETRAINED, Training, taught_from_disk, taught_through
from kd_lightning.preflight.trainer import check_limits
from kd_lightning.records import TITLES, Role
from kd_lightning.tasks import Task
from kd_lightning.teachers import Stored, Teacher

_STUDENTS: tuple[Role, ...] = ("student", "control", "distilled")
_NOT_CHOSEN = ("hard_label", {"weight": 1.0})  # what config.yaml sets of a loss that the defaults list did not take


def pipeline(
    config: DictConfig,
    base: str | None = None,
    overrides: Sequence[str] = (),
    sweep: tuple[Path, Sequence[str]] | None = None,
) -> Pipeline:
    """Turn a composed configuration into a pipeline, while Hydra is initialised.

    Args:
        config: As it was composed.
        base: Experiment or data, with which the pipeline's name begins, unless the configuration has a name.
        overrides: With which it was composed; variants are composed with them, too.
        sweep: Of which this is a job: its folder, and the overrides that differ between its jobs.

    Raises:
        ValueError: For what is not as :mod:`kd_lightning.configuration.keys` has it, an argument that is not taken, and
            a variant that sets what is not there.
    """
    resolved = _whole(config)
    check_keys(resolved, OmegaConf.to_yaml(config))
    task, teacher = _task(Part(resolved["task"], "task")), None
    if "teacher" in config.stages or config.teacher.checkpoint is not None:
        teacher = _teacher(resolved)
    assistants = [_assistant(resolved, name) for name in resolved["assistants"] if "assistants" in config.stages]
    trainings = []
    wanted = {*config.stages, *(["distilled"] if "store_outputs" in config.stages else [])}
    members: dict[str, Training] = {}
    for role in (role for role in _STUDENTS if role in wanted):
        variants = _variants(config, overrides) if role == "distilled" else {role: resolved}
        for label, variant in variants.items():
            if variant["task"] != resolved["task"]:
                raise ConfigurationError(f"variants.{label}: sets task, expected one for all models that are compared")
            trainings += [_student(variant, role, label, int(seed)) for seed in resolved["seeds"]]
            for member, of in _members(variant).items() if role != "student" else ():
                if member != "teacher":
                    members[member] = _teacher(variant, member, of)
    logger = dict(resolved["logger"] or {})
    register = logger.pop("register", None)
    swept = list(sweep[1]) if sweep is not None else []
    shared = [word for word in overrides if word not in swept]
    return Pipeline(
        name=resolved["name"] or pipeline_name(base or "kd-lightning", [*swept, *shared]),
        task=task,
        teacher=teacher,
        members=list(members.values()),
        assistants=assistants,
        to_store=[training for training in trainings if training.stored_outputs is not None],
        students=[training for training in trainings if training.role in config.stages],
        quantized=_quantized(resolved["quantized"]) if "quantized" in config.stages else None,
        config=resolved,
        work_dir=Path(resolved["work_dir"]),
        console=Console(width=None if sys.stdout.isatty() else 100),
        make_logger=Part(logger, "logger").bound() if logger else None,
        register=register,
        sweep=None if sweep is None else sweep_of(base or "kd-lightning", overrides, swept, sweep[0]),
        verdict="verdict" in config.stages,
        reference=resolved["reference"],
    )


def _task(part: Part) -> Task:
    made = part.make()
    if not isinstance(made, Task):
        raise ConfigurationError(f"{part.path}: expected a kd_lightning.tasks.Task, got a {type(made).__name__}")
    return made


def _quantized(config: Mapping[str, Any]) -> QuantizationPlan:
    check_arguments(QuantizationPlan, config, "quantized")
    made = Part(config, "quantized").make()
    with errors_at("quantized", arguments=config):
        return QuantizationPlan(**made)


def _teacher(config: Mapping[str, Any], label: str = "teacher", member: int | str | None = None) -> Training:
    """Train it, or take its weights from a file; as a member of an ensemble with a seed or a file of its own."""
    part = config["teacher"]
    if member is not None:
        part = {**part, **({"seed": member, "checkpoint": None} if isinstance(member, int) else {"checkpoint": member})}
    parts = {key: Part(part[key], f"teacher.{key}") for key in ("network", "optimizer", "scheduler")}
    parts |= {
        "losses": by_name(part["losses"], "teacher.losses"),
        "callbacks": Part({}, "callbacks"),
        "data": Part(config["data"], "data"),
        "task": Part(config["task"], "task"),
    }
    parts["trainer"] = _trainer(config, {"teacher": part})
    path = "teacher.checkpoint" if member is None else "teachers.teachers"
    checkpoint = part["checkpoint"]
    if checkpoint is not None and checkpoint != PRETRAINED:
        checkpoint = Path(checkpoint)
        if not checkpoint.is_file():
            what = "is a folder, expected a file" if checkpoint.is_dir() else "there is no such file"
            raise ConfigurationError(f"{path}={checkpoint}: {what}")
    return _training(parts, "teacher", label, int(part["seed"]), checkpoint, bool(part["check"]), {"checkpoint": path})


def _assistant(config: Mapping[str, Any], name: str) -> Training:
    """Train like the teacher, with the distilled student's losses where somebody teaches it, unless it has others."""
    part, names = config["assistants"][name], list(config["assistants"])
    if name in {*STAGES, *TITLES} - {"assistant"}:
        raise ConfigurationError(f"assistants.{name}: expected another name than that of a stage or a role")
    unknown = part.keys() - {"network", "losses", "optimizer", "scheduler", "trainer", "taught_by"}
    if unknown or "network" not in part:
        raise ConfigurationError(
            f"assistants.{name}: expected network and, if they are its own, losses, optimizer, scheduler, trainer and "
            f"taught_by, got {', '.join(part)}"
        )
    own = f"assistants.{name}"
    parts = {"network": Part(part["network"], f"{own}.network"), "callbacks": Part({}, "callbacks")}
    taught_by = part.get("taught_by", ("teacher", *names)[names.index(name)])  # the one before it
    losses = (config["teacher"]["losses"], "teacher.losses") if taught_by is None else (config["losses"], "losses")
    parts["losses"] = by_name(*((part["losses"], f"{own}.losses") if "losses" in part else losses))
    for key in ("optimizer", "scheduler"):
        in_part = key in part
        parts[key] = Part((part if in_part else config["teacher"])[key], f"{own if in_part else 'teacher'}.{key}")
    parts["trainer"] = _trainer(config, {"teacher": config["teacher"], own: part})
    parts |= {key: Part(config[key], key) for key in ("data", "task")}
    teacher, paths = config["teacher"], {"taught_by": f"{own}.taught_by"}
    training = _training(parts, "assistant", name, int(teacher["seed"]), check_teacher=teacher["check"], paths=paths)
    return replace(training, taught_by=taught_by, data_of="teacher")  # it learns from what the teacher has learnt from


def _student(config: Mapping[str, Any], role: Role, label: str, seed: int) -> Training:
    # What is wrong with a variant alone is said with its name.
    prefix = f"variants.{label}: " if label != role else ""
    keys = ("losses", "callbacks", "optimizer", "scheduler", "trainer", "data", "task")
    nodes = {key: (config[key], prefix + key) for key in keys}
    nodes["network"] = (config["student"]["network"], f"{prefix}student.network")
    if role != "distilled":  # what is particular to a method must not reach those it is compared with
        nodes |= {"losses": (config[role]["losses"], f"{role}.losses"), "callbacks": ({}, "callbacks")}
    parts = {key: (by_name if key in ("losses", "callbacks") else Part)(*node) for key, node in nodes.items()}
    training = _training(parts, role, label, seed, check_teacher=config["teacher"]["check"])
    return training if role == "student" else _taught(training, config, prefix)


def _taught(training: Training, config: Mapping[str, Any], prefix: str) -> Training:
    source, path = config["teachers"], f"{prefix}teachers"
    make = target_of(source, path)
    taught_by = config["taught_by"] if training.role == "distilled" else "teacher"
    if make is Stored or "store_outputs" in config["stages"]:
        with errors_at(path):
            return taught_from_disk(training, make, taught_by, config["stored_outputs"])
    if training.role == "control" and getattr(make, "learns", False):  # its labels are those of the trained teacher
        make, path = Teacher, "teacher"
        source = {"_target_": "kd_lightning.teachers.Teacher", "accelerate": config["teacher"]["accelerate"]}

    def bound(part: Mapping[str, Any]) -> Any:
        return Part(part, path).bound()

    with errors_at(path):
        taught = taught_through(training, source, make, bound, taught_by, list(_members(config)))
    return replace(taught, paths={**taught.paths, "teachers": path})


def _members(config: Mapping[str, Any]) -> dict[str, int | str]:
    """Return the seeds and checkpoints of an ensemble's members, by label; none where sources are given."""
    members, teacher = config["teachers"].get("teachers") or [], config["teacher"]
    if not any(isinstance(member, int | str) for member in members):
        return {}
    if not all(isinstance(member, int | str) for member in members) or len(set(members)) < len(members):
        raise ValueError(
            f"expected teachers.teachers to be different seeds and checkpoints, or sources alone, got {members}: name "
            "each once"
        )
    if "teacher" not in config["stages"] and any(isinstance(member, int) for member in members):
        raise ValueError(
            f"teachers.teachers={members} are seeds to train the teacher with: add teacher to the stages, or give "
            "checkpoints, 'teachers.teachers=[a.ckpt,b.ckpt]'"
        )
    own = teacher["seed"] if teacher["checkpoint"] is None else teacher["checkpoint"]
    return {"teacher" if member == own else f"teacher-{member}": member for member in members}


def _trainer(config: Mapping[str, Any], owners: Mapping[str, Mapping[str, Any]]) -> Part:
    """Return what makes the Trainer of a model that has some arguments of its own, the last one's in the end."""
    node, places = dict(config["trainer"]), dict[str, str]()
    for path, owner in owners.items():
        own = owner.get("trainer", {})
        node |= own
        places |= dict.fromkeys(own, f"{path}.trainer")
    return Part(node, "trainer", places)


def _training(
    parts: Mapping[str, Part],
    role: Role,
    label: str,
    seed: int,
    checkpoint: Path | Literal["pretrained"] | None = None,
    check_teacher: bool = True,
    paths: Mapping[str, str] | None = None,
) -> Training:
    node, scheduler = parts["trainer"].node, parts["scheduler"]
    own_callbacks = Part(node.get("callbacks") or [], f"{parts['trainer'].path}.callbacks")
    without = {key: value for key, value in node.items() if key != "callbacks"}
    make_trainer = Part(without, parts["trainer"].path, parts["trainer"].places).bound()

    def trainer(**arguments: Any) -> Trainer:
        made: Trainer = make_trainer(**{**arguments, "callbacks": [*own_callbacks.make(), *arguments["callbacks"]]})
        with make_trainer.part.errors():
            check_limits(made, {**without, **arguments})
        return made

    losses, data = parts["losses"], parts["data"].bound()
    config = {key: part.node for key, part in parts.items()}
    weights = "checkpoint" if isinstance(checkpoint, Path) else PRETRAINED
    return Training(
        role=role,
        label=label,
        method=weights if checkpoint is not None else method_name(losses.node, parts["callbacks"].node),
        seed=seed,
        config={**config, "seed": seed},
        task=_task(parts["task"]),
        network=parts["network"].make,
        losses=losses.make,
        callbacks=lambda: list(parts["callbacks"].make().values()),
        data=data,
        trainer=trainer,
        optimizer=parts["optimizer"].bound(),
        scheduler=scheduler.bound() if scheduler.node else None,
        checkpoint=checkpoint,
        check_teacher=check_teacher,
        paths={
            **{key: part.path for key, part in parts.items()},
            **{key: key for key in ("stages", "taught_by", "stored_outputs")},
            **(paths or {}),
        },
    )


def _variants(config: DictConfig, overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Compose the configuration anew for each variant, with what it sets after what the command line set."""
    if not config.variants:
        return {"distilled": _whole(config)}
    found = {}
    for label, changes in _plain(config.variants).items():
        if label in TITLES and label != "distilled":
            raise ConfigurationError(f"variants.{label}: expected another name than that of a role")
        own = [f"{path}={_as_override(value)}" for path, value in changes.items()]
        try:
            found[label] = _whole(hydra.compose("config", [*overrides, *own]))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigurationError(
                f"variants.{label}: variant {label!r} sets {', '.join(changes)}, expected a path or a group that the "
                f"command line takes: {str(error).splitlines()[0]}"
            ) from error
    return found


def _as_override(value: Any) -> str:
    """Write a value in the grammar of the command line."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_as_override(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_as_override, value)) + "]"
    if isinstance(value, str):
        return (
            value if re.fullmatch(r"[\w./-]+", value) else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
        )
    return "null" if value is None else str(value).lower()


def _whole(config: DictConfig) -> dict[str, Any]:
    """Return all of a configuration, interpolations resolved; a scheduler may be left out.

    Without what config.yaml says of the labels' own loss where teacher and student learn from another one.
    """
    resolved = _plain(config)
    for part in (resolved, resolved.get("teacher")):
        if isinstance(part, dict):
            part.setdefault("scheduler", None)
    for role in ("teacher", "student"):
        part = resolved.get(role)
        if isinstance(part, dict) and isinstance(part.get("losses"), dict):
            part["losses"] = dict(loss for loss in part["losses"].items() if loss != _NOT_CHOSEN)
    return resolved


def _plain(config: DictConfig) -> dict[str, Any]:
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}
