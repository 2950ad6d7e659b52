"""Whether files are as they were: by place, size, times and number, so that one that was written again is another."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_OF_NO_STAGE = re.compile(r"\..*|__pycache__|lock|owner|shipped\.json|report\.html|answer-\w+\.json|.*\.pyc")
_OF_NO_CONFIGURATION = re.compile(r"\..*|__pycache__|site-packages|node_modules|mlruns|mlartifacts|outputs|multirun")
"""What is not looked through for configurations, where a whole project is their folder."""
_MOST = 20_000
_CLOCK_NS = 50_000_000
"""By how much the time of a file may lag behind the clock."""


class Watched(NamedTuple):
    """Paths of files and folders.

    Attributes:
        code: Without what the interpreter and other commands put into its folders; and the same of stages.
        configurations: Folders, of which ``.yaml`` files count.
        inputs: Of which everything counts: folders themselves, and where links lead to.
    """

    code: tuple[str, ...] = ()
    configurations: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()

    def plus(self, other: "Watched") -> "Watched":
        """Return both."""
        return Watched(*(tuple(dict.fromkeys((*own, *more))) for own, more in zip(self, other, strict=True)))


class Entry(NamedTuple):
    """A file, folder or link as it is; with a size of -1 where there is none."""

    path: str
    size: int
    modified: int
    changed: int
    number: int


def look(watched: Watched) -> list[Entry] | None:
    """Look at the files; None for more than can be looked at in a moment."""
    found: list[Entry] = []
    for seen, entry in enumerate(_entries(watched)):
        if seen >= _MOST:
            return None
        if entry is not None:
            found.append(entry)
    return found


def is_older(entries: Iterable[Entry], since: int) -> bool:
    """Tell whether none was written, or put where it is, after a time in ns since 1970."""
    return all(max(entry.modified, entry.changed) <= since - _CLOCK_NS for entry in entries)


def state_of(entries: Iterable[Entry]) -> str:
    """Hash them."""
    return hashlib.sha256(repr(list(entries)).encode()).hexdigest()


def _entries(watched: Watched) -> Iterator[Entry | None]:
    for path in watched.code:
        yield from (_entry(file) for file in _files(path, _OF_NO_STAGE))
    for path in watched.configurations:
        for file in _files(path, _OF_NO_CONFIGURATION):
            yield _entry(file) if file.endswith(".yaml") else None
    for path in watched.inputs:
        yield from _everything(path)


def _files(path: str, skipped: re.Pattern[str]) -> Iterator[str]:
    if not os.path.isdir(path):
        yield path
        return
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not skipped.fullmatch(name))
        yield from (os.path.join(folder, name) for name in sorted(files) if not skipped.fullmatch(name))


def _everything(path: str) -> Iterator[Entry]:
    """Return what is there, and what says where it is: the links on the way, and the folders."""
    absolute = Path(os.path.abspath(path))
    yield from (_entry(str(part), link=True) for part in (absolute, *absolute.parents) if part.is_symlink())
    yield _entry(path)
    for folder, folders, files in os.walk(path, followlinks=True):
        folders.sort()
        for name in (*folders, *sorted(files)):
            inside = os.path.join(folder, name)
            if os.path.islink(inside):
                yield _entry(inside, link=True)
            yield _entry(inside)


def _entry(path: str, link: bool = False) -> Entry:
    try:
        found = os.lstat(path) if link else os.stat(path)
    except OSError:
        return Entry(path, -1, 0, 0, 0)
    return Entry(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
