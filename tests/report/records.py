"""Records of pipelines without training: a verdict with chosen figures, and outputs that are drawn."""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from kd_lightning.data.contract import Data
from kd_lightning.losses import KD, HardLabel
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.knowledge import thinned
from kd_lightning.pipeline.report_tasks import Distilled, of_outputs
from kd_lightning.pipeline.soft_outputs import SoftOutputs
from kd_lightning.records import strict
from kd_lightning.report.verdict_json import as_dict
from kd_lightning.tasks import (
    Batch,
    Classification,
    Embedding,
    LanguageModelling,
    MultiLabel,
    Regression,
    Segmentation,
    TokenClassification,
)
from kd_lightning.tokens import Characters
from tests.pipeline.finished_runs import TASK, everything, latency, measured, sweep

UNITS = 40
MODELS = {"teacher": 1, "student": 2, "control": 2, "distilled": 2}
TEXT = "To be, or not to be: that is the question.\n"


def verdict(results=None, **options):
    files = {"teacher": {"file_mb": 0.43} | latency(0.4, 900), "student": {"file_mb": 0.03} | latency(0.1, 9000)}
    files |= {"distilled": {"file_mb": 0.03} | latency(0.1, 9000)}
    files |= {"distilled PTQ int8": {"integer_operators": 3} | latency(0.08, 9000)}
    results = measured(everything(), **files) if results is None else results
    return compare(results, TASK, runtime="ONNX Runtime", processor="AVX2", **options)


def record(of=None, task=TASK, **parts: Any) -> dict[str, Any]:
    """What a pipeline would have written; ``parts`` take the place of its own."""
    of = verdict() if of is None else of
    steps = range(0, 100, 10)
    curve = thinned([{step: 2 - 0.01 * step + 0.1 * seed for step in steps} for seed in range(3)])
    logged = {"train/loss/kd": curve, "train/loss/hard_label": curve, "train/loss_weighted/kd": curve, "val/acc": curve}
    details = {
        name: getattr(of, name) for name in ("seeds", "variants", "extra", "hard_labels", "ptq", "qat", "served")
    }
    return strict(
        {
            "version": 1,
            "name": "a pipeline",
            "made": "2026-01-01 12:00:00 +0000",
            "task": {"kind": type(task).__name__, "over_classes": task.over_classes, "digits": of.headline.digits},
            "verdict": as_dict(of),
            "details": details,
            "seconds": {key: [60.0 if key == "teacher" else 10.0] for key in of.models},
            "training": dict.fromkeys(of.models, logged),
            "reproduce": {
                "command": "kd-lightning seeds=[0,1,2]",
                "config": {"losses": {"kd": {"temperature": 4.0}}},
                "versions": {"torch": "2.13.0"},
                "machine": {"system": "Linux x86_64", "threads": 1, "accelerator": None},
                "data": {"module": "Somebodys", "samples/test": 2000},
                "stages": [
                    {"name": "teacher-s0", "fingerprint": "0" * 12, "weights": "1" * 12, "seconds": 60.0, "test": ""}
                ],
            },
            **parts,
        }
    )


def module(**attributes: Any) -> Any:
    return SimpleNamespace(**attributes)


def drawn(
    task: Any, inputs: torch.Tensor, target: torch.Tensor, shape: tuple[int, ...], data: Any, models: Sequence[str]
) -> dict[str, Any]:
    """What the outputs of drawn networks show: those of students are the teacher's and some noise."""
    random = np.random.default_rng(0)
    teacher = 3 * random.standard_normal((len(inputs), *shape)).astype(np.float32)
    logits = {
        name: [teacher + noise * random.standard_normal(teacher.shape).astype(np.float32) for noise in [i] * seeds]
        for i, (name, seeds) in enumerate(MODELS.items())
        if name in models
    }
    cut = len(inputs) // 2
    batches = [Batch((x,), {}, y) for x, y in ((inputs[:cut], target[:cut]), (inputs[cut:], target[cut:]))]
    outputs = SoftOutputs(batches, logits, len(inputs), 100)
    losses = {"kd": KD(temperature=4.0, weight=0.9), "hard_label": HardLabel(weight=0.1)}
    of = Distilled("distilled", losses, 4.0) if "distilled" in models else Distilled(None, {}, None)
    found = of_outputs(task, outputs, Data(data), of)
    return {**found, "looked_at": {"units": len(inputs), "of": 100, "seconds": 0.1}} if found else {}


def by_task(names: list[str] | None = None, models: Sequence[str] = tuple(MODELS)) -> dict[str, dict[str, Any]]:
    """The parts of a record that come of outputs of some models, by task."""
    random = torch.Generator().manual_seed(0)
    classes = names or ["boot", "shirt", "coat", "bag"]
    images = torch.rand(UNITS, 1, 12, 12, generator=random)
    labels = torch.arange(UNITS) % 4
    tokens = torch.from_numpy(Characters.of([TEXT]).encode(TEXT * 20)[: UNITS * 20].astype(np.int64)).view(UNITS, 20)
    size = Characters.of([TEXT]).size
    named = module(class_names=classes, mean=(0.5,), std=(0.25,))
    made = partial(drawn, models=models)
    return {
        "classification": made(Classification(), images, labels, (4,), named),
        "segmentation": made(
            Segmentation(), images, torch.randint(0, 4, (UNITS, 12, 12), generator=random), (4, 12, 12), named
        ),
        "several labels": made(MultiLabel(), images, torch.randint(0, 2, (UNITS, 4), generator=random), (4,), named),
        "rows": made(
            Regression(), torch.rand(UNITS, 5), torch.rand(UNITS, 1), (1,), module(feature_names=list("abcde"))
        ),
        "language model": made(
            LanguageModelling(per="character"),
            tokens,
            tokens.roll(-1, 1),
            (20, size),
            module(tokenizer=Characters.of([TEXT])),
        ),
        "words": made(
            TokenClassification(),
            tokens,
            tokens % 4,
            (20, 4),
            module(class_names=classes, words_of=lambda x: ["word"] * len(x)),
        ),
        "vectors": made(Embedding(), images, labels, (8,), named),
    }


def several() -> list[dict[str, Any]]:
    """Records of pipelines that differ."""
    first = record()
    second = record(verdict(sweep(), reference="T=4"), name="another <pipeline>")
    second["reproduce"]["config"] = {"losses": {"kd": {"temperature": 2.0}}}
    return [first, second]
