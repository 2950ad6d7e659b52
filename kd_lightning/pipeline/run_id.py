"""Which tracking run a folder was logged to, so that an interrupted one is gone on with."""

import logging
from pathlib import Path

from kd_lightning.durable_files import seal, unseal, write_atomically

_RUN_ID = "run_id"
_log = logging.getLogger(__name__)


def read_run_id(folder: Path, of: str) -> str | None:
    """Return the tracking run that was noted in a folder; None where there is none, or it is of something else.

    Args:
        folder: Of a stage or a pipeline.
        of: Its fingerprint.
    """
    file = folder / _RUN_ID
    if not file.is_file():
        return None
    try:
        content = unseal(file.read_bytes())
        if content["of"] != of:
            raise ValueError("it is of another folder")
    except (ValueError, OSError) as error:
        _log.warning("%s is damaged: %s; a new run is begun", file, error)
        return None
    return str(content["run_id"])


def write_run_id(folder: Path, run_id: str, of: str) -> None:
    write_atomically(folder / _RUN_ID, seal({"run_id": run_id, "of": of}).encode())


def remove_run_id(folder: Path) -> None:
    (folder / _RUN_ID).unlink(missing_ok=True)
