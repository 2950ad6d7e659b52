"""The run of a sweep, under which the pipelines of its jobs stand."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kd_lightning.tracking.journal import history, last_begin

_SWEPT = "sweep/"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep, as one of its jobs knows it.

    Attributes:
        name: Of its run.
        folder: All jobs have the same one: the journal of the sweep's run is there.
        values: What this job has in place of the others' values, by path.
    """

    name: str
    folder: Path
    values: Mapping[str, str]

    @property
    def params(self) -> dict[str, str]:
        """The parameters by which its pipelines are compared."""
        return {f"{_SWEPT}{path}": value for path, value in self.values.items()}


@dataclass(frozen=True, kw_only=True)
class SweptPipeline:
    """One of a sweep's pipelines.

    Attributes:
        values: What it has in place of the others' values, by path.
        figures: What its run was told at the end, by name; empty where it has no verdict.
    """

    values: Mapping[str, str]
    figures: Mapping[str, float]


def swept_pipelines(stages: Path, key: str) -> list[SweptPipeline]:
    """Return a sweep's pipelines so far, from their journals, in the order in which they began.

    Args:
        stages: Folder of the pipelines' folders.
        key: Of the sweep's run.
    """
    folders = {folder: last_begin(folder) or {} for folder in stages.glob("pipeline-*")}
    found = []
    for folder, begin in sorted(folders.items(), key=lambda item: int(item[1].get("at", 0))):
        if begin.get("parent") == key:
            params = begin.get("params", {})
            values = {name.removeprefix(_SWEPT): value for name, value in params.items() if name.startswith(_SWEPT)}
            figures = {name: points[-1][1] for name, points in history(folder).items() if name.startswith("final/")}
            found.append(SweptPipeline(values=values, figures=figures))
    return found
