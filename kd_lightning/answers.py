"""What a command found, kept beside its pipeline: where nothing has changed, the same command says it again at once.

Nothing has changed where the resolved configuration and the files it was composed of, the installed packages, this
package's files and a user's modules, the files of the data, and the files of the stages are as they were: by size and
times, so that a file that was written again counts as another. In doubt the pipeline runs, which reuses its stages by
what they depend on, and takes longer. PyTorch is not imported: that alone would take longer than the answer.
"""

import hashlib
import json
import os
import platform
import re
import sqlite3
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from rich.console import Console

from kd_lightning.durable_files import seal, unseal, write_atomically
from kd_lightning.report.table import Table
from kd_lightning.report.terminal import print_places, print_said
from kd_lightning.report.words import Words
from kd_lightning.tracking.calls import within
from kd_lightning.tracking.sqlite import sqlite_file
from kd_lightning.tracking.store import named_store, plain_client

_PACKAGE = Path(__file__).parent
_STANDARD = sysconfig.get_paths()["stdlib"]
_ENVIRONMENT = re.compile(r"(MLFLOW|CUDA|OMP|MKL|ORT|OPENVINO|TORCH|PYTORCH|PL|HF|TRANSFORMERS)_")
"""Variables of the environment on which a run may depend."""
_NOT_LOOKED_AT = re.compile(r"\..*|__pycache__|lock|owner|shipped\.json|answer-\w+\.json|.*\.pyc")
_CONFIGURATIONS = "*.yaml"
_NO_CONFIGURATIONS = re.compile(
    rf"{_NOT_LOOKED_AT.pattern}|site-packages|node_modules|mlruns|mlartifacts|outputs|multirun"
)
"""What is not looked through for configurations, where a whole project is their folder."""
_KNOWN = ("kd_lightning.", "torch.", "torchmetrics.", "lightning.", "functools.", "builtins.")
_READS_ELSEWHERE = "kd_lightning.models.hugging_face"  # a hub's cache
_MOST_FILES = 20_000
_CLOCK_NS = 50_000_000
"""By how much the time of a file may lag behind the clock."""
_STORE_SECONDS = 4.0


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a command asks.

    Attributes:
        key: Hash of the configuration, and of the packages, environment and processor that it meets.
        watched: Files and folders that it depends on, but for the data and the stages.
        since: When the process began, in ns since 1970.
    """

    key: str
    watched: tuple[str, ...]
    since: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command found.

    Attributes:
        tables: Of the verdict.
        words: Of the verdict.
        objective: What a Hydra sweeper optimises.
        verdict: ``verdict.json``.
        report: ``report.html``.
        places: Where MLflow shows the runs, a line each.
        store: Which has the runs, as their journal names it; None for none.
        run_id: Of the parent run in it.
        at: When it was found, as people write it.
    """

    tables: tuple[Table, ...]
    words: Words
    objective: float | None
    verdict: str
    report: str
    places: tuple[str, ...]
    store: str | None
    run_id: str | None
    at: str = ""


class _File(NamedTuple):
    path: str
    size: int
    modified: int
    changed: int


def question(
    config: Mapping[str, Any], overrides: Sequence[str], folders: Iterable[str], since: int
) -> Question | None:
    """Return what a command asks; None for what has to run to be known.

    That is a process of a distributed training, and a configuration with a part of another package, or a network from
    a hub, which may read what nobody knows.

    Args:
        config: Resolved.
        overrides: With which it was composed; variants are composed with them, too.
        folders: Where its files are.
        since: When the process began, in ns since 1970.
    """
    strings = list(_strings(config))
    targets = [value for name, value in strings if name == "_target_"]
    work_dir = config.get("work_dir")
    if "LOCAL_RANK" in os.environ or not isinstance(work_dir, str) or not all(map(_is_known, targets)):
        return None
    asked = {
        "config": config,
        "overrides": list(overrides),
        "environment": {name: value for name, value in os.environ.items() if _ENVIRONMENT.match(name)},
        "python": [sys.version, sys.path, os.getcwd()],
        "packages": sorted(_packages()),
        "processor": [*_processor(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None],
    }
    named = {value for _, value in strings if value and len(value) < 4096 and "\n" not in value and _is_there(value)}
    inputs = sorted(name for name in named if not Path(work_dir).absolute().is_relative_to(Path(name).absolute()))
    return Question(
        key=hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest(),
        watched=(str(_PACKAGE), *(f"{folder}/{_CONFIGURATIONS}" for folder in sorted(set(folders))), *inputs),
        since=since,
    )


def find(work_dir: Path, asked: Question) -> Answer | None:
    """Return what the same command found; None where something has changed, or its run is not in the store."""
    for file in work_dir.glob(f"pipeline-*/{_name(asked)}"):
        try:
            content = unseal(file.read_bytes())
            fields = dict(content["answer"])
            tables = tuple(Table(*map(_as_tuple, table)) for table in fields.pop("tables"))
            found = Answer(tables=tables, words=Words(*map(_as_tuple, fields.pop("words"))), **fields)
            watched, state = content["watched"], content["state"]
        except (ValueError, KeyError, TypeError, OSError):
            continue  # of another version
        if _state([*asked.watched, *watched]) == state and _is_in_store(found, file.parent):
            return replace(found, places=tuple(found.places))
    return None


def say_again(answer: Answer, console: Console, *, quiet: bool = False, as_json: bool = False) -> None:
    """Print what a pipeline prints at its end, and that this is not of today."""
    if as_json:
        print(Path(answer.verdict).read_text().rstrip("\n"))
    elif quiet:
        print(answer.words.sentence)
    else:
        console.print(
            f"Nothing has changed since {answer.at}, when this was found:\n",
            highlight=False,
        )
        print_said(answer.tables, answer.words, console)
        print_places(answer.report, answer.places, console)


def keep(folder: Path, asked: Question, answer: Answer, sources: Iterable[Path], stages: Iterable[Path]) -> None:
    """Keep an answer, unless what it depends on was written since the command began.

    Args:
        folder: Of the pipeline.
        asked: By the command.
        answer: What it found.
        sources: Files and folders that the data is read from.
        stages: Folders of all that was trained and stored.
    """
    inputs = [*_own_modules(), *sorted({str(path) for path in sources})]
    files = _look([*asked.watched, *inputs])
    if files is None or any(max(file.modified, file.changed) > asked.since - _CLOCK_NS for file in files):
        return
    watched = [*inputs, *sorted({str(path) for path in (folder, *stages)})]
    state = _state([*asked.watched, *watched])
    if state is not None:
        at = time.strftime("%Y-%m-%d %H:%M")
        content = {"answer": asdict(replace(answer, at=at)), "watched": watched, "state": state}
        for older in folder.glob("answer-*.json"):
            older.unlink(missing_ok=True)
        write_atomically(folder / _name(asked), seal(content).encode())


def _name(asked: Question) -> str:
    return f"answer-{asked.key[:12]}.json"


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


def _strings(part: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Return all strings of a configuration, with the names that they stand under."""
    if isinstance(part, Mapping):
        for key, value in part.items():
            yield from _strings(value, str(key))
    elif isinstance(part, list | tuple):
        for value in part:
            yield from _strings(value, name)
    elif isinstance(part, str):
        yield name, part


def _is_known(target: str) -> bool:
    """Tell whether all that a part reads is named by the configuration, or its modules are a user's own."""
    return not target.startswith(_READS_ELSEWHERE) and (target.startswith(_KNOWN) or _is_own_module(target))


def _is_own_module(target: str) -> bool:
    top = target.partition(".")[0]
    folders = [Path(entry or ".") for entry in sys.path if not _is_installed(entry)]
    return any((folder / top).is_dir() or (folder / f"{top}.py").is_file() for folder in folders)


def _own_modules() -> list[str]:
    """Return the files of all modules that were imported and belong to no installed package."""
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    own = {file for file in files if file and not _is_installed(file) and not Path(file).is_relative_to(_PACKAGE)}
    return sorted(own)


def _is_installed(path: str) -> bool:
    parts = Path(path).parts
    return "site-packages" in parts or "dist-packages" in parts or path.startswith(_STANDARD) or path.endswith(".zip")


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def _packages() -> Iterator[str]:
    """Name each installed package with its version, and when it was installed."""
    for entry in sys.path:
        try:
            found = [item for item in os.scandir(entry or ".") if item.name.endswith((".dist-info", ".egg-info"))]
        except OSError:
            continue
        for item in found:
            yield f"{item.name} {item.stat().st_mtime_ns}"


def _processor() -> tuple[str, ...]:
    """Return what the timings depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.machine(), platform.processor()
    return tuple(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def _files(path: str, skipped: re.Pattern[str] = _NOT_LOOKED_AT) -> Iterator[_File]:
    """Return a file, or all those of a folder; a file that is not there, with a size of -1."""
    if not os.path.isdir(path):
        try:
            found = os.stat(path)
        except OSError:
            yield _File(path, -1, 0, 0)
        else:
            yield _File(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        return
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not skipped.fullmatch(name))
        for name in sorted(files):
            if not skipped.fullmatch(name):
                yield from _files(os.path.join(folder, name))


def _look(paths: Iterable[str]) -> list[_File] | None:
    """Look at the files, and at the configurations in folders; None for more than can be looked at in a moment."""
    found, seen = list[_File](), 0
    for path in paths:
        folder = path.removesuffix(f"/{_CONFIGURATIONS}")
        all_of_it = folder == path
        for file in _files(folder, _NOT_LOOKED_AT if all_of_it else _NO_CONFIGURATIONS):
            seen += 1
            if seen > _MOST_FILES:
                return None
            if all_of_it or file.path.endswith(".yaml"):
                found.append(file)
    return found


def _state(paths: Iterable[str]) -> str | None:
    """Hash what the files are by size and times; None for more than can be looked at in a moment."""
    files = _look(paths)
    return None if files is None else hashlib.sha256(repr(files).encode()).hexdigest()


def _is_in_store(answer: Answer, folder: Path) -> bool:
    """Tell whether the store still has the run, where one has it at all."""
    if answer.store is None:
        return True
    if answer.run_id is None:
        return False
    try:
        uri = named_store(answer.store, folder)
        file = sqlite_file(uri)
        if file is None:
            run = within(_STORE_SECONDS, lambda: plain_client(uri).get_run(answer.run_id))
            return bool(run.info.lifecycle_stage == "active")
        address = f"file:{quote(str(file.absolute()))}?mode=ro"
        with closing(sqlite3.connect(address, uri=True, timeout=_STORE_SECONDS)) as connection:
            query = "SELECT lifecycle_stage FROM runs WHERE run_uuid = ?"
            return bool(connection.execute(query, (answer.run_id,)).fetchone() == ("active",))
    except Exception:  # whatever it is, the pipeline runs, and says it
        return False
