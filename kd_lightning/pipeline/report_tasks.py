"""What outputs say of the teacher's knowledge and of how far students have it: for each kind of task.

A task of another kind has the other sections of the report; :func:`of_outputs` can be told of it with ``register``, as
any ``functools.singledispatch``.
"""

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.data.contract import Data
from kd_lightning.losses import KD, HardLabel
from kd_lightning.pipeline import knowledge
from kd_lightning.pipeline.report_examples import of_classes, of_images, of_labels, of_neighbours, of_values
from kd_lightning.pipeline.shown_inputs import Shows, as_classes
from kd_lightning.pipeline.soft_outputs import SoftOutputs
from kd_lightning.tasks import (
    Classification,
    Embedding,
    LanguageModelling,
    MultiLabel,
    Regression,
    Segmentation,
    Task,
    TokenClassification,
)

_MOST_SHOWN_CLASSES = 12
Array = NDArray[Any]


class Distilled(NamedTuple):
    """The distilled student that the verdict is about.

    Attributes:
        key: Among the outputs' models; None where there is none.
        losses: By name.
        temperature: At which its training began.
    """

    key: str | None = None
    losses: Mapping[str, Any] = {}
    temperature: float | None = None


@singledispatch
def of_outputs(task: Task, outputs: SoftOutputs, data: Data, distilled: Distilled) -> dict[str, Any]:
    """Return what the outputs of teacher and students show: nothing of an unknown task.

    Args:
        task: Says what outputs are.
        outputs: Of the same test units, by model.
        data: Shows the units.
        distilled: The student that the verdict is about.
    """
    return {}


@of_outputs.register
def _(task: Classification, outputs: SoftOutputs, data: Data, distilled: Distilled) -> dict[str, Any]:
    target = outputs.target
    if target is None or len({of.shape for several in outputs.logits.values() for of in several}) != 1:
        return {}  # other numbers of classes
    every = {name: [_last(of) for of in several] for name, several in outputs.logits.items()}
    labels = task.labels(torch.from_numpy(target)).numpy().reshape(-1)
    known = labels >= 0
    classes = every["teacher"][0].shape[-1]
    logits = {name: [of.reshape(-1, classes)[known] for of in several] for name, several in every.items()}
    labels = labels[known]
    if not len(labels):
        return {}
    shows = Shows(data.module)
    names = _class_names(task, classes, labels, data, shows)
    found: dict[str, Any] = {"classes": names, "places": len(labels)}
    found |= _structure(logits, labels, names)
    found["temperature"] = _temperature(logits, labels, distilled)
    where = np.argwhere(known.reshape(target.shape[: every["teacher"][0].ndim - 1]))
    if isinstance(task, Segmentation):
        maps = {name: _last(several[0]) for name, several in outputs.logits.items()}
        found["examples"] = of_images(maps, as_classes(target), outputs.batches, shows, distilled.key)
    else:
        first = {name: several[0] for name, several in logits.items()}
        texts = isinstance(task, TokenClassification)
        key, _, used = distilled
        found["examples"] = of_classes(first, labels, where, outputs.batches, shows, used, key, texts)
    return found


@of_outputs.register
def _(task: MultiLabel, outputs: SoftOutputs, data: Data, distilled: Distilled) -> dict[str, Any]:
    target = outputs.target
    if target is None:
        return {}
    known = target >= 0
    right = target > 0.5
    calibrations: dict[str, list[dict[str, Any]]] = {}
    for name, several in outputs.logits.items():
        for of in several:
            p = 1 / (1 + np.exp(-of.astype(np.float64)))
            sure, same = np.maximum(p, 1 - p)[known], ((p > 0.5) == right)[known]
            calibrations.setdefault(name, []).append(knowledge.calibration(sure, same)._asdict())
    shows = Shows(data.module)
    classes = list(data.class_names or map(str, range(target.shape[1])))
    first = {name: several[0] for name, several in outputs.logits.items()}
    examples = of_labels(first, target, outputs.batches, shows, distilled.key)
    yes = first["teacher"][known]
    yes_or_no = np.stack([yes, np.zeros_like(yes)], -1)
    soft = {"used": distilled.temperature, **knowledge.over_temperatures(yes_or_no)}  # of each label
    found = {"classes": classes, "places": int(known.sum()), "calibration": calibrations, "examples": examples}
    return {**found, "temperature": soft}


@of_outputs.register
def _(task: Regression, outputs: SoftOutputs, data: Data, distilled: Distilled) -> dict[str, Any]:
    target = outputs.target
    if target is None:
        return {}
    std, mean = (float(getattr(data.module, f"target_{name}", x)) for name, x in (("std", 1.0), ("mean", 0.0)))
    values = {name: several[0] * std + mean for name, several in outputs.logits.items()}
    target = task.target_of(torch.from_numpy(target)).numpy() * std + mean
    return of_values(values, target, outputs.batches, data, distilled.key)


@of_outputs.register
def _(task: Embedding, outputs: SoftOutputs, data: Data, distilled: Distilled) -> dict[str, Any]:
    first = {name: several[0] for name, several in outputs.logits.items()}
    examples = of_neighbours(first, outputs.batches, Shows(data.module), distilled.key)
    return {"examples": examples} if examples else {}


def _last(logits: Array) -> Array:
    """Put the classes of (n, C, H, W) last."""
    return np.moveaxis(logits, 1, -1) if logits.ndim == 4 else logits


def _class_names(task: Task, classes: int, labels: Array, data: Data, shows: Shows) -> dict[int, str]:
    names = data.class_names
    if isinstance(task, LanguageModelling) and shows.spells:
        return {i: shows.spelling(i) for i in range(classes)} if classes <= 2000 else _Spelled(shows)
    return {i: names[i] if names is not None and i < len(names) else str(i) for i in range(classes)}


class _Spelled(dict[int, str]):
    """Tokens of a large vocabulary, of which few are shown."""

    def __init__(self, shows: Shows) -> None:
        super().__init__()
        self._shows = shows

    def __missing__(self, token: int) -> str:
        self[token] = self._shows.spelling(token)
        return self[token]


def _structure(logits: Mapping[str, Sequence[Array]], labels: Array, names: Mapping[int, str]) -> dict[str, Any]:
    """Return which classes resemble which to each model, and how far it is calibrated."""
    calibrations: dict[str, list[dict[str, Any]]] = {}
    maps: dict[str, list[Array]] = {}
    few = 3 <= logits["teacher"][0].shape[1] <= knowledge.MOST_RESEMBLANCES
    for name, several in logits.items():
        for of in several:
            p = knowledge.softmax(of)
            found = knowledge.calibration(p.max(-1), p.argmax(-1) == labels)
            calibrations.setdefault(name, []).append(found._asdict())
            if few:
                maps.setdefault(name, []).append(knowledge.resemblance(p, labels))
    if not few:
        return {"calibration": calibrations}
    teacher = maps["teacher"][0]
    frequent = np.argsort(-np.bincount(labels, minlength=len(teacher)), kind="stable")[:_MOST_SHOWN_CLASSES]
    shown = np.sort(frequent) if len(teacher) <= _MOST_SHOWN_CLASSES else frequent
    mean = {name: np.mean(several, 0) for name, several in maps.items()}
    inherited = {
        name: [x for of in several if (x := knowledge.inherited(of, teacher)) is not None]
        for name, several in maps.items()
        if name != "teacher"
    }
    return {
        "calibration": calibrations,
        "resemblance": {
            "classes": [int(i) for i in shown],
            "maps": {name: of[np.ix_(shown, shown)].tolist() for name, of in mean.items()},
            "inherited": inherited,
            "pairs": len(teacher) * (len(teacher) - 1),
            "nearest": [
                {
                    "class": int(i),
                    "other": (other := int(np.nan_to_num(mean["teacher"][i]).argmax())),
                    "share": {name: float(of[i, other]) for name, of in mean.items()},
                    "rank": {name: int((np.nan_to_num(of[i]) > of[i, other]).sum()) + 1 for name, of in mean.items()},
                }
                for i in shown
                if np.isfinite(mean["teacher"][i]).all()
            ],
        },
    }


def _temperature(logits: Mapping[str, Sequence[Array]], labels: Array, distilled: Distilled) -> dict[str, Any]:
    key, losses, used = distilled
    teacher = logits["teacher"][0]
    found: dict[str, Any] = {"used": used, **knowledge.over_temperatures(teacher)}
    soft = next((loss for loss in losses.values() if type(loss) is KD and not loss.standardize), None)
    hard = next((loss for loss in losses.values() if type(loss) is HardLabel), None)
    if soft is not None and key is not None and key in logits:
        weights = float(soft.weight), float(hard.weight) if hard is not None else 0.0
        found["weights"] = weights
        if hard is not None:
            found["gradient"] = {
                "at the start": knowledge.gradient_share(np.zeros_like(teacher), teacher, labels, weights),
                "at the end": knowledge.gradient_share(logits[key][0], teacher, labels, weights),
            }
    return found
