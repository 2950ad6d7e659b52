"""What Hydra says of a command line that it cannot compose, in one line and with what would be right."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TextIO

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

_NOISE = ("Set the environment", "See https://", "Config search path", "provider=", "full_key:", "object_type=")


class Held(io.StringIO):
    """Holds what is written to a stream until it is known whether it can be said shorter."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream


def explain(said: str, overrides: Sequence[str], folder: Path) -> str:
    """Return one line on why a command line cannot be composed.

    Args:
        said: By Hydra.
        overrides: As they were given.
        folder: Of the configurations.
    """
    unreadable = [word for word in overrides if not _reads(word)]
    nameless = [word for word in overrides if not word.partition("=")[0].lstrip("+~")]
    if nameless:
        return f"{nameless[0]}: expected path=value, got no path"
    if unreadable:
        path, equals, value = unreadable[0].partition("=")
        quoted = f'{path}="{value}"' if "'" in value else f"{path}='{value}'"
        remedy = f"quote a value with spaces or other characters twice, {_in_shell(quoted)}"
        if value.startswith(("[", "{")):
            remedy = "close each bracket and quote"
        return f"{unreadable[0]}: expected path=value in Hydra's grammar: " + (remedy if equals else "give a value")
    return "; ".join(_alternatives(overrides, folder)) or _first_line(said)


def _reads(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _in_shell(word: str) -> str:
    return f'"{word}"' if "'" in word else f"'{word}'"


def _first_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_NOISE)]
    return " ".join(lines[-1:] if lines and lines[0].startswith("Traceback") else lines[:3])


def _alternatives(overrides: Sequence[str], folder: Path) -> Iterator[str]:
    """Say for overrides that name nothing in the configuration which names are there."""
    groups = {
        group.name: sorted(file.relative_to(group).with_suffix("").as_posix() for file in group.rglob("*.yaml"))
        for group in sorted(folder.iterdir())
        if group.is_dir()
    }
    paths = _known_paths(folder, [word for word in overrides if word.partition("=")[0].partition("@")[0] in groups])
    for override in overrides:
        path, _, value = override.lstrip("+~").partition("=")
        group = path.partition("@")[0]
        chosen = re.findall(r"[\w/.-]+", value)
        if path.startswith("hydra."):
            continue
        if group in groups and not set(chosen) <= set(groups[group]):
            yield f"{path}={value}: expected an option of {group}: the options here are {', '.join(groups[group])}"
        elif path not in paths and group not in groups:
            nearest = get_close_matches(path, paths, n=5, cutoff=0.5) + get_close_matches(group, groups, n=2)
            yield (
                f"{path}: nothing has this name, the nearest names are {', '.join(nearest) or 'none'}; groups: "
                f"{', '.join(groups)}; all paths: kd-lightning --cfg job"
            )


def _known_paths(folder: Path, chosen: list[str]) -> list[str]:
    for overrides in (chosen, []):
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_dir(version_base="1.3", config_dir=str(folder)):
                return list(_paths(OmegaConf.to_container(hydra.compose("config", overrides))))
        except (HydraException, OmegaConfBaseException, ValueError):
            continue
    return []


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _paths(value, f"{prefix}{key}.")
