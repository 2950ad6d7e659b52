"""Where the outputs of a student's teacher come from: what the chosen source takes, and whose networks it gets."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from kd_lightning.durable_files import sha256_of
from kd_lightning.objective import DistillationObjective
from kd_lightning.pipeline.recipe import Recipe
from kd_lightning.teachers import Stored, Teacher, TeacherSource


def taught_through(
    recipe: Recipe,
    source: Mapping[str, Any],
    make: Callable[..., Any],
    instantiate: Callable[[Mapping[str, Any]], Callable[..., TeacherSource]],
    taught_by: str,
    members: Sequence[str] = (),
) -> Recipe:
    """Let a recipe have a source, which gets what it takes and its configuration does not give.

    That is the network of the model ``taught_by`` for a ``network``, those of the members for ``teachers``, and what
    the losses read of the teacher for ``layers``.

    Args:
        recipe: Of a student that is taught.
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
            given["layers"] = DistillationObjective(recipe.losses()).teacher_layers
        return instantiate({key: value for key, value in source.items() if key not in given})(**given)

    return replace(
        recipe,
        method=recipe.method if make is Teacher else f"{recipe.method}-{make.__name__}",
        config={**recipe.config, "teachers": source, "checkpoints": dict(_digests(source))},
        taught_by=labels[0] if labels else None,
        members=labels[1:],
        source=made,
    )


def through_stored_outputs(
    recipe: Recipe, make: Callable[..., Any], taught_by: str, stored_outputs: Mapping[str, Any]
) -> Recipe:
    """Let a recipe read its teacher's outputs from the disk, where they are written before its training.

    Raises:
        ValueError: For another source than the network itself.
    """
    if make not in (Teacher, Stored):
        raise ValueError(
            f"the stage store_outputs writes what one network gives, expected teachers=stored, got {make.__name__}: "
            "choose that, or leave the stage out"
        )
    config = {**recipe.config, "stored_outputs": stored_outputs}
    return replace(recipe, config=config, taught_by=taught_by, stored_outputs=stored_outputs)


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
