"""What a command found, kept beside its pipeline: where nothing has changed, the same command says it again at once.

Nothing has changed where the resolved configuration and the files it was composed of, the installed packages, the
environment, this package's files and a user's modules, the files of the data and those of the stages are as they were
(:mod:`kd_lightning.watched_files`), and the store has all of the runs. In doubt the pipeline runs, which reuses its
stages by what they depend on, and takes longer. PyTorch is not imported: that alone would take longer than the answer.
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
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console

from kd_lightning.durable_files import seal, unseal, write_atomically
from kd_lightning.report.table import Table
from kd_lightning.report.terminal import print_places, print_said
from kd_lightning.report.words import Words
from kd_lightning.tracking.calls import within
from kd_lightning.tracking.sqlite import sqlite_file
from kd_lightning.tracking.store import named_store, plain_client
from kd_lightning.watched_files import Watched, is_older, look, state_of

_PACKAGE = Path(__file__).parent
_STANDARD = sysconfig.get_paths()["stdlib"]
_OF_TERMINAL = re.compile(
    r"_|SHLVL|(OLD)?PWD|TERM(_.*)?|COLORTERM|COLUMNS|LINES|LS_COLORS|DISPLAY|WINDOWID|.*_SESSION_(ID|BUS_ADDRESS)|STY"
    r"|INVOCATION_ID|JOURNAL_STREAM|(TMUX|SSH|VSCODE|GNOME|KITTY|WT|PYTEST|KD)(_.*)?"
)
"""Variables of the environment on which no run depends."""
_RANKS = ("LOCAL_RANK", "NODE_RANK", "RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
_KNOWN = ("kd_lightning.", "torch.", "torchmetrics.", "lightning.", "functools.", "builtins.")
_READ_ELSEWHERE = ("kd_lightning.models.hugging_face", "torch.hub.")  # a hub's cache
_STORE_SECONDS = 4.0


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a command asks.

    Attributes:
        key: Hash of the configuration, and of the packages, environment and processor that it meets.
        work_dir: Where the answer may be.
        watched: What it depends on, but for the data and the stages.
        since: When the process began, in ns since 1970.
    """

    key: str
    work_dir: Path
    watched: Watched
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
        experiment: Its id in the store.
        runs: Their ids in the store.
        at: When it was found, as people write it.
    """

    tables: tuple[Table, ...]
    words: Words
    objective: float | None
    verdict: str
    report: str
    places: tuple[str, ...]
    store: str | None = None
    experiment: str | None = None
    runs: tuple[str, ...] = ()
    at: str = ""


def question(
    config: Mapping[str, Any], overrides: Sequence[str], folders: Iterable[str], since: int
) -> Question | None:
    """Return what a command asks; None for what has to run to be known.

    That is a process of a distributed training, what is to be registered in MLflow, and a configuration of which
    something may read what nobody knows (:func:`is_known`).

    Args:
        config: Resolved.
        overrides: With which it was composed; variants are composed with them, too.
        folders: Where its files are.
        since: When the process began, in ns since 1970.
    """
    work_dir, logger = config.get("work_dir"), config.get("logger")
    registers = isinstance(logger, Mapping) and logger.get("register") is not None
    if _is_rank() or not isinstance(work_dir, str) or registers or not is_known(config):
        return None
    asked = {
        "config": config,
        "overrides": list(overrides),
        "environment": {name: value for name, value in os.environ.items() if not _OF_TERMINAL.fullmatch(name)},
        "python": [sys.version, sys.path, os.getcwd()],
        "packages": sorted(_packages()),
        "processor": [*_processor(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None],
    }
    return Question(
        key=hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest(),
        work_dir=Path(work_dir),
        watched=Watched((str(_PACKAGE),), tuple(sorted(set(folders))), tuple(named_paths(config, Path(work_dir)))),
        since=since,
    )


def is_known(config: Any) -> bool:
    """Tell whether a configuration names all that its parts read, or they are a user's own modules.

    A part of another package, a network from a hub, and a teacher that comes with its weights from a user's function
    may read what nobody knows.
    """
    strings = list(_strings(config))
    targets = [value for name, value in strings if name == "_target_"]
    own = [target for target in targets if not target.startswith(_KNOWN)]
    if any(target.startswith(_READ_ELSEWHERE) for target in targets) or not all(map(_is_own_module, own)):
        return False
    return not own or all(value != "pretrained" for _, value in strings)


def named_paths(config: Any, work_dir: Path) -> list[str]:
    """Return the files and folders that a configuration names, but for those that hold what pipelines write."""
    strings = {value for _, value in _strings(config) if 0 < len(value) < 4096}
    written = work_dir.absolute()
    return sorted(name for name in strings if _is_there(name) and not written.is_relative_to(Path(name).absolute()))


def existing(paths: Any) -> list[str]:
    """Return what a data module says that it reads.

    Raises:
        ValueError: For something else than paths of files and folders that are there.
    """
    if not isinstance(paths, list | tuple) or not all(Path(path).exists() for path in paths):
        raise ValueError(f"expected sources() of the data module to be paths of what is there, got {paths!r}")
    return [str(path) for path in paths]


def find(asked: Question) -> Answer | None:
    """Return what the same command found; None where something has changed, or the store lacks one of its runs."""
    for file in asked.work_dir.glob(f"pipeline-*/{_name(asked)}"):
        try:
            content = unseal(file.read_bytes())
            fields = {key: _as_tuple(value) for key, value in content["answer"].items()}
            tables = tuple(Table(*table) for table in fields.pop("tables"))
            found = Answer(tables=tables, words=Words(*fields.pop("words")), **fields)
            if not Path(found.report).is_file():  # it may be made again, but has to be there
                continue
            watched, state = Watched(*map(tuple, content["watched"])), content["state"]
        except (ValueError, KeyError, TypeError, OSError):
            continue  # of another version
        entries = look(asked.watched.plus(watched))
        if entries is not None and state_of(entries) == state and _is_in_store(found, file.parent):
            return found
    return None


def say_again(answer: Answer, console: Console, *, quiet: bool = False, as_json: bool = False) -> None:
    """Print what a pipeline prints at its end, and that this is not of today."""
    if as_json:
        print(Path(answer.verdict).read_text().rstrip("\n"))
    elif quiet:
        print(answer.words.sentence)
    else:
        console.print(f"Nothing has changed since {answer.at}, when this was found:\n", highlight=False)
        print_said(answer.tables, answer.words, console)
        print_places(answer.report, answer.places, console)


def keep(
    folder: Path, asked: Question, answer: Answer, code: Iterable[str], inputs: Iterable[str], stages: Iterable[Path]
) -> None:
    """Keep an answer, unless what it depends on was written since the command began.

    Args:
        folder: Of the pipeline.
        asked: By the command.
        answer: What it found.
        code: Files of a user's modules, beside those that were imported.
        inputs: Files and folders that the data is read from, and others that are named.
        stages: Folders of all that was trained and stored.
    """
    given = Watched(code=tuple(sorted({*_own_modules(), *code})), inputs=tuple(sorted(set(inputs))))
    written = Watched(code=tuple(sorted({str(path) for path in (folder, *stages)})))
    known = given.plus(written)
    before = look(asked.watched.plus(given))
    if before is None or not is_older(before, asked.since):
        return
    entries = look(asked.watched.plus(known))
    if entries is None or not {*before} <= {*entries}:  # written meanwhile
        return
    content = {
        "answer": asdict(replace(answer, at=time.strftime("%Y-%m-%d %H:%M"))),
        "watched": list(known),
        "state": state_of(entries),
    }
    for older in folder.glob("answer-*.json"):
        older.unlink(missing_ok=True)
    write_atomically(folder / _name(asked), seal(content).encode())


def _name(asked: Question) -> str:
    return f"answer-{asked.key[:12]}.json"


def _is_rank() -> bool:
    return any(name in os.environ for name in _RANKS) or os.environ.get("SLURM_NTASKS", "1") != "1"


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


def _is_own_module(target: str) -> bool:
    top = target.partition(".")[0]
    folders = [Path(entry or ".") for entry in sys.path if not _is_installed(entry)]
    return any((folder / top / "__init__.py").is_file() or (folder / f"{top}.py").is_file() for folder in folders)


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
            with suppress(OSError):  # a link that leads nowhere
                yield f"{item.name} {item.stat().st_mtime_ns}"


def _processor() -> tuple[str, ...]:
    """Return what the timings depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.machine(), platform.processor()
    return tuple(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def _is_in_store(answer: Answer, folder: Path) -> bool:
    """Tell whether the store still has all of the runs, where it has to."""
    if answer.store is None:
        return True
    uri = named_store(answer.store, folder)
    file = sqlite_file(uri)
    if file is None:
        client, names = plain_client(uri), ", ".join(f"'{run}'" for run in answer.runs)
        query, count = f"attributes.run_id IN ({names})", len(answer.runs)
        found = within(_STORE_SECONDS, lambda: client.search_runs([answer.experiment], query, max_results=count))
        return len(found) == count
    address = f"file:{quote(str(file.absolute()))}?mode=ro"
    with closing(sqlite3.connect(address, uri=True, timeout=_STORE_SECONDS)) as connection:
        marks = ", ".join("?" * len(answer.runs))
        query = f"SELECT count(*) FROM runs WHERE lifecycle_stage = 'active' AND run_uuid IN ({marks})"
        return bool(connection.execute(query, answer.runs).fetchone() == (len(answer.runs),))
