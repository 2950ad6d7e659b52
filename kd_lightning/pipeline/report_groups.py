"""The headline on parts of the test units: classes, texts, ranges of the target. Of answers on the whole test split.

A task of another kind has none; :func:`groups` can be told of it with ``register``, as any
``functools.singledispatch``.
"""

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.data.contract import Data
from kd_lightning.pipeline.folder import FinishedStage
from kd_lightning.pipeline.shown_inputs import as_classes
from kd_lightning.tasks import Classification, LanguageModelling, Regression, Task

_MOST_GROUPS = 120
Array = NDArray[Any]


def of_answers(task: Task, labels: Mapping[str, Sequence[FinishedStage]], data: Data) -> dict[str, Any]:
    """Return the headline and the agreement with the teacher on parts of the test units, by model.

    Args:
        task: Says which parts there are.
        labels: The stages of each model, one a seed.
        data: Set up for the test.
    """
    scores = {key: [stage.result.scores for stage in stages] for key, stages in labels.items()}
    by_class = next(iter(scores.values()))[0].ndim == 3 and task.headline.of_mean is not None
    names, places = _classes_of(task, scores, data) if by_class else groups(task, data)
    if len(names) < 2 or len(names) > _MOST_GROUPS:
        return {}

    def quality(of: Array, i: int) -> float:
        if not by_class:
            return task.headline.value(of[places[i]]) if places[i].any() else float("nan")
        assert task.headline.of_mean is not None
        return float(task.headline.of_mean(of.mean(0)[i : i + 1]))

    found = {key: np.array([[quality(one, i) for i in range(len(names))] for one in of]) for key, of in scores.items()}
    teacher = found.get("teacher")
    by_model = {}
    for key, values in found.items():
        mean = values.mean(0)
        by_model[key] = {"mean": mean.tolist(), "low": values.min(0).tolist(), "high": values.max(0).tolist()}
        if teacher is not None:
            good, best = (mean, teacher.mean(0)) if task.headline.higher_is_better else (teacher.mean(0), mean)
            with np.errstate(invalid="ignore", divide="ignore"):
                by_model[key]["retention"] = (good / best).tolist()
            if not by_class:
                by_model[key]["agreement"] = _agreement(task, labels[key], labels["teacher"], places)
    counts = None if by_class else [int(place.sum()) for place in places]
    return {
        "groups": {
            "by": "class" if by_class else _named_by(task),
            "names": list(names),
            "count": counts,
            "models": by_model,
        }
    }


def _named_by(task: Task) -> str:
    return {LanguageModelling: "text", Regression: "target"}.get(type(task), "class")


def _classes_of(task: Task, scores: Mapping[str, Sequence[Array]], data: Data) -> tuple[list[str], list[Array]]:
    count = next(iter(scores.values()))[0].shape[1]
    names = data.class_names
    return (list(names[:count]) if names is not None else [str(i) for i in range(count)]), []


def _agreement(
    task: Task, stages: Sequence[FinishedStage], teacher: Sequence[FinishedStage], places: Sequence[Array]
) -> list[float] | None:
    """Return how far a model's answers agree with the teacher's, by part, over its seeds."""
    reference = teacher[0].result.answers
    if np.shape(stages[0].result.answers) != np.shape(reference) or len(reference) != len(places[0]):
        return None
    found = []
    for stage in stages:
        same = task.agreement(torch.from_numpy(stage.result.answers), torch.from_numpy(reference)).numpy()
        if len(same) != len(places[0]):
            return None
        found.append([float(same[place].mean()) if place.any() else float("nan") for place in places])
    return np.mean(found, 0).tolist()  # type: ignore[no-any-return]


@singledispatch
def groups(task: Task, data: Data) -> tuple[Sequence[str], Sequence[Array]]:
    """Return parts of the labelled test units that are looked at on their own, by name: none unless a task says so."""
    return [], []


@groups.register
def _(task: Classification, data: Data) -> tuple[Sequence[str], Sequence[Array]]:
    labels = _targets(task, data)
    if labels is None or labels.ndim != 1:
        return [], []
    labels = as_classes(labels)
    classes = range(int(labels.max()) + 1)
    names = data.class_names or [str(i) for i in classes]
    return [names[i] for i in classes], [labels[labels >= 0] == i for i in classes]


@groups.register
def _(task: LanguageModelling, data: Data) -> tuple[Sequence[str], Sequence[Array]]:
    found = data.test_groups
    if found is None:
        return [], []
    names, of_unit = found
    return names, [np.asarray(of_unit) == i for i in range(len(names))]


@groups.register
def _(task: Regression, data: Data) -> tuple[Sequence[str], Sequence[Array]]:
    target = _targets(task, data)
    if target is None or target.shape[1] != 1:
        return [], []
    values = target[~np.isnan(target[:, 0]), 0]
    std, mean = (float(getattr(data.module, f"target_{name}", x)) for name, x in (("std", 1.0), ("mean", 0.0)))
    edges = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    inner = np.digitize(values, edges[1:-1])
    edges = edges * std + mean
    names = [f"{edges[i]:.3g} to {edges[i + 1]:.3g}" for i in range(4)]
    return names, [inner == i for i in range(4)]


def _targets(task: Task, data: Data) -> Array | None:
    targets = [task.read(batch).target for batch in data.test_dataloader()]
    some = [target for target in targets if isinstance(target, torch.Tensor)]
    return torch.cat(some).cpu().numpy() if some and len({target.shape[1:] for target in some}) == 1 else None
