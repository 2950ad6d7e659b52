"""Test units that are chosen by rule, with what teacher and students say of them.

The rules: where the teacher knows most beyond its answer (the entropy of what it says), where teacher and distilled
student say most different things (the Jensen–Shannon divergence, from 0 to 1 bit), and some drawn by lot.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_lightning.data.contract import Data
from kd_lightning.pipeline.knowledge import choose, divergence, entropy, softmax
from kd_lightning.pipeline.shown_inputs import Shows, colour, image, mask, top, unit_of
from kd_lightning.tasks import Batch

Array = NDArray[Any]
Example = dict[str, Any]

_EACH = 4
_CONTEXT = 12  # tokens before the first place that is shown: with less there is little to know


def of_classes(
    logits: Mapping[str, Array],
    labels: Array,
    where: Array,
    batches: Sequence[Batch],
    shows: Shows,
    temperature: float | None,
    key: str | None,
    texts: bool,
) -> list[Example]:
    """Return examples of one class each: images, rows, tokens.

    Args:
        logits: By model, (P, C).
        labels: (P,).
        where: (P, 1), the unit of each place; (P, 2), unit and place in it.
        batches: The units.
        shows: Shows them.
        temperature: T at which the distilled student was trained; None for none.
        key: Of the distilled student.
        texts: Whether places are in a row, of which the first have no context.
    """
    p = {name: softmax(of) for name, of in logits.items()}
    possible = where[:, 1] >= _CONTEXT if texts and (where[:, 1] >= _CONTEXT).any() else np.ones(len(labels), bool)
    scores = {"knowledge": entropy(p["teacher"])}
    if key is not None and key in p:
        scores["disagreement"] = divergence(p["teacher"], p[key])
    found = []
    for i, by_rule in _chosen(scores, labels, possible):
        one = {name: of[i] for name, of in p.items()}
        classes = top(one, int(labels[i]))
        said = {name: [float(of[c]) for c in classes] for name, of in one.items()}
        if temperature is not None and temperature != 1:
            soft = softmax(logits["teacher"][i : i + 1], temperature)[0]
            said = {"teacher": said["teacher"], "teacher at T": [float(soft[c]) for c in classes], **said}
        batch, unit = unit_of(batches, int(where[i, 0]))
        shown = shows(batch, unit, int(where[i, 1]) if where.shape[1] == 2 else None)
        found.append(
            {
                **by_rule,
                "input": shown,
                "label": int(labels[i]),
                "classes": classes,
                "says": said,
                "answers": {name: int(of.argmax()) for name, of in one.items()},
            }
        )
    return found


def of_images(
    logits: Mapping[str, Array], target: Array, batches: Sequence[Batch], shows: Shows, key: str | None
) -> list[Example]:
    """Return images with a class at each pixel: the map of each model, and where the teacher doubts.

    Args:
        logits: By model, (n, H, W, C).
        target: (n, H, W), below 0 where there is no label.
        batches: The units.
        shows: Shows them.
        key: Of the distilled student.
    """
    p = {name: softmax(of) for name, of in logits.items()}
    scores = {"knowledge": entropy(p["teacher"]).mean((1, 2))}
    if key is not None and key in p:
        scores["disagreement"] = divergence(p["teacher"], p[key]).mean((1, 2))
    found = []
    for i, by_rule in _chosen(scores):
        batch, unit = unit_of(batches, i)
        doubt = (255 * (1 - p["teacher"][i].max(-1))).round().astype(np.uint8)[None]
        answers = {name: of[i].argmax(-1) for name, of in p.items()}
        known = target[i] >= 0
        found.append(
            {
                **by_rule,
                "input": shows(batch, unit),
                "maps": {"label": mask(target[i]), **{name: mask(of) for name, of in answers.items()}},
                "doubt": image(doubt),
                "right": {name: float((of == target[i])[known].mean()) for name, of in answers.items()},
                "colours": [colour(c) for c in range(logits["teacher"].shape[-1])],
            }
        )
    return found


def of_labels(
    logits: Mapping[str, Array], target: Array, batches: Sequence[Batch], shows: Shows, key: str | None
) -> list[Example]:
    """Return examples with several labels, each of which is set or not. Shape: logits and target (n, L)."""
    p = {name: 1 / (1 + np.exp(-of.astype(np.float64))) for name, of in logits.items()}

    def both(of: Array) -> Array:
        return np.stack([of, 1 - of], -1)

    scores = {"knowledge": entropy(both(p["teacher"])).mean(1)}
    if key is not None and key in p:
        scores["disagreement"] = divergence(both(p["teacher"]), both(p[key])).mean(1)
    found = []
    for i, by_rule in _chosen(scores):
        batch, unit = unit_of(batches, i)
        first = np.argsort(-p["teacher"][i], kind="stable")[:4].tolist()
        classes = list(dict.fromkeys([*first, *np.flatnonzero(target[i] > 0.5).tolist()]))[:6]
        found.append(
            {
                **by_rule,
                "input": shows(batch, unit),
                "set": [int(c) for c in np.flatnonzero(target[i] > 0.5)],
                "classes": [int(c) for c in classes],
                "says": {name: [float(of[i, c]) for c in classes] for name, of in p.items()},
            }
        )
    return found


def of_values(
    values: Mapping[str, Array], target: Array, batches: Sequence[Batch], data: Data, key: str | None
) -> dict[str, Any]:
    """Return what a regression shows: the first value of each unit against its target, and rows. Shape: (n, D)."""
    shows, truth = Shows(data.module), target[:, 0]
    known = ~np.isnan(truth)
    some = np.flatnonzero(known)[:: max(1, int(known.sum()) // 300)]
    points = {
        "target": truth[some].tolist(),
        "values": {name: of[some, 0].tolist() for name, of in values.items()},
    }
    off = np.abs(values["teacher"][:, 0] - truth)
    scores = {"error": off}
    if key is not None and key in values:
        scores["disagreement"] = np.abs(values["teacher"][:, 0] - values[key][:, 0])
    examples = []
    for i, by_rule in _chosen(scores, possible=known):
        batch, unit = unit_of(batches, i)
        examples.append(
            {
                **by_rule,
                "input": shows(batch, unit),
                "target": float(truth[i]),
                "values": {name: float(of[i, 0]) for name, of in values.items()},
            }
        )
    return {"points": points, "examples": examples}


def _chosen(
    scores: Mapping[str, Array], groups: Array | None = None, possible: Array | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield units by each rule, and some drawn by lot: none twice; with the rule, and how the unit scores by it.

    Args:
        scores: By rule: (n,).
        groups: (n,), of each of which there is one while there are others; each unit its own unless given.
        possible: bool (n,), which may be chosen; all unless given.
    """
    count = len(next(iter(scores.values())))
    groups = np.arange(count) if groups is None else groups
    free = np.ones(count, dtype=bool) if possible is None else possible.copy()
    for rule, score in {**scores, "lot": np.random.default_rng(0).random(count)}.items():
        for i in choose(np.where(free, score, -np.inf), groups, _EACH):
            free[i] = False
            yield i, {"rule": rule, "score": float(score[i])}


def of_neighbours(
    vectors: Mapping[str, Array], batches: Sequence[Batch], shows: Shows, key: str | None, each: int = 3
) -> list[Example]:
    """Return units with those nearest to them by each model's vectors: nothing where units cannot be shown.

    Shape: vectors (n, D) by model, where D may differ.
    """
    count = len(vectors["teacher"])
    first = shows(*unit_of(batches, 0)) if count > each else None
    if first is None or first["kind"] == "row":
        return []
    found = []
    for i in np.random.default_rng(0).choice(count, min(2 * _EACH, count), replace=False):
        order = {}
        for name, of in vectors.items():
            unit = of / np.maximum(np.linalg.norm(of, axis=1, keepdims=True), 1e-12)
            cosine = unit @ unit[i]
            cosine[i] = -np.inf
            order[name] = [(int(j), float(cosine[j])) for j in np.argsort(-cosine, kind="stable")[:each]]
        teachers = {j for j, _ in order["teacher"]}
        nearest = {
            name: [
                {"unit": j, "cosine": cosine, "shared": j in teachers, "input": shows(*unit_of(batches, j))}
                for j, cosine in several
            ]
            for name, several in order.items()
        }
        found.append({"rule": "lot", "score": 0.0, "input": shows(*unit_of(batches, int(i))), "nearest": nearest})
    return found
