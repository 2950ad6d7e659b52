"""Finished runs whose figures are chosen: what a comparison is tested with, without training."""

import hashlib
import io

import numpy as np
import torch
from rich.console import Console

from kd_lightning.pipeline.compare import compare
from kd_lightning.records import Quantized, Result
from kd_lightning.report.terminal import print_verdict
from kd_lightning.report.words import say
from kd_lightning.tasks import Classification, Headline, Task

N, CLASSES = 2000, 10
TARGET = np.arange(N) % CLASSES
TASK = Classification()
# Images from easy to hard, the same for every model: a model of accuracy p gets the p * N easiest right.
EASE = np.random.default_rng(0).permutation(N)
LABELS = ("teacher int8", "student int8", "distilled PTQ int8", "distilled QAT int8", "distilled 4-bit weights")


def run(role, accuracy, seed, *, label=None, target=TARGET, flips=60, val=0.5, predictions=None, figures=(), **changes):
    """A run that gets `accuracy` of the images right, the easiest but for some `flips` that its seed draws."""
    rng = np.random.default_rng([seed, *f"{role}{label}".encode()])
    n = len(target)
    right = EASE[n > EASE].argsort() < round(accuracy * n)
    if flips:
        lost, won = (rng.choice(np.flatnonzero(side), flips, replace=False) for side in (right, ~right))
        right[lost], right[won] = False, True
    answers = np.where(right, target, (target + 1) % CLASSES) if predictions is None else predictions
    scores = (answers == target).astype(float) if len(answers) == len(target) else np.zeros(len(answers))
    values = {
        "method": role,
        "answers": answers,
        "scores": scores,
        "target_digest": hashlib.sha256(target.tobytes()).hexdigest(),
        "figures": {"val": val, "train_seconds": 10.0, "params": 6000, "size_mb": 0.03} | dict(figures),
        "learned_nothing": TASK.learned_nothing(*map(torch.from_numpy, (answers, scores, target)))
        if len(answers) == len(target)
        else None,
    }
    return Result(role=role, label=label or role, seed=seed, **values | changes)


def runs(seeds=(0, 1, 2), **accuracies):
    """The usual experiment: one teacher, and every other role with all seeds."""
    return [
        run(role, accuracy, seed)
        for role, accuracy in accuracies.items()
        for seed in (seeds[:1] if role == "teacher" else seeds)
    ]


def verdict(*, extra=0, seeds=(0, 1, 2), **accuracies):
    return compare(runs(seeds=seeds, **accuracies), TASK, extra=extra)


def sweep():
    """Three distilled models, of which the best on the test images is not the best on the validation images."""
    variants = {"T=1": (0.83, 0.70), "T=2": (0.79, 0.78), "T=4": (0.78, 0.77)}  # test accuracy, validation accuracy
    return runs(teacher=0.90, student=0.74, control=0.755) + [
        run(
            "distilled",
            test,
            seed,
            label=label,
            val=val,
            temperature=float(label[2:]),
            figures={"teacher_entropy": 0.28},
        )
        for label, (test, val) in variants.items()
        for seed in range(3)
    ]


def how(source, *, training=False, bits=(8, 8), **changes):
    return Quantized(source=source, training=training, weight_bits=bits[0], activation_bits=bits[1], **changes)


def quantized(label, accuracy, source, seeds=(0, 1, 2), *, val=0.5, flips=60, figures=(), **of):
    measured = {"quantized_layers": 4, "integer_operators": 4, "agreement_fp32": 0.97}
    measured |= {"agreement_file": 0.999, "file_mb": 0.02} | dict(figures)
    made = how(source, **of)
    return [
        run("quantized", accuracy, s, label=label, val=val, flips=flips, quantized=made, figures=measured)
        for s in seeds
    ]


def everything(*, ptq=0.80, qat=0.80, continued=0.80, control=0.755, source="distilled", **changes):
    return [
        *quantized("distilled PTQ int8", ptq, source, **changes),  # in another order than they shall have
        *runs(teacher=0.90, student=0.74, control=control, distilled=0.80, continued=continued),
        *quantized("teacher int8", 0.90, "teacher", seeds=(0,), figures={"file_mb": 0.12}),
        *quantized("distilled QAT int8", qat, source, training=True),
        *quantized("distilled 4-bit weights", 0.60, source, bits=(4, None)),
        *quantized("student int8", 0.74, "student"),
    ]


def measured(results, **by_label):
    """The same runs with further figures, by label (``_`` for a blank)."""
    further = {label.replace("_", " "): figures for label, figures in by_label.items()}
    changed = []
    for result in results:
        values = {key: value for key, value in vars(result).items() if key != "figures"}
        changed.append(Result(**values, figures={**result.figures, **further.get(result.label, {})}))
    return changed


def latency(p50, per_s, prefix=""):
    named = {"latency_ms_p50": p50, "latency_ms_p95": 1.5 * p50, "throughput_per_s": per_s}
    return {prefix + key: value for key, value in named.items()}


class Judged(Task):
    """A task of which the headline is all that matters; answers agree where they are the same."""

    def __init__(self, over_classes: bool = False, **headline) -> None:
        self.headline, self.over_classes = Headline(**headline), over_classes

    def agreement(self, student, teacher):
        return torch.eq(student, teacher).flatten(1).all(1).double()


def scored(role, scores, seed=0, *, val=1.0, **changes):
    """A run by its scores."""
    values = {"label": role, "method": role, "answers": np.zeros((len(scores), 1)), "target_digest": ""}
    values |= {"scores": np.asarray(scores, dtype=float), "figures": {"val": val}}
    return Result(role=role, seed=seed, **values | changes)


def said(verdict):
    """All that is said, in one line."""
    words = say(verdict)
    return " ".join([words.sentence, *words.findings, *words.warnings])


def printed(verdict, width=80):
    file = io.StringIO()
    print_verdict(verdict, Console(file=file, width=width))
    return file.getvalue()
