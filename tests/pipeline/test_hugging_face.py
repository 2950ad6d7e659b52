"""A published model as the teacher of a pipeline: as it is, and as often as its folder changes."""

from pathlib import Path

import pytest
import torch

from tests import hugging_face
from tests.command import kd_lightning

pytest.importorskip("transformers", exc_type=ImportError)

ARGUMENTS = [
    "data=text_files",
    "data.files=[a.txt]",
    "data.context=16",
    "task=language_modelling",
    "models@teacher.network=hugging_face",
    "teacher.network.name=teacher",
    "teacher.checkpoint=pretrained",
    "teacher.check=false",
    "stages=[teacher]",
    "logger=null",
]


@pytest.mark.integration
def test_a_finished_teacher_is_not_trained_and_is_tested_anew_where_its_files_change(tmp_path: Path) -> None:
    saved = hugging_face.network(vocab_size=256)
    saved.save_pretrained(tmp_path / "teacher")
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    printed = kd_lightning(*ARGUMENTS, cwd=tmp_path)
    assert "teacher-pretrained-s0" in printed
    [kept] = tmp_path.rglob("teacher-*/final.ckpt")
    state = torch.load(kept, weights_only=True)["state_dict"]
    assert all(torch.equal(state[name], value) for name, value in saved.state_dict().items())
    assert "(reused" in kd_lightning(*ARGUMENTS, cwd=tmp_path)
    hugging_face.network(vocab_size=256, seed=1).save_pretrained(tmp_path / "teacher")
    assert "(reused" not in kd_lightning(*ARGUMENTS, cwd=tmp_path)
