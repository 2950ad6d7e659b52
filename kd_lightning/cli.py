"""The command line: Hydra in, a pipeline out. The only module that imports Hydra."""

import difflib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_object, instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from kd_lightning.pipeline import Pipeline, Recipe
from kd_lightning.pipeline.quantizing import QuantizedStage
from kd_lightning.pipeline.results import Role
from kd_lightning.pipeline.sources import taught_through, through_stored_outputs
from kd_lightning.teachers import Stored, Teacher
from kd_lightning.tracking.logger import store_uri

_STUDENTS: tuple[Role, ...] = ("student", "control", "distilled")
_STAGES = ("teacher", "assistants", "store_outputs", *_STUDENTS, "quantized", "verdict")
_MISTAKES = (
    ValueError, TypeError, OSError, ImportError, FloatingPointError, OmegaConfBaseException, InstantiationException
)  # fmt: skip
"""What a user can have caused: said in a line, with HYDRA_FULL_ERROR=1 as a traceback."""


def conf_dir() -> Path:
    """Return the folder of configurations: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def main() -> None:
    """Entry point of ``kd-lightning`` and ``python -m kd_lightning``."""
    try:
        _hydra_main()
    except (KeyboardInterrupt, SIGTERMException) as error:
        print("\nInterrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(128 + (signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM))
    except SystemExit as error:
        if error.code == 1:  # Hydra has printed what is wrong, and not always what would be right
            _print_alternatives([word for word in sys.argv[1:] if not word.startswith("-")])
        raise


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def _hydra_main(config: DictConfig) -> float | None:
    _quiet()
    try:
        job = pipeline(config, _experiment(), _overrides())
        verdict = job.run()
    except _MISTAKES as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        message = str(error)
        if isinstance(error, InstantiationException):  # names the target; its cause says what is wrong
            target = message.splitlines()[0].removeprefix("Error in call to target ").rstrip(":")
            message = f"{target}: {error.__cause__ or message}"
        raise SystemExit(f"kd-lightning: {message}") from error
    if verdict is None:
        return None
    if config.logger:
        _say_where(job.console, config.logger.get("tracking_uri"))
    chosen = verdict.models.get(verdict.distilled or "")
    return chosen.val_accuracy if chosen is not None else None  # what a Hydra sweeper maximises


def pipeline(config: DictConfig, experiment: str | None = None, overrides: Sequence[str] = ()) -> Pipeline:
    """Turn a composed configuration into a pipeline, while Hydra is initialised.

    Args:
        config: As it was composed.
        experiment: The pipeline's name, unless the configuration has one.
        overrides: With which it was composed; variants are composed with them, too.

    Raises:
        ValueError: For an unknown stage, or a variant that sets what is not there.
    """
    unknown = [stage for stage in config.stages if stage not in _STAGES]
    if unknown or not config.stages:
        raise ValueError(f"expected stages among {', '.join(_STAGES)}, got {list(config.stages)}")
    resolved = _plain(config)
    teacher = None
    if "teacher" in config.stages or config.teacher.checkpoint is not None:
        teacher = _teacher(resolved)
    assistants = [_assistant(resolved, name) for name in resolved["assistants"] if "assistants" in config.stages]
    recipes = []
    wanted = {*config.stages, *(["distilled"] if "store_outputs" in config.stages else [])}
    members: dict[str, Recipe] = {}
    for role in (role for role in _STUDENTS if role in wanted):
        variants = _variants(config, overrides) if role == "distilled" else {role: resolved}
        for label, variant in variants.items():
            recipes += [_student(variant, role, label, int(seed)) for seed in resolved["seeds"]]
            for member, of in _members(variant).items() if role != "student" else ():
                if member != "teacher":
                    members[member] = _teacher(variant, member, of)
    return Pipeline(
        name=resolved["name"] or experiment or "kd-lightning",
        teacher=teacher,
        members=list(members.values()),
        assistants=assistants,
        to_store=[recipe for recipe in recipes if recipe.stored_outputs is not None],
        students=[recipe for recipe in recipes if recipe.role in config.stages],
        quantized=QuantizedStage(**instantiate(resolved["quantized"], _convert_="all"))
        if "quantized" in config.stages
        else None,
        config=resolved,
        work_dir=Path(resolved["work_dir"]),
        console=Console(width=None if sys.stdout.isatty() else 100),
        make_logger=partial(instantiate, resolved["logger"]) if resolved["logger"] else None,
        verdict="verdict" in config.stages,
        recall_classes=resolved["recall_classes"],
        reference=resolved["reference"],
    )


def _teacher(config: Mapping[str, Any], label: str = "teacher", member: int | str | None = None) -> Recipe:
    """Train it, or take its weights from a file; as a member of an ensemble with a seed or a file of its own."""
    part = config["teacher"]
    if member is not None:
        part = {**part, **({"seed": member, "checkpoint": None} if isinstance(member, int) else {"checkpoint": member})}
    own = {key: part[key] for key in ("network", "losses", "optimizer", "scheduler")}
    own |= {"callbacks": {}, "trainer": {**config["trainer"], **part["trainer"]}, "data": config["data"]}
    checkpoint = Path(part["checkpoint"]) if part["checkpoint"] is not None else None
    if checkpoint is not None and not checkpoint.is_file():
        raise ValueError(f"teacher.checkpoint={checkpoint}: there is no such file")
    return _recipe(own, "teacher", label, int(part["seed"]), checkpoint)


def _assistant(config: Mapping[str, Any], name: str) -> Recipe:
    """Train like the teacher, with the distilled student's losses where somebody teaches it, unless it has others."""
    part, names = config["assistants"][name], list(config["assistants"])
    if name in _STAGES:
        raise ValueError(f"an assistant is named {name!r}, expected another name than that of a stage")
    teacher = config["teacher"]
    taught_by = part.get("taught_by", ("teacher", *names)[names.index(name)])  # the one before it
    losses = (teacher if taught_by is None else config)["losses"]
    own = {key: part.get(key, teacher[key]) for key in ("optimizer", "scheduler")}
    own |= {"network": part["network"], "losses": part.get("losses", losses), "callbacks": {}}
    own |= {"trainer": {**config["trainer"], **teacher["trainer"], **part.get("trainer", {})}, "data": config["data"]}
    recipe = _recipe(own, "assistant", name, int(teacher["seed"]), check_teacher=teacher["check"])
    return replace(recipe, taught_by=taught_by)


def _student(config: Mapping[str, Any], role: Role, label: str, seed: int) -> Recipe:
    own = {key: config[key] for key in ("losses", "callbacks", "optimizer", "scheduler", "trainer", "data")}
    own["network"] = config["student"]["network"]
    if role != "distilled":  # what is particular to a method must not reach those it is compared with
        own |= {"losses": config[role]["losses"], "callbacks": {}}
    recipe = _recipe(own, role, label, seed, check_teacher=config["teacher"]["check"])
    return recipe if role == "student" else _taught(recipe, config)


def _taught(recipe: Recipe, config: Mapping[str, Any]) -> Recipe:
    source = config["teachers"]
    make = get_object(source["_target_"])
    taught_by = config["taught_by"] if recipe.role == "distilled" else "teacher"
    if make is Stored or "store_outputs" in config["stages"]:
        return through_stored_outputs(recipe, make, taught_by, config["stored_outputs"])
    if recipe.role == "control" and getattr(make, "learns", False):  # its labels are those of the trained teacher
        make = Teacher
        source = {"_target_": "kd_lightning.teachers.Teacher", "accelerate": config["teacher"]["accelerate"]}

    def bound(part: Mapping[str, Any]) -> Any:
        return instantiate({**part, "_partial_": True}, _convert_="all")

    return taught_through(recipe, source, make, bound, taught_by, list(_members(config)))


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


def _recipe(
    own: Mapping[str, Any],
    role: Role,
    label: str,
    seed: int,
    checkpoint: Path | None = None,
    check_teacher: bool = True,
) -> Recipe:
    def make(part: str) -> Any:
        return instantiate(own[part], _convert_="all")

    def make_trainer(**arguments: Any) -> Trainer:
        trainer = instantiate({**own["trainer"], "_partial_": True}, _convert_="all")
        arguments["callbacks"] = [*(trainer.keywords.get("callbacks") or []), *arguments["callbacks"]]
        made: Trainer = trainer(**arguments)
        return made

    return Recipe(
        role=role,
        label=label,
        method=_method(own["losses"]) if checkpoint is None else "checkpoint",
        seed=seed,
        config={**own, "seed": seed},
        network=partial(make, "network"),
        losses=partial(make, "losses"),
        callbacks=lambda: list(make("callbacks").values()),
        data=partial(instantiate, own["data"], _convert_="all"),
        trainer=make_trainer,
        optimizer=make("optimizer"),
        scheduler=make("scheduler") if own["scheduler"] else None,
        checkpoint=checkpoint,
        check_teacher=check_teacher,
    )


def _method(losses: Mapping[str, Any]) -> str:
    """Name a method by its losses: ``kd-T4``; the labels' own loss is named only where it is alone."""
    names = [name for name in losses if name != "hard_label"] or list(losses)
    with_temperature = [
        f"{name}-T{losses[name]['temperature']:g}" if "temperature" in losses[name] else name for name in names
    ]
    return "+".join(with_temperature)


def _variants(config: DictConfig, overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Compose the configuration anew for each variant, with what it sets after what the command line set."""
    if not config.variants:
        return {"distilled": _plain(config)}
    found = {}
    for label, changes in _plain(config.variants).items():
        own = [f"{path}={_as_override(value)}" for path, value in changes.items()]
        try:
            found[label] = _plain(hydra.compose("config", [*overrides, *own]))
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(
                f"variant {label!r} sets {', '.join(changes)}, expected a path or a group that the command line takes: "
                f"{str(error).splitlines()[0]}"
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


def _plain(config: DictConfig) -> dict[str, Any]:
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _overrides() -> list[str]:
    overrides = HydraConfig.get().overrides
    return [*(o for o in overrides.hydra if o.startswith("hydra.searchpath")), *overrides.task]


def _experiment() -> str | None:
    choice = HydraConfig.get().runtime.choices.get("experiment")
    return str(choice) if choice else None


def _say_where(console: Console, tracking_uri: str | None) -> None:
    uri = store_uri(tracking_uri)
    console.print()
    if uri.startswith(("http:", "https:")):
        console.print(f"Every run: {uri}", highlight=False)
    else:
        console.print(f"Every run, side by side: mlflow ui --backend-store-uri {uri}", highlight=False, soft_wrap=True)


def _quiet() -> None:
    """Leave the terminal to the progress display and the comparison."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("onnx_ir", "onnxruntime", "onnxscript"):  # onnxruntime.quantization makes the root logger print INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)  # "experiment not found: creating it"
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # read when mlflow is imported, which is later
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")


def _print_alternatives(overrides: list[str]) -> None:
    """Say for overrides that name nothing in the configuration which names are there."""
    groups = {
        folder.name: sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))
        for folder in sorted(conf_dir().iterdir())
        if folder.is_dir()
    }
    paths = _known_paths()
    for override in overrides:
        path, _, value = override.lstrip("+~").partition("=")
        group = path.partition("@")[0]
        chosen = re.findall(r"[\w/.-]+", value)
        if path.startswith("hydra."):
            continue
        if group in groups and not set(chosen) <= set(groups[group]):
            print(f"\n{group}: the options here are {', '.join(groups[group])}", file=sys.stderr)
        elif path not in paths and group not in groups:
            nearest = difflib.get_close_matches(path, paths, n=5, cutoff=0.5)
            nearest += difflib.get_close_matches(group, groups, n=2)
            print(f"\n{path}: the nearest names are {', '.join(nearest) or 'none'}", file=sys.stderr)
            print(f"Groups: {', '.join(groups)}. All paths: kd-lightning --cfg job", file=sys.stderr)


def _known_paths() -> list[str]:
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            return list(_paths(OmegaConf.to_container(hydra.compose("config"))))
    except (HydraException, OmegaConfBaseException):
        return []


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _paths(value, f"{prefix}{key}.")
