"""Files that are whole, and checked, or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from kd_lightning.durable_files import temporary_suffix


@contextmanager
def new_files(path: Path) -> Iterator[Path]:
    """Give a folder beside the path; what is in it when the context ends well takes its place, the path's file last.

    Raises:
        OSError: Where nothing can be written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"expected the path of a file, got the folder {path}: add the name of the file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(prefix=f".{path.name}.", suffix=temporary_suffix(), dir=path.parent)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} cannot be written: expected a folder in which files can be made, got: {error}; pass another path",
        ) from error
    with folder as name:
        yield Path(name)
        for file in sorted(Path(name).iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))


def write(file: Path, content: bytes, path: Path) -> None:
    """Write a whole file; ``path`` is what it is to become.

    Raises:
        OSError: Where it cannot.
    """
    try:
        with file.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} has not been written: expected room for {len(content) / 1e6:.3g} MB, got: {error}; make room and "
            "export again",
        ) from error
