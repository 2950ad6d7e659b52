"""What a journal's lines do in MLflow. Each may be called again after an answer was lost, and does no harm then."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kd_lightning.durable_files import sha256_of
from kd_lightning.tracking.datasets import dataset
from kd_lightning.tracking.models import figures, model, register
from kd_lightning.tracking.view import comparison, sweep

_PER_REQUEST = 100


def params(client: Any, run_id: str, values: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    entities = [Param(name, value) for name, value in values.items()]
    for i in range(0, len(entities), _PER_REQUEST):
        client.log_batch(run_id, params=entities[i : i + _PER_REQUEST], synchronous=True)


def tags(client: Any, run_id: str, values: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in values.items()], synchronous=True)


def artifact(client: Any, run_id: str, path: str, sha256: str, folder: str | None = None) -> None:
    """Upload a file that is as it was when it was logged.

    Raises:
        ValueError: For one that is not.
    """
    if not Path(path).is_file() or sha256_of(Path(path)) != sha256:
        raise ValueError(f"{path} is no more the file that was logged, by its SHA-256")
    client.log_artifact(run_id, path, folder)


def end(client: Any, run_id: str, status: str, end_time: int) -> None:
    client.set_terminated(run_id, status, end_time)


OPERATIONS: dict[str, Callable[..., object]] = {
    "params": params,
    "tags": tags,
    "artifact": artifact,
    "comparison": comparison,
    "dataset": dataset,
    "figures": figures,
    "model": model,
    "register": register,
    "sweep": sweep,
    "end": end,
}
"""By name: ``function(client, run_id, **values)``. A value named ``path`` or ``..._path`` comes as an absolute path.

``begin`` and ``metrics`` are not among them: the first finds the run, and the latter go many in a request.
"""
UPLOADS = ("artifact", "dataset", "model")
"""May take as long as MLflow lets an upload take."""
