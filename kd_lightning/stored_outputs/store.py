"""A folder of files on this machine, or anywhere that fsspec reaches."""

import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from kd_lightning.data.download import cache_folder

try:
    import fcntl
except ImportError:  # not on Windows, where two writers are not told apart
    fcntl = None  # type: ignore[assignment]


class Store:
    """Files by name. Those of a remote folder are written, and mapped into memory, in a folder of this machine.

    Args:
        path: A folder, or an address such as ``s3://bucket/folder``.
        cache: Where a remote folder's files are kept on this machine; unless given, in ``$XDG_CACHE_HOME`` or
            ``~/.cache``, under kd-lightning.
    """

    def __init__(self, path: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> None:
        self.address = os.fspath(path)
        self.filesystem, self.root = fsspec.core.url_to_fs(self.address)
        self.remote = not isinstance(self.filesystem, LocalFileSystem)
        if self.remote:
            root = Path(cache) if cache is not None else cache_folder("stored-outputs")
            self.local = root / hashlib.sha256(self.address.encode()).hexdigest()[:16]
        else:
            self.local = Path(self.root)

    def __str__(self) -> str:
        return self.address

    def read_text(self, name: str) -> str | None:
        """Return a file's text; None where there is no such file."""
        try:
            with self.filesystem.open(f"{self.root}/{name}", "rb") as file:
                content: bytes = file.read()
        except FileNotFoundError:
            return None
        return content.decode(errors="replace")  # a damaged file is found by its checksum

    def write_text(self, name: str, text: str) -> None:
        """Replace a file as a whole."""
        if not self.remote:
            write_local(self.local / name, text)
            return
        self.filesystem.makedirs(os.path.dirname(f"{self.root}/{name}"), exist_ok=True)
        self.filesystem.pipe_file(f"{self.root}/{name}", text.encode())  # object stores show a file when it is whole

    def create_text(self, name: str, text: str) -> bool:
        """Write a file unless there is one; tell whether it was written."""
        if self.remote:
            if self.filesystem.exists(f"{self.root}/{name}"):
                return False
            self.write_text(name, text)
            return True
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path, text)
        try:
            os.link(temporary, path)  # unlike a renaming, fails where there is a file
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def publish(self, name: str) -> None:
        """Upload a file that was written in :attr:`local`, if that is not where it belongs."""
        if self.remote:
            self.filesystem.makedirs(os.path.dirname(f"{self.root}/{name}"), exist_ok=True)
            self.filesystem.put_file(str(self.local / name), f"{self.root}/{name}")
            (self.local / name).unlink()

    def path(self, name: str, checksum: int) -> Path:
        """Return where a file is on this machine, or would be once it is downloaded."""
        # Under its checksum: a remote folder that was written anew is not read from the old copies.
        return self.local / f"{checksum:08x}" / name if self.remote else self.local / name

    def file(self, name: str, size: int, checksum: int) -> Path:
        """Return where a file is on this machine, downloaded once and then compared with its checksum.

        Raises:
            ValueError: For a file that is missing, torn, or was changed on its way.
        """
        path = self.path(name, checksum)
        if self.remote and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".downloading"), wait=True):
                if not path.exists():
                    part = path.with_suffix(".part")  # one that a killed process has left is written over
                    try:
                        self.filesystem.get_file(f"{self.root}/{name}", str(part))
                    except FileNotFoundError:
                        raise missing(self, name) from None
                    if part.stat().st_size == size and file_checksum(part) != checksum:
                        part.unlink()
                        raise ValueError(f"{name} in {self} does not have the checksum in its manifest: {_REBUILD}")
                    os.replace(part, path)
        found = path.stat().st_size if path.exists() else None
        if found is None:
            raise missing(self, name)
        if found != size:
            raise ValueError(f"{name} in {self} is torn: expected {size:,} bytes, got {found:,}; {_REBUILD}")
        return path

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self.filesystem.rm_file(f"{self.root}/{name}")

    def tidy(self) -> None:
        """Remove what writers that were killed have left, when nobody writes any more."""
        for pattern in (".*", "shards/.*", "shards/*.progress", "shards/*.lock", "shards/*.partial"):
            for left in self.local.glob(pattern):
                left.unlink(missing_ok=True)

    def size(self, name: str) -> int | None:
        """Return the length of a file where it belongs; None where it is missing."""
        try:
            found: int = self.filesystem.info(f"{self.root}/{name}")["size"]
        except FileNotFoundError:
            return None
        return found

    def free_bytes(self) -> int | None:
        """Return what is free on this machine's disk; None where the files do not stay there."""
        if self.remote or not hasattr(os, "statvfs"):
            return None
        self.local.mkdir(parents=True, exist_ok=True)
        status = os.statvfs(self.local)
        return status.f_bavail * status.f_frsize


_REBUILD = "call store_outputs again, which writes it anew"


def missing(store: Store, name: str) -> ValueError:
    return ValueError(f"{name} is missing in {store}: {_REBUILD}")


def write_local(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(_temporary(path, text), path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlast a power cut."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_checksum(path: Path, length: int | None = None) -> int:
    """Return the CRC-32 of a file, or of its first bytes."""
    checksum, left = 0, path.stat().st_size if length is None else length
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 2**20))):
            checksum, left = zlib.crc32(block, checksum), left - len(block)
    return checksum


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock that the system takes from a process that ends, however it ends.

    Raises:
        BlockingIOError: When another process holds it, unless to wait was asked for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        while True:
            file = files.enter_context(path.open("a"))
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Whoever held it while this process waited has removed the file: then the lock is one on nothing.
            if path.exists() and os.path.sameopenfile(file.fileno(), files.enter_context(path.open()).fileno()):
                break
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _temporary(path: Path, text: str) -> Path:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with open(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return Path(name)
