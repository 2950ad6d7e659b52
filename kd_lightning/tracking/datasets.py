"""The data that a run has seen, as MLflow's inputs of the run: its columns ``Dataset``, and a search by them."""

import json
from typing import Any

_DIGEST = 36
"""Characters that MLflow takes of a digest."""


def dataset(
    client: Any,
    run_id: str,
    *,
    name: str,
    digest: str,
    context: str,
    rows: int | None,
    made_by: str,
    folder: str | None = None,
) -> None:
    """Note data as an input of a run; again changes nothing.

    Args:
        client: MLflow's.
        run_id: Whose input it is.
        name: Of the data, such as ``FashionMNIST``.
        digest: Hash of the samples, which tells data of one name apart.
        context: What the run used it for: ``training``, ``unlabelled``, ``validation`` or ``test``.
        rows: Number of samples, where that is known.
        made_by: The data module, as a dotted name.
        folder: Where it reads from, if it says.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind, source = ("code", {"tags": {"mlflow.source.name": made_by}}) if folder is None else ("local", {"uri": folder})
    entity = Dataset(
        name=name,
        digest=as_mlflow_has_it(digest),
        source_type=kind,
        source=json.dumps(source),
        profile=json.dumps({} if rows is None else {"num_rows": rows}),
    )
    tags = [InputTag("mlflow.data.context", context)]
    client.log_inputs(run_id, datasets=[DatasetInput(entity, tags)])


def as_mlflow_has_it(digest: str) -> str:
    """Return a digest as it stands in a run's inputs."""
    return digest[:_DIGEST]
