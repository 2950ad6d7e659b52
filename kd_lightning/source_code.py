"""What code computes, as hashes: this package's, and that of the modules a configuration names and what they import.

A comment, a docstring, the layout, the words of an error, a warning or a log line change no hash; anything else does,
since a needless training costs less than a wrong figure. Of this package, files that only decide which stages there
are, or what is said of them, are left out (:data:`TELLS`).

Of a user's module the whole of what it imports from his own files is followed. Not seen are files that it reads, and
modules that it imports by a computed name. Of an installed package count its version and the modules that a
configuration names.
"""

import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import lightning
import torch

_PACKAGE = Path(__file__).parent
TELLS = frozenset(
    {
        "__main__.py",
        "answers.py",
        "cli.py",
        "command.py",
        "configuration/assembling.py",
        "configuration/composing.py",
        "configuration/keys.py",
        "configuration/names.py",
        "data/inputs.py",
        "pipeline/compare.py",
        "pipeline/knowledge.py",
        "pipeline/logged.py",
        "pipeline/pipeline.py",
        "pipeline/preflight.py",
        "pipeline/report_examples.py",
        "pipeline/report_groups.py",
        "pipeline/report_record.py",
        "pipeline/report_tasks.py",
        "pipeline/shown_inputs.py",
        "pipeline/soft_outputs.py",
        "pipeline/statistics.py",
        "preflight/trainer.py",
        "preflight/weights.py",
        "report/__init__.py",
        "report/facts.py",
        "report/figures.py",
        "report/glossary.py",
        "report/html.py",
        "report/html_quantization.py",
        "report/html_sections.py",
        "report/html_training.py",
        "report/html_verdict.py",
        "report/in_a_minute.py",
        "report/many.py",
        "report/markdown.py",
        "report/report_command.py",
        "report/stage_progress.py",
        "report/svg.py",
        "report/table.py",
        "report/terminal.py",
        "report/verdict_json.py",
        "report/words.py",
        "tracking/calls.py",
        "tracking/client.py",
        "tracking/datasets.py",
        "tracking/gradient_norms.py",
        "tracking/journal.py",
        "tracking/journal_logger.py",
        "tracking/logger.py",
        "tracking/models.py",
        "tracking/opening.py",
        "tracking/operations.py",
        "tracking/origin.py",
        "tracking/runs.py",
        "tracking/serving.py",
        "tracking/shipper.py",
        "tracking/shipping.py",
        "tracking/sqlite.py",
        "tracking/step_clock.py",
        "tracking/store.py",
        "tracking/sweeps.py",
        "tracking/sync.py",
        "tracking/system.py",
        "tracking/view.py",
        "watched_files.py",
    }
)
"""Files of this package that no stage's outcome depends on."""
_SAYS = {"print", "rank_zero_info", "rank_zero_warn", "rank_zero_debug", "rank_zero_deprecation"}
_SPEAKERS = re.compile(r"(.*_)?(log|logger|logging|warnings|console)$", re.IGNORECASE)
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def hash_of(source: bytes) -> str:
    """Hash what Python source does."""
    return _hash_of_tree(ast.parse(source))


@cache
def package_hash() -> str:
    """Hash what this package computes, and name what it computes with."""
    digest = hashlib.sha256(f"torch {torch.__version__} lightning {lightning.__version__}".encode())
    for file in sorted(_PACKAGE.rglob("*.py")):
        name = file.relative_to(_PACKAGE).as_posix()
        if name not in TELLS:
            digest.update(f"{name} {hash_of(file.read_bytes())}".encode())
    return digest.hexdigest()


def hashes_of(config: Any, functions: Iterable[Callable[..., Any] | None] = ()) -> dict[str, str]:
    """Hash the modules that a configuration's ``_target_`` and other dotted names, and functions, come from.

    A module is read once a process, or again when it was reloaded: the hash is of the code that runs, also where its
    file is edited meanwhile.

    Returns:
        Hashes by the name of a module, and versions by that of an installed package.
    """
    named = {module for name in _targets(config) if (module := _module_in(name)) is not None}
    waiting = [*named, *(module for function in functions if (module := _module_of(function)) is not None)]
    found: dict[str, str] = {}
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if name in seen or top in sys.stdlib_module_names or top == _PACKAGE.name:
            continue
        seen.add(name)
        own = _is_own(name)
        if own or name in named:
            source = _read(name)
            if source is not None:
                found[name] = source.hash
                waiting += source.imports if own else ()
        if own:
            waiting += [name.rpartition(".")[0]] * ("." in name)  # a package's __init__.py runs, too
        elif (version := getattr(sys.modules.get(top), "__version__", None)) is not None:
            found[f"{top} version"] = str(version)
    return found


def files_read() -> list[str]:
    """Return the files of a user's modules, and others, that :func:`hashes_of` has read in this process."""
    return sorted({str(file) for name in _sources if (file := _file(name)) is not None})


def _hash_of_tree(tree: ast.AST) -> str:
    parts: list[str] = []
    _meaning(tree, parts)
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _meaning(node: Any, parts: list[str], wordless: bool = False) -> None:
    """Write a syntax tree down, without docstrings, those of attributes too, and the words of what is raised or said.

    One walk: ``ast.dump`` after an ``ast.NodeTransformer`` takes three times as long.
    """
    if isinstance(node, ast.AST):
        if isinstance(node, ast.Expr):
            if isinstance(node.value, ast.Constant):
                return
            wordless = wordless or (isinstance(node.value, ast.Call) and _only_says(node.value.func))
        elif isinstance(node, ast.Raise):
            wordless = True
        elif wordless and (isinstance(node, ast.JoinedStr) or _is_string(node)):
            parts.append("words")
            return
        parts.append(type(node).__name__)
        for field in node._fields:
            _meaning(getattr(node, field, None), parts, wordless)
    elif isinstance(node, list):
        parts.append("[")
        for item in node:
            _meaning(item, parts, wordless)
        parts.append("]")
    else:
        parts.append(repr(node))


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


class _Source:
    def __init__(self, file: Path, package: str) -> None:
        content = file.read_bytes()
        self.hash, self.imports = hashlib.sha256(content).hexdigest(), list[str]()
        if file.suffix == ".py":
            tree = ast.parse(content)
            self.hash, self.imports = _hash_of_tree(tree), list(_imports(tree, package))


_sources: dict[str, tuple[ModuleSpec | None, _Source]] = {}


def _read(name: str) -> _Source | None:
    spec = _spec(name)
    file = _file(name)
    if file is None:
        return None
    known = _sources.get(name)
    if known is None or known[0] is not spec:
        package = (spec.parent if spec is not None else None) or ""
        known = _sources[name] = (spec, _Source(file, package))
    return known[1]


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:
                continue
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))  # some of these are modules


@cache
def _is_installed(top: str) -> bool:
    file = _file(top)
    return file is not None and not {"site-packages", "dist-packages"}.isdisjoint(file.parts)


def _is_own(name: str) -> bool:
    return name == "__main__" or (not _is_installed(name.partition(".")[0]) and _spec(name) is not None)


def _file(name: str) -> Path | None:
    spec, module = _spec(name), sys.modules.get(name)
    origin = spec.origin if spec is not None else getattr(module, "__file__", None)
    return Path(origin) if origin is not None and Path(origin).is_file() else None


def _spec(name: str) -> ModuleSpec | None:
    """Return where a module comes from; None where there is no such module."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__spec__", None)
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None


def _module_in(name: str) -> str | None:
    """Return the longest beginning of a dotted name that is a module."""
    parts = name.split(".")
    beginnings = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((beginning for beginning in beginnings if _spec(beginning) is not None), None)


def _module_of(function: Any) -> str | None:
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__module__", None)


def _targets(part: Any, imported: bool = False) -> Iterator[str]:
    """Find what Hydra imports, and other dotted names that begin with a module that is there."""
    if isinstance(part, str):
        if _DOTTED.fullmatch(part) and (imported or part.partition(".")[0] in sys.modules):
            yield part
    elif isinstance(part, Mapping):
        gets = str(part.get("_target_")).startswith("hydra.utils.get_")
        for name, item in part.items():
            yield from _targets(item, name == "_target_" or (gets and name == "path"))
    elif isinstance(part, list | tuple):
        for item in part:
            yield from _targets(item)


def _only_says(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id in _SAYS
    speaker = function.value if isinstance(function, ast.Attribute) else None
    name = getattr(speaker, "attr", None) or getattr(speaker, "id", None)
    return name is not None and _SPEAKERS.fullmatch(name) is not None
