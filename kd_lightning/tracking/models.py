"""A trained network, or the file that serves it, as a model that MLflow shows, registers, loads and serves.

A model is known by the digest of its content: it is stored once, however often it is logged, and a run that uses a
finished stage again is linked to what is there.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from kd_lightning.tracking.datasets import as_mlflow_has_it

_Specs = Mapping[str, tuple[Any, tuple[int, ...]]]
"""Type and shape by name; -1 for any size."""
DIGEST = "kd.digest"
"""Tag of a model: what it is found by."""


def model(
    client: Any,
    run_id: str,
    *,
    name: str,
    digest: str,
    example_path: str,
    file_path: str | None = None,
    weights_path: str | None = None,
    network: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Log a model as the output of a run; what is there already is linked, or completed where it was cut off.

    Args:
        client: MLflow's.
        run_id: Whose output it is.
        name: As MLflow shows it.
        digest: Hash of the content.
        example_path: Path of an ``.npz`` file with the inputs of one sample, by name.
        file_path: Path of an ONNX file: the model is of MLflow's flavour ``onnx``, and answers in ONNX Runtime.
        weights_path: In its place, path of a checkpoint; answers in PyTorch, where this package is installed.
        network: What makes the network of ``weights_path``, as a configuration has it.
        tags: Of the model, by which it is found; they are its parameters too, which the page has columns for.
    """
    from mlflow.entities import LoggedModelOutput

    experiment_id = client.get_run(run_id).info.experiment_id
    logged = find(client, experiment_id, digest)
    if logged is None:
        logged = client.create_logged_model(
            experiment_id,
            name=re.sub(r"[.:/%\"'\s]+", "-", name),
            source_run_id=run_id,
            tags={**(tags or {}), DIGEST: digest},
            params=dict(tags or {}),
        )
    if str(logged.status) != "READY":
        with TemporaryDirectory(prefix="kd-lightning-") as folder, _quietly():
            made = Path(folder) / "model"
            if file_path is not None:
                _save_onnx(made, Path(file_path), Path(example_path), logged.model_id, run_id)
            else:
                weights = Path(weights_path or "")
                _save_network(made, weights, network or {}, Path(example_path), logged.model_id, run_id)
            client.log_model_artifacts(logged.model_id, str(made))
        client.finalize_logged_model(logged.model_id, "READY")
    linked = client.get_run(run_id).outputs
    if logged.model_id not in [output.model_id for output in (linked.model_outputs if linked else [])]:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])


def register(client: Any, run_id: str, *, name: str, digest: str) -> None:
    """Make a logged model the newest version of a registered one, unless it is a version of that already.

    Args:
        client: MLflow's.
        run_id: Any of the experiment's runs.
        name: Of the registered model; made where it is not there.
        digest: Of the logged model.

    Raises:
        ValueError: Where nothing of that digest was logged.
    """
    from mlflow.exceptions import MlflowException

    logged = _found(client, run_id, digest, "its registration")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{logged.model_id}"
    if not any(DIGEST in known.tags and known.tags[DIGEST] == digest for known in _versions(client, name)):
        client.create_model_version(
            name, source, run_id=logged.source_run_id, tags={DIGEST: digest}, model_id=logged.model_id
        )


def figures(client: Any, run_id: str, *, digest: str, measured: Sequence[Mapping[str, Any]], measured_at: int) -> None:
    """Log numbers of a logged model, and of the run; again changes nothing.

    Args:
        client: MLflow's.
        run_id: By which they were found. Numbers that it has from the same millisecond are not doubled.
        digest: Of the logged model.
        measured: For each set of samples ``values``, by name, and ``dataset``: ``name`` and ``digest`` of the run's
            input; None for numbers that are of no samples.
        measured_at: Milliseconds since 1970.

    Raises:
        ValueError: Where nothing of that digest was logged.
    """
    from mlflow.entities import Metric

    model_id = _found(client, run_id, digest, "its figures").model_id
    metrics = [
        Metric(name, value, measured_at, 0, model_id, *_name_and_digest(group["dataset"]))
        for group in measured
        for name, value in group["values"].items()
    ]
    client.log_batch(run_id, metrics=metrics, synchronous=True)


def find(client: Any, experiment_id: str, digest: str) -> Any | None:
    """Return the logged model of a digest; None where there is none."""
    found = client.search_logged_models([experiment_id], f"tags.`{DIGEST}` = '{digest}'", max_results=1)
    return next(iter(found), None)


def _found(client: Any, run_id: str, digest: str, of_it: str) -> Any:
    logged = find(client, client.get_run(run_id).info.experiment_id, digest)
    if logged is None:
        raise ValueError(f"no model of the digest {digest} was logged, expected it ahead of {of_it}")
    return logged


def _name_and_digest(dataset: Mapping[str, str] | None) -> tuple[str | None, str | None]:
    return (dataset["name"], as_mlflow_has_it(dataset["digest"])) if dataset is not None else (None, None)


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out what MLflow says of each model that it saves."""
    loggers = [logging.getLogger(name) for name in ("mlflow.pyfunc", "mlflow.models.model")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _versions(client: Any, name: str) -> list[Any]:
    return list(client.search_model_versions(f"name = '{name}'"))


def _save_onnx(folder: Path, file: Path, example: Path, model_id: str, run_id: str) -> None:
    import mlflow.onnx
    import onnx
    from mlflow.models import Model

    content = onnx.load(str(file))
    arrays, specs = _arrays(example), {}
    for of in (*content.graph.input, *content.graph.output):
        tensor = of.type.tensor_type
        shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
        specs[of.name] = (onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape)
    outputs = {of.name: specs[of.name] for of in content.graph.output}
    mlflow.onnx.save_model(
        content,
        str(folder),
        mlflow_model=Model(run_id=run_id, model_id=model_id),
        signature=_signature({name: specs[name] for name in arrays}, outputs),
        input_example=_one_or_all(arrays),
        pip_requirements=[_pinned("mlflow"), _pinned("onnx"), _pinned("onnxruntime")],
        metadata={entry.key: entry.value for entry in content.metadata_props},
        onnx_execution_providers=["CPUExecutionProvider"],  # in which it was compared with the network
        save_as_external_data=False,
    )


def _save_network(
    folder: Path, weights: Path, network: Mapping[str, Any], example: Path, model_id: str, run_id: str
) -> None:
    import mlflow.pyfunc
    from mlflow.models import Model

    from kd_lightning.tracking.serving import NETWORK, WEIGHTS

    data = folder.parent / "network"
    data.mkdir()
    shutil.copy(weights, data / WEIGHTS)
    (data / NETWORK).write_text(json.dumps(network))
    arrays = _arrays(example)
    inputs = {name: (array.dtype, _any_number(array)) for name, array in arrays.items()}
    mlflow.pyfunc.save_model(
        str(folder),
        loader_module="kd_lightning.tracking.serving",
        data_path=str(data),
        mlflow_model=Model(run_id=run_id, model_id=model_id),
        signature=_signature(inputs, None),
        input_example=_one_or_all(arrays),
        pip_requirements=[_pinned("kd-lightning"), _pinned("mlflow"), _pinned("torch")],
    )


def _signature(inputs: _Specs, outputs: _Specs | None) -> Any:
    """Return MLflow's; with one input that has no name there, so that a request is ``{"inputs": [[...], ...]}``."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def schema(specs: _Specs, named: bool) -> Any:
        tensors: list[Any] = [TensorSpec(*spec, name if named else None) for name, spec in specs.items()]
        return Schema(tensors)

    return ModelSignature(schema(inputs, len(inputs) > 1), None if outputs is None else schema(outputs, True))


def _any_number(array: Any) -> tuple[int, ...]:
    """Return a shape for any number of samples, and tokens, of which a text may have more or fewer."""
    return tuple(-1 if axis == 0 or array.dtype.kind in "iub" else size for axis, size in enumerate(array.shape))


def _arrays(example: Path) -> dict[str, Any]:
    with np.load(example, allow_pickle=False) as arrays:
        return dict(arrays)


def _one_or_all(arrays: dict[str, Any]) -> Any:
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def _pinned(package: str) -> str:
    return f"{package}=={version(package)}"


def digest_of(*parts: object) -> str:
    """Hash what a model is made of: digests, and values that JSON has."""
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
