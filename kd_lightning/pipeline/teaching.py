"""How the teacher of a stage gives its outputs: through its source, or stored before the training."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from lightning.pytorch import LightningDataModule

from kd_lightning.objective import DistillationObjective
from kd_lightning.pipeline.lock import held_by_ranks
from kd_lightning.pipeline.recipe import Recipe, put_around
from kd_lightning.pipeline.stage_folder import Finished
from kd_lightning.preflight import check_parts
from kd_lightning.stored_outputs import StoredOutputs, store_outputs
from kd_lightning.teachers import TeacherSource
from kd_lightning.teachers.stored import Stored


def teacher_for(
    recipe: Recipe, data: LightningDataModule, teacher: Finished | None, stages: Path
) -> TeacherSource | None:
    """Return the source of a stage's teacher; stored outputs are put around the training set of its data."""
    if not recipe.is_taught:
        return None
    if teacher is None:
        return recipe.source()
    if recipe.stored_outputs is None:
        return recipe.source(teacher.network())
    path = _path(recipe, data, teacher, stages)
    # Beneath what is around already: it looks at the data set itself.
    inner = partial(StoredOutputs, path=path, teacher=teacher.network())
    around = list(getattr(data, "around", ()))
    data.around = []  # type: ignore[attr-defined]
    for wrap in (inner, *around):
        put_around(data, wrap)
    return Stored()


def with_members(recipe: Recipe, finished: Mapping[str, Finished]) -> Recipe:
    """Let the source of a recipe have the networks of its further teachers, and its config say which these are."""
    if not recipe.members:
        return recipe
    members, source = [finished[label] for label in recipe.members], recipe.source
    return replace(
        recipe,
        config={**recipe.config, "members": [member.folder.identity() for member in members]},
        source=lambda network: source(network, *(member.network() for member in members)),
        members=(),
    )


def store(recipe: Recipe, teacher: Finished, stages: Path) -> None:
    """Write the teacher's outputs for the images that a recipe trains on, where they are not there yet.

    Raises:
        ValueError: For losses that look into the teacher's network.
    """
    assert recipe.stored_outputs is not None
    objective = DistillationObjective(recipe.losses())
    check_parts(Stored(), objective)
    data = recipe.data(role=recipe.role, seed=recipe.seed)
    data.prepare_data()
    data.setup("fit")
    path = _path(recipe, data, teacher, stages)
    with held_by_ranks(path, f"the storing of the teacher's outputs for {recipe.name}"):
        store_outputs(
            teacher.network(),
            data.training_set(),  # type: ignore[attr-defined]
            path,
            views=recipe.stored_outputs["views"],
            format=recipe.stored_outputs["format"],
            layers=objective.teacher_layers,
            seed=recipe.seed,
        )


def _path(recipe: Recipe, data: LightningDataModule, teacher: Finished, stages: Path) -> Path:
    """Name the folder by all that its content depends on, so that variants with the same needs share it."""
    content = {
        "teacher": teacher.folder.identity(),
        "data": data.fingerprint(),  # type: ignore[attr-defined]
        "layers": DistillationObjective(recipe.losses()).teacher_layers,
        "seed": recipe.seed,  # of the augmentation
        **dict(recipe.stored_outputs or {}),
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return stages / f"outputs-{digest[:12]}"
