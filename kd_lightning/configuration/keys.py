"""What stands at the top of the configuration and is no object to make: names, types and ranges."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, get_type_hints

from kd_lightning.configuration.arguments import ConfigurationError, check_value, errors_at
from kd_lightning.stored_outputs.formats import find_format

STAGES = ("teacher", "assistants", "store_outputs", "student", "control", "distilled", "quantized", "verdict")


class Student(TypedDict):
    """The student, alone."""

    network: dict[str, Any]
    losses: dict[str, Any]


class Control(TypedDict):
    """The student on hard labels."""

    losses: dict[str, Any]


class TeacherKeys(TypedDict):
    """The teacher."""

    checkpoint: str | None
    check: bool
    accelerate: str | list[str]
    seed: int
    network: dict[str, Any]
    losses: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    trainer: dict[str, Any]


class StoredOutputsKeys(TypedDict):
    """How the teacher's outputs are stored."""

    views: int
    format: str
    batch_size: int


class Keys(TypedDict):
    """All of them."""

    stages: list[str]
    seeds: list[int]
    name: str | None
    work_dir: str
    teacher: TeacherKeys
    assistants: dict[str, dict[str, Any]]
    taught_by: str
    student: Student
    control: Control
    teachers: dict[str, Any]
    losses: dict[str, Any]
    callbacks: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    trainer: dict[str, Any]
    data: dict[str, Any]
    task: dict[str, Any]
    quantized: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    reference: str | None
    stored_outputs: StoredOutputsKeys
    logger: dict[str, Any] | None


def check_keys(config: Mapping[str, Any], written: str) -> None:
    """Compare the top of a configuration with :class:`Keys`, before anything is made of it.

    Args:
        config: With interpolations resolved.
        written: As yaml, without: a further key at the top may be there for these.

    Raises:
        ConfigurationError: With the path, what was expected and what was got.
    """
    known = get_type_hints(Keys)
    interpolated = {name for name in config.keys() - known.keys() if f"${{{name}" in written or f":{name}" in written}
    check_value({name: value for name, value in config.items() if name not in interpolated}, Keys, "")
    stages, seeds = config["stages"], config["seeds"]
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages or len(set(stages)) < len(stages):
        raise ConfigurationError(f"stages={_list(stages)}: expected some of {', '.join(STAGES)}, each once")
    trained = set(stages) & {"teacher", "student", "control", "distilled"}
    if (
        not trained
        and config["teacher"]["checkpoint"] is None
        and not ("assistants" in stages and config["assistants"])
    ):
        raise ConfigurationError(
            f"stages={_list(stages)}: expected teacher, student, control or distilled among them, got none: list what "
            "is finished as well, it is reused"
        )
    if "quantized" in stages and not trained - {"control"} and config["teacher"]["checkpoint"] is None:
        raise ConfigurationError(
            f"stages={_list(stages)}: expected teacher, student or distilled beside quantized, which quantises these"
        )
    check_seeds(seeds, "seeds")
    check_seeds([config["teacher"]["seed"]], "teacher.seed")
    if not seeds and set(stages) & {"student", "control", "distilled", "store_outputs"}:
        raise ConfigurationError("seeds=[]: expected at least one, such as seeds=[0]")
    for name in ("work_dir", "taught_by"):
        if not config[name]:
            raise ConfigurationError(f"{name}='': expected a {'folder' if name == 'work_dir' else 'name'}, got nothing")
    stored = config["stored_outputs"]
    if stored["views"] < 1:
        raise ConfigurationError(f"stored_outputs.views={stored['views']}: expected 1 or more of each sample")
    if stored["batch_size"] < 1:
        raise ConfigurationError(f"stored_outputs.batch_size={stored['batch_size']}: expected 1 sample or more")
    with errors_at("stored_outputs", arguments=stored):
        find_format(stored["format"])


def check_seeds(seeds: Sequence[int], path: str) -> None:
    """Raise ConfigurationError unless these are different seeds that every generator takes."""
    wrong = [seed for seed in seeds if not 0 <= seed < 2**32]
    if wrong:
        raise ConfigurationError(f"{path}={_list(seeds)}: expected whole numbers from 0 to 2^32 - 1, got {wrong[0]}")
    if len(set(seeds)) < len(seeds):
        raise ConfigurationError(
            f"{path}={_list(seeds)}: expected different ones, as each is a training of its own: name each once"
        )


def _list(values: Sequence[Any]) -> str:
    return f"[{','.join(map(str, values))}]"
