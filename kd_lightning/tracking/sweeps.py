"""The run of a sweep, under which the pipelines of its jobs stand."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


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
        return {f"sweep/{path}": value for path, value in self.values.items()}
