"""What a stage's outcome depends on."""

import hashlib
import json

from lightning.pytorch import LightningDataModule

from kd_lightning.durable_files import sha256_of
from kd_lightning.pipeline.recipe import Recipe
from kd_lightning.pipeline.stage_folder import Finished
from kd_lightning.source_code import hashes_of, package_hash


def fingerprint_of(recipe: Recipe, data: LightningDataModule, teacher: Finished | None) -> str:
    """Hash all that decides a stage's outcome: its config, data, code, teacher, and the weights it starts from."""
    config, of_data = dict(recipe.config), getattr(data, "fingerprint", None)
    if of_data is not None:
        # It speaks of this role's images: the teacher's do not change with the number of the student's labels.
        config["data"] = [of_data(), getattr(data, "batch_size", None)]
    content = {
        "config": config,
        "code": code_of(recipe),
        "teacher": teacher.folder.identity() if teacher is not None and recipe.needs_teacher else None,
        "checkpoint": recipe.checkpoint and sha256_of(recipe.checkpoint),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def code_of(recipe: Recipe) -> dict[str, str]:
    """Hash the code that a stage runs; see :mod:`kd_lightning.source_code`."""
    makes = (recipe.network, recipe.losses, recipe.data, recipe.trainer, recipe.callbacks, recipe.source)
    return {"kd_lightning": package_hash(), **hashes_of(recipe.config, (*makes, recipe.optimizer, recipe.scheduler))}
