"""How MLflow's page shows a pipeline: as model training, its runs side by side, with columns and charts chosen.

The page reads a view that somebody shares from a tag of the experiment, and opens it at an address that names the tag
(MLflow 3.17, tried in Chromium): search, order, columns, their widths, and the cards of the charts page.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from kd_lightning.records import TITLES
from kd_lightning.tracking.calls import without_credentials

EXPERIMENT_TAGS: Mapping[str, str] = {"mlflow.experimentKind": "custom_model_development"}
"""For versions of the page that go by it, and else guess. That of MLflow 3.17 goes by its address, ``workflowType``,
or else by the browser's last choice, in a new one prompts and traces: no tag changes that."""
COLOURS: Mapping[str, str] = {
    "pipeline": "#616161",
    "teacher": "#1b5e20",
    "assistant": "#00838f",
    "student": "#1565c0",
    "control": "#f9a825",
    "distilled": "#c62828",
    "continued": "#ef9a9a",
    "quantized": "#6a1b9a",
    "sweep": "#212121",
}
ORDER = "kd.order"
"""Tag by which a pipeline's runs are sorted: from the teacher to the quantised students."""
_VIEW = "mlflow.sharedViewState."
_CURVES = ("train/loss", "kd/temperature", "val/agreement")


def look(role: str, position: int) -> dict[str, str]:
    """Return the tags by which the page colours and sorts a run.

    Args:
        role: Of the run.
        position: Among the runs of its pipeline, in the order in which they were made.
    """
    roles = list(TITLES)
    rank = roles.index(role) if role in roles else 0
    return {"mlflow.runColor": COLOURS.get(role, COLOURS["pipeline"]), ORDER: f"{rank}-{position:03d}"}


def open_as_training(client: Any, experiment: Any) -> None:
    """Have an experiment open as one of model training, unless somebody chose something else for it."""
    for tag, value in EXPERIMENT_TAGS.items():
        known = experiment.tags.get(tag)
        if not known or known == "no_inferred_type" or known.endswith("_inferred"):  # the page has guessed
            client.set_experiment_tag(experiment.experiment_id, tag, value)


def comparison(client: Any, run_id: str, *, headline: str, figures: Sequence[str]) -> None:
    """Share the view that compares a pipeline's runs; again it is replaced.

    Args:
        client: MLflow's.
        run_id: The pipeline's run.
        headline: Its key, such as ``acc``.
        figures: Further metrics, each a column and a chart, such as ``final/file_mb``.
    """
    metrics = [f"final/{headline}", *figures]
    tags = ["kd.role", "kd.method", "kd.temperature"]
    cost = [name for name in figures if "latency" in name]
    cards = [_bar(name) for name in metrics] + [_scatter(x, f"final/{headline}") for x in cost[:1]]
    cards += [_line(name) for name in (_CURVES[0], f"val/{headline}", *_CURVES[1:])]
    _share(client, run_id, _state(f"tags.`kd.pipeline` = '{run_id}'", tags=tags, metrics=metrics, cards=cards))


def sweep(client: Any, run_id: str, *, headline: str, parameters: Sequence[str], lower_is_better: bool = False) -> None:
    """Share the view that compares the pipelines of a sweep, in parallel coordinates too; again it is replaced.

    The best on the validation split comes first. By time the page would show the sweep's run alone, with its pipelines
    folded in.

    Args:
        client: MLflow's.
        run_id: The sweep's run.
        headline: Its key.
        parameters: What differs between them: names of parameters.
        lower_is_better: Of the headline.
    """
    metrics = [f"final/{name}" for name in (f"val_{headline}", headline, "agreement", "retention", "gap_closed")]
    parallel = _card("PARALLEL", "final", 0) | {
        "selectedParams": list(parameters),
        "selectedMetrics": metrics[1:3],
        "showAllRuns": True,
    }
    cards = [parallel, *map(_bar, metrics)]
    state = _state(f"tags.`kd.pipeline` = '{run_id}'", parameters=parameters, metrics=metrics, cards=cards)
    _share(client, run_id, {**state, "orderByKey": f"metrics.`{metrics[0]}`", "orderByAsc": lower_is_better})


def place(what: str, tracking_uri: str, experiment_id: str, run_id: str) -> str:
    """Say in a line where the view of a run is; for a database, with the command that shows it.

    Example:
        >>> print(place("run", "sqlite:///mlruns/mlflow.db", "1", "0123456789abcdef"))  # doctest: +ELLIPSIS
        Every run, side by side: mlflow ui --backend-store-uri sqlite:///mlruns/mlflow.db --port ..., then http://...
    """
    where = address(tracking_uri, experiment_id, run_id)
    if urlsplit(tracking_uri).scheme in ("http", "https"):
        return f"Every {what}, side by side: {where}"
    show = f"mlflow ui --backend-store-uri {without_credentials(tracking_uri)} --port {_port()}"
    return f"Every {what}, side by side: {show}, then {where}"


def address(tracking_uri: str, experiment_id: str, run_id: str) -> str:
    """Return where the view of a run opens: on the server, or for a database on the ``mlflow ui`` of :func:`place`.

    Example:
        >>> address("http://user:password@mlflow.example/", "3", "0123456789abcdef")
        'http://mlflow.example/#/experiments/3/runs?workflowType=machine_learning&viewStateShareKey=0123456789ab'
    """
    server = f"http://{_host()}:{_port()}"
    if urlsplit(tracking_uri).scheme in ("http", "https"):
        server = without_credentials(tracking_uri).replace("***@", "").rstrip("/")
    return f"{server}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={_key(run_id)}"


def _port() -> str:
    """Return MLflow's own setting; else its default, but on macOS, where AirPlay has that."""
    return os.environ.get("MLFLOW_PORT") or ("5001" if sys.platform == "darwin" else "5000")


def _host() -> str:
    """Return MLflow's own setting; this machine where that is every address."""
    host = os.environ.get("MLFLOW_HOST") or "127.0.0.1"
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host


def _key(run_id: str) -> str:
    return run_id[:12]


def _share(client: Any, run_id: str, state: Mapping[str, Any]) -> None:
    experiment_id = client.get_run(run_id).info.experiment_id
    client.set_experiment_tag(experiment_id, f"{_VIEW}{_key(run_id)}", json.dumps(state, separators=(",", ":")))


def _state(
    search: str,
    *,
    metrics: Sequence[str],
    cards: Sequence[Mapping[str, Any]],
    tags: Sequence[str] = (),
    parameters: Sequence[str] = (),
) -> dict[str, Any]:
    columns = [f"tags.`{name}`" for name in tags] + [f"params.`{name}`" for name in parameters]
    columns += [f"metrics.`{name}`" for name in metrics]
    columns += ["attributes.`Dataset`", "attributes.`Models`"] if tags else []  # a sweep's pipelines have none
    sections = list(dict.fromkeys(card["metricSectionId"] for card in cards))
    return {
        "searchFilter": search,
        "orderByKey": f"tags.`{ORDER}`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "columnOrder": ["attributes.`Run Name`", "runDateAndNestInfo", *columns],
        "columnWidths": {"attributes.`Run Name`": 280, "tags.`kd.method`": 180, "attributes.`Dataset`": 200},
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,  # else the sections that the page makes itself come first
        "compareRunSections": [{"uuid": of, "name": of, "display": True, "isReordered": True} for of in sections],
        "compareRunCharts": list(cards),
    }


def _card(kind: str, section: str, number: int | str) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": f"{kind}-{number}",
        "metricSectionId": section,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
    }


def _bar(name: str) -> dict[str, Any]:
    return _card("BAR", "final", name) | {"metricKey": name}


def _line(name: str) -> dict[str, Any]:
    axis = {"scaleType": "linear", "xAxisKey": "step", "lineSmoothness": 0}
    return _card("LINE", "training", name) | {"metricKey": name, "selectedMetricKeys": [name], **axis}


def _scatter(x: str, y: str) -> dict[str, Any]:
    axes = {axis: {"key": name, "type": "METRIC"} for axis, name in (("xaxis", x), ("yaxis", y))}
    return _card("SCATTER", "final", 0) | axes
