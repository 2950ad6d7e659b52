"""Files that are what their publisher published, or an error that names them."""

import contextlib
import hashlib
import http.client
import os
import shutil
import urllib.request
import uuid
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return where a downloaded data set is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kd-lightning" / name


def check(file: Path, expected: str, algorithm: str = "sha256") -> None:
    """Compare a file's checksum.

    Raises:
        ValueError: For another one, with the file's name.
    """
    found = _checksum(file, algorithm)
    if found != expected:
        raise ValueError(
            f"{file} has the {algorithm} {found[:12]}…, expected {expected[:12]}…: it is torn or another file; delete "
            "it, or name another folder"
        )


def download(url: str, file: Path, expected: str, algorithm: str = "sha256", remedy: str = "try again") -> None:
    """Write what the address sends to ``file``, once it is known to be right; until then nothing is there.

    Raises:
        OSError: When it cannot be had, or is not what was published.
    """
    # A name of its own: the processes of a distributed training may download at the same time.
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as written, urllib.request.urlopen(url, timeout=60) as answer:
            shutil.copyfileobj(answer, written)
        found = _checksum(part, algorithm)
        if found != expected:
            raise OSError(f"cut off or altered: its {algorithm} is {found[:12]}…, expected {expected[:12]}…")
        part.replace(file)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url} cannot be had ({error}): {remedy}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _checksum(file: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with file.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()
