"""Samples that are divided among teacher and student, of which the student has only some with labels."""

from typing import Any

from kd_lightning.data.role_data import RoleData, Subset


class SplitData(RoleData):
    """Subsets ``teacher``, ``labelled`` and ``unlabelled``, beside ``validation`` and ``test``.

    The teacher trains on its own, the student alone on the labelled ones, the control and the distilled student on the
    labelled and the unlabelled ones: those of another only their teacher knows something of.
    """

    def training_set(self) -> Any:
        labelled = self.subset("teacher" if self.role == "teacher" else "labelled")
        if self.role in ("teacher", "student"):
            return labelled
        return labelled.joined(self.subset("unlabelled"))

    def parts(self) -> dict[str, Subset]:
        """Return what this role sees, the samples without labels apart: ``unlabelled``."""
        parts = super().parts()
        unlabelled = self.subset("unlabelled")
        if self.role in ("teacher", "student") or not len(unlabelled):
            return parts
        return {**parts, "training": self.subset("labelled"), "unlabelled": unlabelled}


def check_counts(**counts: int) -> None:
    """Raise ValueError for a negative number of samples."""
    for name, value in counts.items():
        if value < 0:
            raise ValueError(f"expected {name} of 0 or more, got {value}")
