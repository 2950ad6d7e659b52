"""No two files of the package import each other, not even in a function or for the type checker alone."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "kd_lightning").rglob("*.py")
}


def imports(source: str, files: set[str]) -> set[str]:
    """Return the files that a source imports, wherever it does so: a package stands for its ``__init__``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{name.name}" for name in node.names}
            found |= (inside & files) or {node.module or ""}
    return found & files


def in_order(sources: dict[str, str]) -> list[str]:
    return list(TopologicalSorter({name: imports(text, set(sources)) for name, text in sources.items()}).static_order())


def test_a_reader_can_read_the_files_one_after_the_other() -> None:
    assert len(in_order({name: path.read_text() for name, path in FILES.items()})) == len(FILES) > 100


def test_a_circle_that_a_function_hides_is_found() -> None:
    for_checkers = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a"
    hidden = {"a": "def f():\n    from b import g\n", "b": for_checkers}
    with pytest.raises(CycleError):
        in_order(hidden)
