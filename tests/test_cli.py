"""What the command line answers."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kd_lightning.cli import conf_dir
from tests.command import TINY, copied, kd_lightning, kd_lightning_anew
from tests.pipeline.test_pipeline import runs

pytestmark = pytest.mark.integration

LOSSES = ", ".join(sorted(file.stem for file in (conf_dir() / "losses").glob("*.yaml")))
README = (Path(__file__).parents[1] / "README.md").read_text()


def test_help_names_the_groups_and_writes_nothing(tmp_path: Path) -> None:
    printed = kd_lightning("--help", cwd=tmp_path)
    for word in ("kd-lightning losses.kd.temperature=2", f"losses: {LOSSES}", "seeds:"):
        assert word in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("losses.kd.temprature=3", "the nearest names are losses.kd.temperature"),
        ("losses=[hard_label,kdd]", f"losses: the options here are {LOSSES}"),
        ("modles@student.network=cnn8", "models"),
        ("models@student.network=cnn9", "models: the options here are cnn64, cnn8, gpt128"),
        ("task=clasification", "task: the options here are classification"),
        ("experiment=fashion_mnist/foo", "fashion_mnist/temperature"),
    ],
)
def test_a_typo_is_answered_with_what_is_there(tmp_path: Path, argument: str, answer: str) -> None:
    assert answer in kd_lightning(argument, cwd=tmp_path, code=1)
    assert not list(tmp_path.iterdir())


def test_a_torchvision_that_does_not_import_is_named(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    printed = kd_lightning_anew("seeds=[0]", cwd=tmp_path, code=1, PYTHONPATH=path)
    assert printed.startswith(
        "kd-lightning: Lightning cannot be imported, as the installed torchvision cannot (operator"
    )
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (
            "work_dir=/data/größe",
            """work_dir=/data/größe: expected path=value in Hydra's grammar: quote a value with""",
        ),
        ("optimizer=null", "optimizer=null: expected an option of optimizer: the options here are adam, adamw, sgd"),
        ("=3", "=3: expected path=value, got no path"),
        ("logger.experiment_name=", "logger.experiment_name=: expected experiment_name to be a name, got ''"),
    ],
)
def test_what_hydra_or_mlflow_refuses_is_one_line(tmp_path: Path, argument: str, said: str) -> None:
    printed = kd_lightning(argument, cwd=tmp_path, code=1)
    assert printed.startswith(f"kd-lightning: {said}")
    assert printed.count("\n") == 1


def test_a_loss_of_ones_own_is_the_readmes_file_yaml_and_command(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    section = README.partition("### Your own loss")[2].partition("\n## ")[0]
    loss, yaml, command = re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)
    for content in (loss, yaml):
        file = folder / content.splitlines()[0].removeprefix("# ")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    python_path, program, *arguments = shlex.split(command)
    assert (python_path, program) == ("PYTHONPATH=.", "kd-lightning")
    # Beside what the tests themselves run with.
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    printed = kd_lightning_anew(*arguments, *TINY, "stages=[teacher,distilled]", cwd=folder, PYTHONPATH=path)
    assert "distilled-logits_l1-s0" in printed
    _, _, children = runs(folder)
    values = children[-1].data.metrics
    assert values["train/loss_weighted/logits_l1"] == pytest.approx(0.5 * values["train/loss/logits_l1"])


def test_help_and_typos_import_nothing_that_takes_seconds(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['kd-lightning', *sys.argv[1:]]\n"
        "from kd_lightning.cli import main\n"
        "try: main()\n"
        "finally: print('imported', sorted({'torch', 'lightning', 'mlflow', 'onnx'} & set(sys.modules)))"
    )
    for arguments in (["--help"], ["--cfg", "job"], ["losses.kd.temprature=3"]):
        ran = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert "imported []" in ran.stdout
        assert ran.returncode == (arguments == ["losses.kd.temprature=3"])


def test_a_process_that_a_launcher_starts_has_the_flags_and_the_overrides_of_the_command(tmp_path: Path) -> None:
    in_another_process = "from kd_lightning import cli; print(sorted(cli._flags()), cli._arguments())"
    code = (
        "import subprocess, sys; from kd_lightning.cli import main\n"
        "main()\n"
        f"subprocess.run([sys.executable, '-c', {in_another_process!r}])"
    )
    arguments = ["-q", "--cfg", "job", "--json", "losses.kd.temperature=2"]
    ran = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout.endswith(f"['json', 'quiet'] {arguments}\n"), ran.stderr


def test_a_sigterm_that_comes_in_the_callback_of_a_weak_reference_ends_the_command(tmp_path: Path) -> None:
    code = (
        "import signal, time, weakref; from kd_lightning import cli\n"
        "def work():\n"
        "    class Something: pass\n"
        "    something = Something()\n"
        "    callback = weakref.ref(something, lambda _: signal.raise_signal(signal.SIGTERM))\n"
        "    del something\n"
        "    time.sleep(60)\n"
        "cli._hydra_main = work\n"
        "cli.main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 143
    assert ran.stderr == "\nInterrupted. The same command goes on from the last checkpoint.\n"


def test_quiet_prints_the_sentence_and_json_the_verdict_alone(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    sentence = kd_lightning(*TINY, "-q", cwd=tmp_path)
    printed = kd_lightning("--json", *TINY, cwd=tmp_path)
    verdict = json.loads(printed)
    assert sentence == f"{verdict['sentence']}\n"
    (file,) = folder.glob("mlruns/stages/*/verdict.json")
    assert json.loads(file.read_text()) == verdict
