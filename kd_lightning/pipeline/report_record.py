"""``report.json``: all that the report shows, as numbers, computed once at the end of a pipeline.

:mod:`kd_lightning.report.html` says it, from this file alone: no network is needed to make the page again.
"""

import hashlib
import json
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_lightning.data.contract import Data
from kd_lightning.durable_files import write_atomically
from kd_lightning.pipeline.folder import FinishedStage
from kd_lightning.pipeline.knowledge import thinned
from kd_lightning.pipeline.report_groups import of_answers
from kd_lightning.pipeline.report_tasks import Distilled, of_outputs
from kd_lightning.pipeline.soft_outputs import soft_outputs
from kd_lightning.quantization import quantized_layers
from kd_lightning.records import Verdict, strict
from kd_lightning.report.verdict_json import as_dict
from kd_lightning.source_code import hash_of
from kd_lightning.tasks import Task
from kd_lightning.tracking.calls import without_credentials
from kd_lightning.tracking.journal import history

VERSION = 1
_OF_NETWORKS = (
    *("classes", "places", "examples", "points", "calibration", "resemblance", "temperature", "looked_at", "layers"),
)
_PACKAGES = ("kd-lightning", "torch", "lightning", "onnxruntime", "openvino", "mlflow", "numpy")


def write_record(
    path: Path,
    *,
    name: str,
    task: Task,
    verdict: Verdict,
    finished: Sequence[FinishedStage],
    data: Data,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Compute what the report shows, and write it beside ``verdict.json``.

    Args:
        path: Of ``report.json``.
        name: Of the pipeline.
        task: What a good answer is.
        verdict: What was decided.
        finished: All stages that are rows of the verdict.
        data: Set up for the test.
        config: Of the pipeline.

    Returns:
        What was written.
    """
    labels, stages = _labels(verdict, finished), [_stage(stage) for stage in finished]
    shown = {key: labels[key] for key in ("teacher", "student", "control", verdict.distilled) if key in labels}
    record = {
        "version": VERSION,
        "name": name,
        "made": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "task": {"kind": type(task).__name__, "over_classes": task.over_classes, "digits": task.headline.digits},
        "verdict": as_dict(verdict),
        **_of_the_verdict(verdict),
        "seconds": _seconds(labels),
        "training": {key: _curves(stages) for key, stages in labels.items()},
        **of_answers(task, labels, data),
        **(_before(path, stages) or {**_of_networks(task, shown, verdict, data), "layers": _layers(labels)}),
        "computed_by": _computed_by(),
        "reproduce": {**_reproduce(data, config), "stages": stages},
    }
    record = strict(record)
    write_atomically(path, (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return record


def _labels(verdict: Verdict, finished: Sequence[FinishedStage]) -> dict[str, list[FinishedStage]]:
    """Return the stages of each of the verdict's models, in the order of their seeds, by the verdict's keys."""
    by_label: dict[str, list[FinishedStage]] = {}
    for stage in sorted(finished, key=lambda stage: stage.result.seed):
        by_label.setdefault(stage.result.label, []).append(stage)
    named = {key: by_label.get(key) for key in verdict.models}
    of_role = {stages[0].result.role: stages for stages in by_label.values()}
    return {key: stages or of_role[verdict.models[key].role] for key, stages in named.items()}


def _of_the_verdict(verdict: Verdict) -> dict[str, Any]:
    """Return what ``verdict.json`` does not have."""
    names = ("seeds", "variants", "extra", "hard_labels", "ptq", "qat", "served")
    return {"details": {name: getattr(verdict, name) for name in names}}


def _seconds(labels: Mapping[str, Sequence[FinishedStage]]) -> dict[str, list[float]]:
    """Return how long each model was trained, by seed."""
    return {
        key: [float(stage.result.figures.get("train_seconds", 0)) for stage in stages] for key, stages in labels.items()
    }


def _curves(stages: Sequence[FinishedStage]) -> dict[str, Any]:
    """Return what was logged while a model was trained: mean and range over its seeds."""
    logged = [history(stage.folder.path) for stage in stages]
    names = dict.fromkeys(name for one in logged for name in one if not name.startswith(("final/", "data/", "epoch")))
    found = {}
    for name in names:
        curves = [{step: x for step, x in one[name] if np.isfinite(x)} for one in logged if name in one]
        if any(curves):
            found[name] = thinned([curve for curve in curves if curve])
    return found


def _layers(labels: Mapping[str, Sequence[FinishedStage]]) -> dict[str, list[dict[str, Any]]]:
    """Return what became of each layer of the quantised networks."""
    quantised = {key: stages[0] for key, stages in labels.items() if stages[0].result.quantized is not None}
    return {
        key: [{"name": x.name, "bits": x.weight_bits, "note": x.note} for x in quantized_layers(stage.network())]
        for key, stage in quantised.items()
    }


def _of_networks(
    task: Task, shown: Mapping[str, Sequence[FinishedStage]], verdict: Verdict, data: Data
) -> dict[str, Any]:
    """Return what outputs say, of the teacher, the student alone, the control and the distilled student."""
    if "teacher" not in shown or len(shown) < 2:
        return {}
    begun = time.perf_counter()
    networks = {key: [stage.network() for stage in stages] for key, stages in shown.items()}
    outputs = soft_outputs(task, networks, data.test_dataloader(), len(shown["teacher"][0].result.answers))
    if outputs is None:
        return {}
    key = verdict.distilled
    chosen = shown[key][0].training if key is not None and key in shown else None
    temperature = verdict.models[key].temperature if key is not None else None
    begun_at = temperature[0] if isinstance(temperature, tuple) else temperature
    distilled = Distilled(key, chosen.losses() if chosen is not None else {}, begun_at)
    found = of_outputs(task, outputs, data, distilled)
    looked_at = {"units": outputs.units, "of": outputs.total, "seconds": time.perf_counter() - begun}
    return {**found, "looked_at": looked_at} if found else {}


def _before(path: Path, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return what an earlier record has of the outputs of the very same networks, by the same code; None of others."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        same = record["reproduce"]["stages"] == strict({"": stages})[""] and record["computed_by"] == _computed_by()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {name: record[name] for name in _OF_NETWORKS if name in record} if same else None


@cache
def _computed_by() -> str:
    """Hash what computes of outputs what is shown."""
    digest = hashlib.sha256()
    for name in ("knowledge", "report_examples", "report_tasks", "shown_inputs", "soft_outputs"):
        digest.update(hash_of((Path(__file__).parent / f"{name}.py").read_bytes()).encode())
    return digest.hexdigest()[:12]


def _stage(stage: FinishedStage) -> dict[str, Any]:
    return {
        "name": stage.training.name,
        "fingerprint": stage.folder.fingerprint[:12],
        "weights": stage.folder.identity().partition(" ")[2][:12],
        "seconds": stage.result.figures.get("train_seconds"),
        "test": stage.result.target_digest[:12],
    }


def _reproduce(data: Data, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "command": _command(),
        "config": _clean(json.loads(json.dumps(config, default=str))),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "data": {"module": type(data.module).__name__, **_digest(data), **data.described},
    }


def _digest(data: Data) -> dict[str, str]:
    """Return what tells the student's training, validation and test samples from others."""
    found = data.fingerprint()
    return {} if found is None else {"digest": hashlib.sha256(str(found[0]).encode()).hexdigest()[:12]}


def _command() -> str | None:
    """Return the command that was given, if it was this package's."""
    program = Path(sys.argv[0])
    if program.name == "kd-lightning" or program.parent.name == "kd_lightning":
        return without_credentials(shlex.join(["kd-lightning", *sys.argv[1:]]))
    return None


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _clean(part: Any) -> Any:
    """Return a configuration without anybody's password."""
    if isinstance(part, Mapping):
        return {key: _clean(value) for key, value in part.items()}
    if isinstance(part, list):
        return [_clean(value) for value in part]
    return without_credentials(part) if isinstance(part, str) else part
