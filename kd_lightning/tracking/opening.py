"""How a run is made in a store, or found there, so that it is not made twice."""

from collections.abc import Callable, Mapping
from typing import Any

from kd_lightning.tracking.calls import without_credentials
from kd_lightning.tracking.operations import params, tags
from kd_lightning.tracking.view import EXPERIMENT_TAGS, open_as_training

KEY = "kd.key"
"""Tag under which a run is found again that was made, but whose answer was lost."""


def open_run(
    client: Any,
    begin: Mapping[str, Any],
    known: str | None = None,
    artifact_location: str | None = None,
    origin: str | None = None,
) -> Any:
    """Find the run of a journal, or make it, and return it as MLflow has it.

    A run that was deleted is made anew, unless the user asked for that very one.

    Args:
        client: MLflow's.
        begin: The journal's operation: ``key``, ``experiment``, ``name``, ``tags``, ``context`` (tags of a new run),
            ``params``, ``parent`` (its key) and ``run_id``.
        known: The run's id, where it was found before.
        artifact_location: Of an experiment that is made.
        origin: The run's id whose curves it takes over.

    Raises:
        ValueError: When the run is not there and has to be, or the experiment was deleted.
    """
    experiment_id = _experiment(client, begin["experiment"], artifact_location)
    parent = with_key(client, experiment_id, begin["parent"]) if begin.get("parent") else None
    ours = dict(begin["tags"])
    if parent is not None:
        ours |= {"kd.pipeline": parent.info.run_id, "mlflow.parentRunId": parent.info.run_id}
    run = _found(client, experiment_id, begin, known)
    if run is None:
        ours |= {KEY: begin["key"], **({"kd.reused_from": origin} if origin else {})}
        ours |= {"mlflow.runName": begin["name"]} if begin.get("name") else {}
        run = client.create_run(experiment_id, start_time=begin["at"], tags={**begin.get("context", {}), **ours})
    else:
        client.update_run(run.info.run_id, status="RUNNING")
        if ours:  # an interrupted run may have had another parent
            tags(client, run.info.run_id, ours)
    if begin.get("params") and not run.data.params:  # parameters cannot change in a run gone on with
        params(client, run.info.run_id, begin["params"])
    return run


def with_key(client: Any, experiment_id: str, key: str) -> Any | None:
    """Return the run with that key."""
    found = client.search_runs([experiment_id], f"tags.`{KEY}` = '{key}'", max_results=1)
    return found[0] if found else None


def _found(client: Any, experiment_id: str, begin: Mapping[str, Any], known: str | None) -> Any | None:
    run_id = known or begin.get("run_id")
    run = _unless_missing(lambda: client.get_run(run_id)) if run_id else with_key(client, experiment_id, begin["key"])
    if run is not None and run.info.lifecycle_stage != "active":
        run = None
    if run is None and begin.get("run_id"):
        raise ValueError(
            f"the tracking store {without_credentials(client.tracking_uri)} has no run {begin['run_id']}: leave run_id "
            "out for a new run, or set the store in which it is"
        )
    return run


def _experiment(client: Any, name: str, artifact_location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            tags_of_it = dict(EXPERIMENT_TAGS)
            return str(client.create_experiment(name, artifact_location=artifact_location, tags=tags_of_it))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process may just have made it
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise ValueError(
            f"the experiment {name!r} was deleted in {without_credentials(client.tracking_uri)}: restore it (mlflow "
            f"experiments restore --experiment-id {found.experiment_id}), or set logger.experiment_name to another"
        )
    open_as_training(client, found)
    return str(found.experiment_id)


def _unless_missing(read: Callable[[], Any]) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return read()
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
