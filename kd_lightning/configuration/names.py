"""What pipelines and methods are called, so that they can be told apart in a list."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_lightning.configuration.arguments import ConfigurationError
from kd_lightning.configuration.parts import Part
from kd_lightning.tracking.calls import without_credentials
from kd_lightning.tracking.sweeps import Sweep

_UNSAID = ("log_every_n_steps", "num_workers", "eval_batch_size")
_PLACES = ("experiment", "name", "work_dir", "logger", "tracking@logger", "hydra")
"""What changes where things are kept, and nothing of what is trained."""
_OPTIONS = ("callbacks", "data", "losses", "models", "optimizer", "quantization", "scheduler", "task", "teachers")
_OWNERS = ("teacher", "control", "student", "quantized", "assistants")
_MOST, _MOST_OF_ONE = 120, 40
_WRITERS = ("on_policy", "sequence_level")


def pipeline_name(base: str, overrides: Sequence[str]) -> str:
    """Name a pipeline by its experiment, or its data, and by what was set differently.

    Example:
        >>> pipeline_name("fashion_mnist", ["losses.kd.temperature=2", "models@student.network=cnn8", "logger=null"])
        'fashion_mnist T=2 cnn8'
        >>> pipeline_name("fashion_mnist", ["losses=[hard_label,kd]", "teacher.trainer.max_steps=60", "seeds=[0,1]"])
        'fashion_mnist hard_label+kd teacher.max_steps=60 seeds=0+1'
    """
    said = [_short(word, base) for word in overrides]
    return _cut(" ".join([base, *(word for word in said if word)]), _MOST)


def sweep_of(base: str, overrides: Sequence[str], swept: Sequence[str], folder: Path) -> Sweep:
    """Describe the sweep of which a job is one.

    Args:
        base: As for :func:`pipeline_name`.
        overrides: Of the job.
        swept: Those of them that differ between the jobs.
        folder: That all jobs have.
    """
    swept = [word for word in swept if _short(word, "")]
    paths = [word.partition("=")[0].lstrip("+~") for word in swept]
    shared = pipeline_name(base, [word for word in overrides if word not in swept])
    said = ", ".join("T" if path.endswith(".temperature") else path.rpartition(".")[2] for path in paths)
    values = {path: without_credentials(word.partition("=")[2]) for path, word in zip(paths, swept, strict=True)}
    return Sweep(name=_cut(f"{shared}: sweep over {said or 'nothing'}", _MOST), folder=folder, values=values)


def method_name(losses: Mapping[str, Any], callbacks: Mapping[str, Any]) -> str:
    """Name a method by its losses: ``kd-T4``; the labels' own loss is named only where it is alone.

    With a temperature that is scheduled by where it begins and ends, ``kd-T8to1``. And by who writes the texts, where
    that is not the data set: ``reverse_kl-T1+on_policy``.
    """
    names = [name for name in losses if name != "hard_label"] or list(losses)
    found = []
    for name in names:
        scheduled = list(_ends(name, callbacks))
        if scheduled and "temperature" in losses[name]:
            begin, end = scheduled[-1]
            found.append(f"{name}-T{begin:g}" + (f"to{end:g}" if end != begin else ""))
        elif "temperature" in losses[name]:
            found.append(f"{name}-T{losses[name]['temperature']:g}")
        else:
            found.append(name)
    return "+".join([*found, *(name for name in _WRITERS if name in callbacks)])


def _ends(loss: str, callbacks: Mapping[str, Any]) -> Iterator[tuple[float, float]]:
    """Return the first and the last value of each schedule of a loss's temperature."""
    for name, node in callbacks.items():
        kind = str(node.get("_target_", "")).rpartition(".")[2]
        of_all = kind == "TemperatureSchedule" and node.get("loss") in (None, loss)
        of_path = kind == "HyperparameterSchedule" and node.get("path") == f"losses.{loss}.temperature"
        if (of_all or of_path) and isinstance(node.get("schedule"), Mapping):
            try:
                schedule = Part(node["schedule"], f"callbacks.{name}.schedule").make()
                yield float(schedule(0.0)), float(schedule(1.0))
            except (ConfigurationError, ValueError, TypeError):  # which the training says, with the path
                continue


def _short(word: str, base: str) -> str:
    """Say an override in short; nothing for one that changes nothing of what is trained."""
    path, _, value = word.partition("=")
    bare = path.lstrip("+~")
    first, last = bare.partition(".")[0], bare.rpartition(".")[2]
    if first in _PLACES or last in _UNSAID or (bare == "data" and value == base):
        return ""
    if path.startswith("~"):
        return f"no {bare}"
    value = _cut(value.strip("'\"[]").replace(",", "+").replace(" ", ""), _MOST_OF_ONE)
    if bare.partition("@")[0] in _OPTIONS:
        return value
    name = "T" if last == "temperature" else last
    return f"{first}.{name}={value}" if first in _OWNERS and first != bare else f"{name}={value}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
