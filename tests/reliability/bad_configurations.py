"""Run many bad configurations and count how they are answered.

    python tests/reliability/bad_configurations.py [--count 400] [--seed 0] [--valid]

Each differs from a valid one in a single place, where it is bad for a stated reason: a wrong type, a number out of
range, a name that is not there, a group's unknown option, or two parts that contradict each other. It has to be
answered before the first stage begins, in one line that names the path, with exit code 1 or 2. ``--valid`` runs the
configurations that these differ from, which have to begin.
"""

import argparse
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import Queue
from typing import NamedTuple

import hydra
import yaml
from omegaconf import OmegaConf

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kd_lightning.cli import conf_dir
from tests.reliability.preloaded import Preloaded

FOLDER = Path(__file__).parent
AS_WANTED = "one line that names the path"
BEGAN = "training began"


class Bad(NamedTuple):
    """A command line with one mistake.

    Attributes:
        arguments: Of the command line.
        paths: One of these has to be in the answer.
        why: It is bad.
    """

    arguments: tuple[str, ...]
    paths: tuple[str, ...]
    why: str


class Answer(NamedTuple):
    """What came of a command line."""

    outcome: str
    code: int | None
    seconds: float
    printed: str


HINT = ("losses.hint.student_layer=block3", "losses.hint.teacher_layer=block4")
AT = ("losses.at.student_layers=[block1,block2]", "losses.at.teacher_layers=[block3,block4]")
ON_LOGITS = (
    "abkd", "ctkd", "deit_hard", "deit_soft", "dist", "dkd", "forward_kl", "jensen_shannon", "logits_mse", "mlkd",
    "nkd", "reverse_kl", "rld", "skewed_forward_kl", "skewed_reverse_kl", "symmetric_kl", "top_k_kl",
    "total_variation", "ttm", "uld", "wttm",
)  # fmt: skip
REGRESSION = (
    "task=regression", "data=diabetes", "models@teacher.network=tabular64", "models@student.network=tabular4",
    "losses@teacher.losses=[label_regression]", "losses@student.losses=[label_regression]",
    "losses=[label_regression,teacher_regression]", "stages=[teacher,student,distilled,quantized,verdict]",
)  # fmt: skip
ON_VECTORS = ("cc", "crd", "pkt", "rkd", "sp")


def valid() -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield valid command lines, and below which path each differs from the default; that is the first."""
    yield (), ""
    for loss in ON_LOGITS:
        yield (f"losses=[hard_label,{loss}]",), f"losses.{loss}"
    for loss in ON_VECTORS:
        layers = f"losses.{loss}.student_layer=flatten", f"losses.{loss}.teacher_layer=hidden"
        yield (f"losses=[hard_label,{loss}]", *layers), f"losses.{loss}"
    yield ("losses=[hard_label,hint]", *HINT), "losses.hint"
    yield ("losses=[hard_label,at]", *AT), "losses.at"
    for name in ("temperature_schedule", "hyperparameter_schedule", "quantization_aware_training"):
        yield (f"callbacks=[{name}]",), f"callbacks.{name}"
    yield ("losses=[hard_label,ctkd]", "callbacks=[curriculum_temperature]"), "callbacks.curriculum_temperature"
    for name in ("ensemble", "momentum", "peers", "runtime"):
        yield (f"teachers={name}",), "teachers"
    yield ("teachers=stored",), "stored_outputs"
    for name in ("sgd", "adamw"):
        yield (f"optimizer={name}",), "optimizer"
    yield ("scheduler=cosine",), "scheduler"
    yield ("scheduler=multi_step", "scheduler.milestones=[100]"), "scheduler"
    yield ("models@student.network=mlp32",), "student.network"
    yield ("optimizer@teacher.optimizer=sgd", "teacher.optimizer.lr=0.05"), "teacher.optimizer"
    yield ("scheduler@teacher.scheduler=cosine",), "teacher.scheduler"
    yield ("experiment=fashion_mnist/embedding",), "task"
    yield ("experiment=shakespeare/punctuation",), "task"
    yield REGRESSION, "task"


OUT_OF_RANGE: dict[str, dict[str, str]] = yaml.safe_load((FOLDER / "out_of_range.yaml").read_text())


def _leaves(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def _wrong_types(value: object) -> dict[str, str]:
    if isinstance(value, bool):
        return {"perhaps": "no truth value", "[1,2]": "a list"}
    if isinstance(value, int):
        return {"ten": "no number", "1.5": "no whole number", "[[1]]": "a list of lists", "true": "a truth value"}
    if isinstance(value, float):
        return {
            "many": "no number",
            "[[1]]": "a list of lists",
            "nan": "not finite",
            "inf": "not finite",
            "{a:1}": "a mapping",
        }
    if isinstance(value, list):
        return {"7": "no list", "{a:1}": "a mapping"}
    if isinstance(value, str):
        return {"[1,2]": "a list", "{a:1}": "a mapping", "7": "a number"}
    return {}


def _of_leaf(valid: tuple[str, ...], path: str, value: object) -> Iterator[Bad]:
    parent, _, key = path.rpartition(".")
    if key == "_target_":
        yield Bad((*valid, f"{path}=kd_lightning.Nothing"), (path,), "no such class")
        yield Bad((*valid, f"{path}=builtins.dict"), (parent,), "another kind of object")
        return
    if key == "_partial_":
        return
    for wrong, why in _wrong_types(value).items():
        yield Bad((*valid, f"{path}={wrong}"), (path,), why)
    for number, why in OUT_OF_RANGE.get(key, {}).items():
        yield Bad((*valid, f"{path}={number}"), (path,), why)
    misspelt = f"{parent}.{key[:-1] if len(key) > 3 else key + 'x'}".lstrip(".")
    shown = "null" if value is None else str(value).replace(" ", "").replace("'", "").lower()
    if not isinstance(value, dict):
        yield Bad((*valid, f"{misspelt}={shown}"), (misspelt,), "no such name")
    if parent:
        yield Bad((*valid, f"+{misspelt}={shown}"), (misspelt,), "a name that nothing reads")


def _of_groups() -> Iterator[Bad]:
    for group, wrong in {
        "losses": "[hard_label,kdd]", "losses@teacher.losses": "[hardlabel]", "losses@student.losses": "[label]",
        "losses@control.losses": "[deit]", "models@teacher.network": "cnn65", "models@student.network": "cnn9",
        "task": "clasification",
        "optimizer": "adem", "optimizer@teacher.optimizer": "lion", "scheduler": "onecycle", "data": "mnist",
        "scheduler@teacher.scheduler": "cosin", "trainer": "fast", "teachers": "alive", "callbacks": "[temperature]",
        "quantization@quantized.spec": "int9", "quantization@quantized.weights_only": "weights_3bit",
        "tracking@logger": "wandb", "experiment": "fashion_mnist/temprature",
    }.items():  # fmt: skip
        yield Bad((f"{group}={wrong}",), (group.partition("@")[0],), "no such option")
        yield Bad((f"{group[:-1]}={wrong}",), (group[:-1].partition("@")[0],), "no such group")
    for group in ("optimizer", "losses", "data", "task", "trainer", "teachers"):
        yield Bad((f"{group}=null",), (group,), "nothing")
        yield Bad((f"~{group}",), (group,), "taken out")
    yield Bad(("losses=[]",), ("losses",), "none")


def _of_grammar() -> Iterator[Bad]:
    for word in (
        "work_dir=größe",
        "seeds=[0",
        "variants={a:{",
        "name='open",
        "name=a,b(",
        "data.folder=a=b c",
        "work_dir",
        "=3",
    ):
        yield Bad((word,), (word.partition("=")[0] or word,), "not in the grammar")


def _contradictions() -> Iterator[Bad]:
    for case in yaml.safe_load((FOLDER / "contradictions.yaml").read_text()):
        yield Bad(tuple(case["arguments"]), tuple(case["paths"]), case["why"])


def bad_configurations() -> list[Bad]:
    """Return all that follow from the configuration, each once, in a fixed order."""
    found: dict[tuple[str, ...], Bad] = {}
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        for base, below in valid():
            config = OmegaConf.to_container(hydra.compose("config", list(base)), resolve=True)
            for path, value in _leaves(config):
                if path.startswith(below):
                    for bad in _of_leaf(base, path, value):
                        found.setdefault(bad.arguments, bad)
    for bad in (*_of_groups(), *_of_grammar(), *_contradictions()):
        found.setdefault(bad.arguments, bad)
    return list(found.values())


def sample(count: int, seed: int) -> list[Bad]:
    """Draw configurations: all of groups, grammar and contradictions, then some of the rest."""
    every = bad_configurations()
    chosen = {bad.arguments for bad in (*_of_groups(), *_of_grammar(), *_contradictions())}
    rest = [bad for bad in every if bad.arguments not in chosen]
    first = [bad for bad in every if bad.arguments in chosen]
    draw = random.Random(seed)
    draw.shuffle(rest)
    return ([*first, *rest] if count >= len(first) else draw.sample(every, count))[:count]


def answers(cases: Sequence[tuple[str, ...]], folder: Path, jobs: int = 1) -> Iterator[Answer]:
    """Run command lines, each in an empty folder; one whose first stage begins is ended."""
    with ExitStack() as stack, ThreadPoolExecutor(jobs) as pool:
        free: Queue[Preloaded] = Queue()
        for _ in range(jobs):
            free.put(stack.enter_context(Preloaded()))

        def answer(numbered: tuple[int, tuple[str, ...]]) -> Answer:
            preloaded = free.get()
            try:
                return _answer(preloaded, numbered[1], folder / f"{numbered[0]}")
            finally:
                free.put(preloaded)

        yield from pool.map(answer, enumerate(cases))


def _answer(preloaded: Preloaded, arguments: tuple[str, ...], folder: Path, seconds: float = 120) -> Answer:
    folder.mkdir()
    logged = any(argument.lstrip("+~").startswith(("logger", "tracking")) for argument in arguments)
    start = time.monotonic()
    every = [*arguments, *([] if logged else ["logger=null"])]
    command = preloaded.start(*every, cwd=folder, output=folder.with_suffix(".txt"))
    while command.poll() is None and not _began(folder) and time.monotonic() - start < seconds:
        time.sleep(0.02)
    taken, ended = time.monotonic() - start, command.code is not None
    if not ended:
        command.kill()
        while command.poll() is None:
            time.sleep(0.02)
    printed = command.printed()
    if _began(folder):
        return Answer(BEGAN, None, taken, printed)
    return Answer(_outcome(command.code, printed) if ended else "no end", command.code, taken, printed)


def _began(folder: Path) -> bool:
    """Tell whether the folder of a stage is there; a stage makes it before it does anything else."""
    return any(path.is_dir() for path in folder.glob("**/*-s[0-9]*-????????????"))


def _outcome(code: int | None, printed: str) -> str:
    if "Traceback (most recent call last)" in printed:
        return "traceback"
    if code == 0:
        return "accepted"
    lines = printed.strip().splitlines()
    return (
        "one line" if len(lines) == 1 and lines[0].startswith("kd-lightning: ") and code in (1, 2) else "several lines"
    )


def judged(bad: Bad, answer: Answer) -> str:
    """Return the outcome of a bad configuration: whether its one line names the path is known here."""
    if answer.outcome != "one line":
        return answer.outcome
    named = any(_says(answer.printed, path) or _says_apart(answer.printed, path) for path in bad.paths)
    return AS_WANTED if named else "one line that does not name the path"


def _says(line: str, path: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(path)}(?!\w)", line) is not None


def _says_apart(line: str, path: str) -> bool:
    """Tell whether the line names the part, and somewhere in it the argument: of two that do not fit, say."""
    part, _, name = path.rpartition(".")
    word = re.escape(name).replace("_", "[_ ]")
    return bool(part) and _says(line, part) and re.search(rf"\b{word}\b", line) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--valid", action="store_true", help="run the valid configurations instead")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="at the same time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.valid:
            cases = [arguments for arguments, _ in valid()]
            for arguments, answer in zip(cases, answers(cases, Path(folder), options.jobs), strict=True):
                print(f"{answer.outcome:16} {answer.seconds:4.1f} s  {' '.join(arguments)}", flush=True)
                if answer.outcome != BEGAN:
                    print(f"    {answer.printed}", flush=True)
            return
        cases = sample(options.count, options.seed)
        counts, times = Counter[str](), []
        found = answers([bad.arguments for bad in cases], Path(folder), options.jobs)
        for bad, answer in zip(cases, found, strict=True):
            outcome = judged(bad, answer)
            counts[outcome] += 1
            times.append(answer.seconds)
            if outcome != AS_WANTED:
                print(f"{outcome}: {' '.join(bad.arguments)} ({bad.why}), in {answer.seconds:.1f} s", flush=True)
                print("    " + "\n    ".join(answer.printed.strip().splitlines()[-3:]), flush=True)
    print(f"\n{len(cases)} of {len(bad_configurations())} bad configurations, seed {options.seed}")
    for outcome, count in counts.most_common():
        print(f"{count:5}  {100 * count / len(cases):5.1f} %  {outcome}")
    times.sort()
    print(f"answered within {times[len(times) // 2]:.1f} s (median), {times[-1]:.1f} s (longest)")


if __name__ == "__main__":
    main()
