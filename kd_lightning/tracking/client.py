"""MLflow's client, whose writes to a run wait for nobody. Imports MLflow: itself only where that is wanted."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from kd_lightning.tracking.delivery import Delivery, delivery_to


class BackgroundClient(MlflowClient):
    """Takes what is logged to a run and returns at once; see :class:`Delivery` for what becomes of it.

    ``log_text``, ``log_dict``, ``log_figure`` and the like end in ``log_artifact``. What reads (``get_run``) or makes
    something (``create_run``) goes to the store at once, as in MLflow's own client.
    """

    def __init__(self, tracking_uri: str) -> None:
        super().__init__(tracking_uri)
        self._uri = tracking_uri

    @property
    def delivery(self) -> Delivery:
        return delivery_to(self._uri)

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Metric] = (),
        params: Sequence[Param] = (),
        tags: Sequence[RunTag] = (),
        synchronous: bool | None = None,
    ) -> None:
        if params or tags:
            self.delivery.call(
                run_id, lambda client, known: client.log_batch(known, params=params, tags=tags, synchronous=True)
            )
        if metrics:
            self.delivery.metrics(run_id, metrics)

    def log_metric(
        self,
        run_id: str,
        key: str,
        value: float,
        timestamp: int | None = None,
        step: int | None = None,
        synchronous: bool | None = None,
        dataset_name: str | None = None,
        dataset_digest: str | None = None,
        model_id: str | None = None,
    ) -> None:
        value, timestamp = float(value), now() if timestamp is None else timestamp
        about = {"dataset_name": dataset_name, "dataset_digest": dataset_digest, "model_id": model_id}
        if any(about.values()):
            self.delivery.call(
                run_id, lambda client, known: client.log_metric(known, key, value, timestamp, step, True, **about)
            )
        else:
            self.delivery.metrics(run_id, [Metric(key, value, timestamp, step or 0)])

    def log_param(self, run_id: str, key: str, value: Any, synchronous: bool | None = None) -> Any:
        self.delivery.call(run_id, lambda client, known: client.log_param(known, key, value, True))
        return value

    def set_tag(self, run_id: str, key: str, value: Any, synchronous: bool | None = None) -> None:
        self.delivery.call(run_id, lambda client, known: client.set_tag(known, key, value, True))

    def set_terminated(self, run_id: str, status: str | None = None, end_time: int | None = None) -> None:
        end = now() if end_time is None else end_time
        self.delivery.call(run_id, lambda client, known: client.set_terminated(known, status, end))

    def log_artifact(self, run_id: str, local_path: Any, artifact_path: str | None = None) -> None:
        self.delivery.file(run_id, Path(local_path), artifact_path)

    def log_artifacts(self, run_id: str, local_dir: Any, artifact_path: str | None = None) -> None:
        self.delivery.file(run_id, Path(local_dir), artifact_path, contents=True)


def now() -> int:
    """Return the time in milliseconds since 1970, as MLflow counts it."""
    return int(time.time() * 1000)
