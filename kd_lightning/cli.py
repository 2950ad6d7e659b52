"""The command line: Hydra in, a pipeline out.

What a pipeline needs takes seconds to import, and is imported once there is a configuration: a typo, ``--help`` and
``--cfg job`` do not wait for it.
"""

import json
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import kd_lightning
from kd_lightning.configuration.composing import Held, explain

if TYPE_CHECKING:
    from kd_lightning.answers import Question

_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")
_OWN_FLAGS = {"-q": "quiet", "--quiet": "quiet", "--json": "json"}
_ARGUMENTS = "KD_ARGUMENTS"
"""Variable of the environment with the command's arguments: a process that a launcher starts may have another argv."""
_BEGUN = time.time_ns()
_terminated = False


def conf_dir() -> Path:
    """Return the folder of configurations: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def main() -> None:
    """Entry point of ``kd-lightning`` and ``python -m kd_lightning``."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    sys.unraisablehook = _on_lost_exception
    os.environ[_ARGUMENTS] = json.dumps(sys.argv[1:])
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in _OWN_FLAGS]  # Hydra takes no flags but its own
    try:
        with redirect_stderr(Held(sys.stderr)) as said:
            _hydra_main()
    except (KeyboardInterrupt, SystemExit) as error:
        if not isinstance(error, SystemExit) or _is_termination(error):
            print("\nInterrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
            sys.exit(128 + (signal.SIGTERM if isinstance(error, SystemExit) else signal.SIGINT))
        if error.code == 1 and said.getvalue():  # by Hydra, before there was a configuration
            words = zip(["", *sys.argv[1:-1]], sys.argv[1:], strict=True)  # each after the one before it
            overrides = [word for before, word in words if not word.startswith("-") and before not in _WITH_VALUE]
            raise SystemExit(f"kd-lightning: {explain(said.getvalue(), overrides, conf_dir())}") from error
        sys.stderr.write(said.getvalue())
        raise


class _Terminated(SystemExit):
    """SIGTERM has come."""


def _is_termination(error: SystemExit) -> bool:
    """Tell whether it was raised for SIGTERM, here or by Lightning, which need not have been imported."""
    return isinstance(error, _Terminated) or type(error).__name__ == "SIGTERMException"


def _on_sigterm(number: int, frame: Any) -> None:
    """End as Ctrl-C does. In a training Lightning's handler calls this one, and ends it after the batch by itself.

    A second signal ends that at once, too.
    """
    global _terminated
    if signal.getsignal(signal.SIGTERM) is _on_sigterm or _terminated:
        raise _Terminated
    _terminated = True


def _on_lost_exception(lost: Any) -> None:
    """Send SIGTERM again where Python drops what its handler raises, as in the callback of a weak reference."""
    if lost.exc_type is _Terminated:
        again = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGTERM))  # after that callback
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(lost)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def _hydra_main(config: DictConfig) -> float | None:
    if isinstance(sys.stderr, Held):  # the configuration is there
        sys.stderr = sys.stderr.stream
    _quiet()
    from kd_lightning.answers import find, say_again

    overrides, sweep = _overrides(), _sweep()
    flags = _flags()
    quiet, as_json = "quiet" in flags, "json" in flags
    asked = answer = None
    if sweep is None:
        with suppress(Exception):  # the pipeline runs, and says it
            asked = _asked(config, overrides)
            answer = find(asked) if asked is not None else None
    if answer is not None:
        say_again(answer, Console(width=None if sys.stdout.isatty() else 100), quiet=quiet, as_json=as_json)
        return answer.objective
    with Console(quiet=bool(flags)).status("importing PyTorch and Lightning"):
        kd_lightning.load()
        from kd_lightning.command import run

    return run(config, _base(), overrides, sweep, asked=asked, quiet=quiet, as_json=as_json)


def _asked(config: DictConfig, overrides: list[str]) -> "Question | None":
    """Return what the command asks; None where it has to run to be known."""
    from kd_lightning.answers import question

    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    sources = HydraConfig.get().runtime.config_sources
    folders = [source.path for source in sources if source.schema == "file" and source.path]
    return question({str(key): value for key, value in resolved.items()}, overrides, folders, _BEGUN)


def _arguments() -> list[str]:
    return list(json.loads(os.environ.get(_ARGUMENTS, "[]")))


def _flags() -> set[str]:
    return {_OWN_FLAGS[word] for word in _arguments() if word in _OWN_FLAGS}


def _overrides() -> list[str]:
    overrides = HydraConfig.get().overrides
    return [*(o for o in overrides.hydra if o.startswith("hydra.searchpath")), *overrides.task]


def _sweep() -> tuple[Path, list[str]] | None:
    """Return the folder of a sweep, and those of this job's overrides that are not written so on the command line."""
    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN:
        return None
    given = {_bare(word) for word in _arguments()}
    return Path(settings.sweep.dir), [word for word in settings.overrides.task if _bare(word) not in given]


def _bare(word: str) -> str:
    """Return an override without what Hydra adds or leaves out when it writes it anew."""
    return re.sub(r"[\\'\" ]", "", word)


def _base() -> str | None:
    """Return what a pipeline is of: its experiment, or else its data."""
    choices = HydraConfig.get().runtime.choices
    choice = choices.get("experiment") or choices.get("data")
    return str(choice) if choice else None


def _quiet() -> None:
    """Leave the terminal to the progress display and the comparison."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("onnx_ir", "onnxruntime", "onnxscript"):  # onnxruntime.quantization makes the root logger print INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)  # "experiment not found: creating it"
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # read when mlflow is imported, which is later
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
