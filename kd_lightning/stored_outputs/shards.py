"""Files of rows that are whole, or are not there."""

import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from kd_lightning.durable_files import seal, unseal
from kd_lightning.stored_outputs.layout import Manifest, file_name, header, record_name
from kd_lightning.stored_outputs.store import Store, file_checksum, locked, sync_folder, write_local

_OPEN_FILES = 256  # of an array, at a time: a process may have a thousand


class ShardWriter:
    """Appends to the files of one shard under temporary names, and goes on where an earlier writer was cut off.

    What was appended since the last :meth:`commit` is lost when the process dies; the rest is verified and kept.

    Attributes:
        rows: How many are written.
        tally: Plain numbers that are kept with the rows, such as sums of errors.

    Raises:
        RuntimeError: When another process is writing the shard.
    """

    def __init__(self, store: Store, manifest: Manifest, shard: int) -> None:
        self.store, self.manifest, self.shard = store, manifest, shard
        self.folder = store.local / "shards"
        self.rows, self.tally = 0, [0.0] * 5
        self._earlier, self._begun = 0.0, time.monotonic()
        self._progress = self.folder / f"{shard:06d}.progress"
        self._files: dict[str, BinaryIO] = {}
        self._checksums: dict[str, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "ShardWriter":
        try:
            self._stack.enter_context(locked(self.folder / f"{self.shard:06d}.lock"))
        except BlockingIOError:
            raise RuntimeError(
                f"another process is writing shard {self.shard} of {self.store}, expected one writer a shard: wait for "
                "it, or pass each its rank= and world_size="
            ) from None
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def seconds(self) -> float:
        """Return for how long the shard has been written, by this writer and by earlier ones that were cut off."""
        return self._earlier + time.monotonic() - self._begun

    def append(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        for name, rows in arrays.items():
            content = np.ascontiguousarray(rows).tobytes()
            _write(self._files[name], content)
            self._checksums[name] = zlib.crc32(content, self._checksums[name])
        self.rows += len(next(iter(arrays.values())))

    def commit(self) -> None:
        """Let what is written outlast this process and a power cut."""
        for file in self._files.values():
            os.fsync(file.fileno())
        write_local(self._progress, seal({"rows": self.rows, **self._state()}))

    def finish(self) -> None:
        """Give the files their names, and say that the shard is whole."""
        self.commit()
        for name in self._files:
            os.replace(self._partial(name), self.store.local / file_name(self.shard, name))
        sync_folder(self.folder)
        for name in self._files:
            self.store.publish(file_name(self.shard, name))
        self.store.write_text(record_name(self.shard), seal(self._state()))
        self._progress.unlink()

    def _state(self) -> dict[str, Any]:
        return {
            "checksums": self._checksums,
            "tally": self.tally,
            "seconds": self.seconds,
            "of": self.manifest.plan,
        }

    def _open(self) -> None:
        state = (
            _unsealed(self._progress.read_text(errors="replace"), self.manifest) if self._progress.exists() else None
        )
        expected = len(self.manifest.rows_of(self.shard))
        lengths = {}
        for name, array in self.manifest.arrays.items():
            whole = self.store.local / file_name(self.shard, name)
            if whole.exists():  # cut off between the renamings, or found to be damaged
                os.replace(whole, self._partial(name))
            head = header(array, expected)
            self._checksums[name] = zlib.crc32(head)
            lengths[name] = len(head) + (state["rows"] if state else 0) * array.bytes_per_row
        if state and all(self._is_intact(name, lengths[name], state["checksums"][name]) for name in lengths):
            self.rows, self.tally, self._checksums = state["rows"], state["tally"], state["checksums"]
            self._earlier = state.get("seconds", 0.0)  # an older version measured none
        for name, array in self.manifest.arrays.items():
            path = self._partial(name)
            file = self._stack.enter_context(path.open("r+b" if self.rows else "wb", buffering=0))
            self._files[name] = file
            if self.rows:
                file.truncate(lengths[name])
                file.seek(lengths[name])
            else:
                _write(file, header(array, expected))

    def _is_intact(self, name: str, length: int, checksum: int) -> bool:
        path = self._partial(name)
        return path.exists() and path.stat().st_size >= length and file_checksum(path, length) == checksum

    def _partial(self, name: str) -> Path:
        return self.store.local / (file_name(self.shard, name) + ".partial")


class ShardReader:
    """Rows of one array by number, from files that are mapped into memory when they are first needed."""

    def __init__(self, store: Store, manifest: Manifest, name: str) -> None:
        self.store, self.manifest, self.name = store, manifest, name
        self.array = manifest.arrays[name]
        self.code = self.array.code
        self._count = manifest.count
        self._maps: OrderedDict[int, NDArray[Any]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maps": OrderedDict()}  # each process maps for itself

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return copies of the rows, one indexing a file.

        Raises:
            ValueError: For a file that is missing or torn.
        """
        if self._count == 1:
            return self.mapped(0).take(rows, 0)
        shards, places = np.divmod(rows, self.manifest.rows_per_shard)
        found = np.empty((len(rows), *self.array.row), self.code.dtype)
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            found[here] = self.mapped(shard).take(places[here], 0)
        return found

    def mapped(self, shard: int) -> NDArray[Any]:
        found = self._maps.get(shard)
        if found is None:
            found = np.load(self.path(shard), mmap_mode="r").view(np.ndarray)
            expected = (len(self.manifest.rows_of(shard)), *self.array.row)
            if found.shape != expected:
                raise ValueError(
                    f"{self.path(shard)} holds {found.shape}, expected {expected}: call verify(), which names all "
                    "files that are damaged"
                )
            if len(self._maps) >= _OPEN_FILES:
                self._maps.popitem(last=False)
            self._maps[shard] = found
        return found

    def path(self, shard: int) -> Path:
        """Return where a file is, with the length that it should have."""
        size = file_size(self.manifest, shard, self.name)
        return self.store.file(file_name(shard, self.name), size, self.manifest.shards[shard][self.name])


def record_of(store: Store, manifest: Manifest, shard: int) -> dict[str, Any] | None:
    """Return a shard's checksums and tally; None unless all its files are there, in their full length."""
    sizes = {name: store.size(file_name(shard, name)) for name in manifest.arrays}
    if any(size != file_size(manifest, shard, name) for name, size in sizes.items()):
        return None
    return read_record(store, manifest, shard)


def read_record(store: Store, manifest: Manifest, shard: int) -> dict[str, Any] | None:
    """Return what was written with a shard; None where that is missing, damaged, or of other outputs."""
    text = store.read_text(record_name(shard))
    return _unsealed(text, manifest) if text is not None else None


def damages(
    store: Store,
    manifest: Manifest,
    checksums: Mapping[int, Mapping[str, int]],
    read: Callable[[Path], int] = file_checksum,
) -> dict[int, list[str]]:
    """Read the files of shards, in several threads, and compare their checksums.

    Of a remote folder those files are read that are on this machine; the others are checked as they arrive.

    Args:
        store: The folder.
        manifest: What is in it.
        checksums: By array, of each shard to look at.
        read: Gives a file's checksum.

    Returns:
        What is wrong, by shard; whole ones are left out.
    """

    def problem(shard: int, name: str) -> str | None:
        file, checksum = file_name(shard, name), checksums[shard][name]
        path = store.path(file, checksum)
        if not path.exists():
            return None if store.remote else f"{file} in {store} is missing"
        size, expected = path.stat().st_size, file_size(manifest, shard, name)
        if size == expected and read(path) == checksum:
            return None
        if store.remote:
            path.unlink()  # the copy, which is downloaded again
            return None
        if size != expected:
            return f"{file} in {store} is torn: expected {expected:,} bytes, got {size:,}"
        return f"{file} in {store} has other bytes than were written, by its checksum"

    found: dict[int, list[str]] = {}
    files = [(shard, name) for shard in checksums for name in manifest.arrays]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (shard, _), text in zip(files, pool.map(lambda file: problem(*file), files), strict=True):
            if text is not None:
                found.setdefault(shard, []).append(text)
    return found


def checksum_once(path: Path) -> int:
    """Return a file's checksum, which is computed once a process unless the file is written anew."""
    status = path.stat()
    return _checksum_of(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2**16)
def _checksum_of(path: Path, size: int, written: int) -> int:
    return file_checksum(path)


def _unsealed(text: str, manifest: Manifest) -> dict[str, Any] | None:
    """Return what was written for these outputs; None for what is damaged, or of others."""
    try:
        content = unseal(text)
    except ValueError:
        return None
    return content if content.get("of") == manifest.plan else None


def file_size(manifest: Manifest, shard: int, name: str) -> int:
    array, rows = manifest.arrays[name], len(manifest.rows_of(shard))
    return len(header(array, rows)) + rows * array.bytes_per_row


def _write(file: BinaryIO, content: bytes) -> None:
    """Write all of it: the system may take a part, and the next call tells why."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
