"""How a run is made in a store, or found there, so that it is not made twice."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from kd_lightning.tracking.calls import without_credentials

KEY = "kd.key"
"""Tag under which a run is found again that was made, but whose answer was lost."""
_WAITING = "waiting-"
_ORIGIN = "kd.reused_from"
_PARAMS_PER_REQUEST = 100


def new_key() -> str:
    """Return a name for a run that the store has not made yet."""
    return f"{_WAITING}{uuid4().hex}"


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """Makes a run or finds it, called with MLflow's client, a key of its own, and whether it was called before.

    Attributes:
        experiment: Made where there is none.
        artifact_location: Of an experiment that is made.
        run_name: Of a run that is made.
        tags: Set in either case.
        run_id: Of the run to go on with, if any; its key, where no more is known of it.
        goes_on: Given that run: whether to go on with it; a new one names it as its origin otherwise, and is made too
            where it is gone. By default the run has to be there.
        params: Of a run that has none.
        known: Called with the key before a run is made, and with the id as soon as it is known: what was noted last
            finds the run, whenever the process or the store is killed.
        start: Milliseconds since 1970.
    """

    experiment: str
    artifact_location: str | None
    run_name: str | None
    tags: Mapping[str, str]
    run_id: str | None
    goes_on: Callable[[Any], bool] | None
    params: Mapping[str, str]
    known: Callable[[str], object] | None
    start: int

    def __call__(self, client: Any, key: str, again: bool) -> Any:
        """Return MLflow's run.

        Raises:
            ValueError: When the run is not there and has to be, or the experiment was deleted.
        """
        from mlflow.entities import Param, RunTag

        run = self._found(client)
        if run is not None and (self.goes_on is None or self.goes_on(run)):
            client.update_run(run.info.run_id, status="RUNNING")
            if self.tags:  # an interrupted run may have had another parent
                tags = [RunTag(name, value) for name, value in self.tags.items()]
                client.log_batch(run.info.run_id, tags=tags)
        else:
            origin = {} if run is None else {_ORIGIN: run.info.run_id}
            run = self._made(client, {**self.tags, **origin, KEY: key}, again)
        self._note(run.info.run_id)
        if not run.data.params:  # parameters cannot change in a run gone on with
            params = [Param(name, value) for name, value in self.params.items()]
            for i in range(0, len(params), _PARAMS_PER_REQUEST):
                client.log_batch(run.info.run_id, params=params[i : i + _PARAMS_PER_REQUEST])
        return run

    def _found(self, client: Any) -> Any | None:
        run = None
        if self.run_id is not None and self.run_id.startswith(_WAITING):
            run = self._with_key(client, self._experiment(client), self.run_id)
        elif self.run_id is not None:
            run = _unless_missing(lambda: client.get_run(self.run_id))
        if run is not None and run.info.lifecycle_stage != "active":
            run = None
        if run is None and self.run_id is not None and self.goes_on is None:
            raise ValueError(
                f"the tracking store {without_credentials(client.tracking_uri)} has no run {self.run_id}: leave run_id "
                "out for a new run, or set the store in which it is"
            )
        return run

    def _made(self, client: Any, tags: Mapping[str, str], again: bool) -> Any:
        from mlflow.tracking.context.registry import resolve_tags

        experiment_id = self._experiment(client)
        if again:
            found = self._with_key(client, experiment_id, tags[KEY])
            if found is not None:
                return found
        self._note(tags[KEY])
        name = {} if self.run_name is None else {"mlflow.runName": self.run_name}
        return client.create_run(experiment_id, start_time=self.start, tags=resolve_tags({**tags, **name}))

    def _with_key(self, client: Any, experiment_id: str, key: str) -> Any | None:
        found = client.search_runs([experiment_id], f"tags.`{KEY}` = '{key}'", max_results=1)
        return found[0] if found else None

    def _note(self, name: str) -> None:
        if self.known is not None:
            with suppress(OSError):
                self.known(name)

    def _experiment(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return str(client.create_experiment(self.experiment, artifact_location=self.artifact_location))
            except MlflowException:
                found = client.get_experiment_by_name(self.experiment)  # another process may just have made it
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise ValueError(
                f"the experiment {self.experiment!r} was deleted in {without_credentials(client.tracking_uri)}: "
                f"restore it (mlflow experiments restore --experiment-id {found.experiment_id}), or set "
                "logger.experiment_name to another"
            )
        return str(found.experiment_id)


def _unless_missing(read: Callable[[], Any]) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return read()
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
