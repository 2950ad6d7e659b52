"""Lightning's MLflow logger, on a local SQLite store unless told otherwise."""

import os
import re
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch import loggers

from kd_lightning.files import remove_leftovers, temporary_suffix

LOCAL_STORE = "sqlite:///mlruns/mlflow.db"


class MLFlowLogger(loggers.MLFlowLogger):
    """Log to ``mlruns/mlflow.db`` in the working directory, or where ``MLFLOW_TRACKING_URI`` or the argument say.

    Args:
        experiment_name: The MLflow experiment; created where it does not exist.
        tracking_uri: A server's address or a database URI. Plain folders (``file:``) are refused by MLflow 3.
        run_name: As the dashboard shows it.
        tags: Of the run.
        run_id: Goes on with that run.
        artifact_location: Of a new experiment; beside a SQLite file by default.

    Raises:
        ValueError: For an experiment without a name.
        OSError: When the folder of a SQLite store cannot be written to; before anything is trained.
    """

    def __init__(
        self,
        experiment_name: str = "kd-lightning",
        tracking_uri: str | None = None,
        run_name: str | None = None,
        tags: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        artifact_location: str | None = None,
    ) -> None:
        if not experiment_name:
            raise ValueError(f"expected experiment_name to be a name, got {experiment_name!r}: leave it out")
        uri = store_uri(tracking_uri)
        folder = sqlite_folder(uri)
        if folder is not None:
            _check_writable_once(folder.absolute())
            artifact_location = artifact_location or (folder / "artifacts").absolute().as_uri()
        super().__init__(
            experiment_name=experiment_name,
            run_name=run_name,
            tracking_uri=uri,
            tags={key: str(value) for key, value in tags.items()} if tags else None,  # a server takes nothing else
            run_id=run_id,
            artifact_location=artifact_location,
        )
        self.tracking_uri = uri

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace) -> None:
        """Log parameters, under names that MLflow takes."""
        super().log_hyperparams(_with_safe_names(params))


def store_uri(tracking_uri: str | None = None) -> str:
    """Return where runs go: the argument, the environment's ``MLFLOW_TRACKING_URI``, or the local store."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or LOCAL_STORE


def safe_name(name: str) -> str:
    """Replace what MLflow takes in no name, such as the '=' of a label ``T=4``."""
    return re.sub(r"[^\w.\- :/]", "-", name, flags=re.ASCII)


def _with_safe_names(params: Any) -> Any:
    if isinstance(params, Namespace):
        params = vars(params)
    if not isinstance(params, Mapping):
        return params
    return {safe_name(str(key)): _with_safe_names(value) for key, value in params.items()}


def sqlite_folder(uri: str) -> Path | None:
    """Return the folder of a SQLite store, None for any other address."""
    parts = urlsplit(uri)
    return Path(parts.path.removeprefix("/")).parent if parts.scheme.startswith("sqlite") else None


def check_writable(folder: Path, megabytes: int = 64) -> None:
    """Create the folder and write ``megabytes`` to it, as a full disk shows only then.

    Raises:
        OSError: With the folder and what to do.
    """
    probe = folder / f".probe{temporary_suffix()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)  # probes of processes that were killed
        with probe.open("wb") as file:
            for _ in range(megabytes):
                file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write {megabytes} MB to {folder.absolute()} ({error.strerror}), expected room for checkpoints and "
            "the tracking store: free some, or change to another working directory",
        ) from error
    finally:
        with suppress(OSError):  # the folder's own error tells more
            probe.unlink()


@cache
def _check_writable_once(folder: Path) -> None:
    """Check a folder for the first of a process's loggers: a pipeline makes one for each stage and seed."""
    check_writable(folder)
