"""What the README says, done."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import hydra
import pytest

from kd_lightning.cli import conf_dir
from tests.command import environment

ONE_PROGRAM = "From zero to distilled"  # in several pieces
README = (Path(__file__).parents[2] / "README.md").read_text()
PYTHON = {  # by section, where one may read what another wrote
    section.partition("\n")[0]: ["\n".join(blocks)] if section.startswith(ONE_PROGRAM) else blocks
    for section in re.split(r"^##+ ", README, flags=re.MULTILINE)
    if (blocks := re.findall(r"```python\n(.*?)```", section, re.DOTALL)) and "# my_losses.py" not in section
}
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("kd-lightning ") and "--" not in line
]


@pytest.mark.integration
@pytest.mark.parametrize("section", PYTHON)
def test_python_runs_as_written(section: str, tmp_path: Path) -> None:
    for block in PYTHON[section]:
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command: str) -> None:
    overrides = [word for word in shlex.split(command)[1:] if word not in ("-m", "-q")]
    overrides = [re.sub(r"=([\d.]+),[\d.,]+$", r"=\1", word) for word in overrides]  # one value of a sweep
    overrides = [word for word in overrides if not word.startswith("hydra.searchpath")]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        assert hydra.compose("config", overrides=overrides).losses


def test_the_method_tables_name_every_loss_there_is() -> None:
    tables = README.partition("## Losses")[2].partition("### Weights")[0]
    named = {word for row in re.findall(r"^\| (`.*?) \|", tables, re.MULTILINE) for word in re.findall(r"`(\w+)`", row)}
    assert named == {file.stem for file in (conf_dir() / "losses").glob("*.yaml")}
