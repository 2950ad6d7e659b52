"""Completions and texts of one's own, by a command."""

import json
import math
from pathlib import Path

import pytest

from tests.command import kd_lightning

pytestmark = pytest.mark.integration

WORDS = "to be or not to be that is the question whether tis nobler in the mind to suffer "


def test_own_completions_and_texts_teach_a_student(tmp_path: Path) -> None:
    files = {}
    for i, role in enumerate(("student", "validation", "test")):
        (tmp_path / f"{role}.txt").write_text((WORDS[i:] + WORDS[:i]) * 60)
        files[role] = [f"{role}.txt"]
    lines = []
    for start in range(40):
        text = (WORDS * 2)[start : start + 30]
        entries = [
            {"token": letter, "logprob": math.log(0.9), "top_logprobs": [{"token": " ", "logprob": math.log(0.05)}]}
            for letter in text[10:]
            if letter != " "
        ]
        response = {"choices": [{"logprobs": {"content": entries}}]}
        lines.append({"body": {"messages": [{"role": "user", "content": text[:10]}]}, "response": {"body": response}})
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    by_role = ",".join(f"{role}:[{some[0]}]" for role, some in files.items())
    printed = kd_lightning(
        "experiment=shakespeare/api_logs",
        "data.files=[log.jsonl]",
        "data.texts._target_=kd_lightning.data.TextFiles",
        f"+data.texts.files={{{by_role}}}",
        "data.texts.context=16",
        "student.network.vocabulary=18",
        "student.network.context=16",
        "student.network.width=16",
        "trainer.max_steps=60",
        "seeds=[0]",
        "logger=null",
        "stages=[student,control,distilled,verdict]",
        cwd=tmp_path,
    )
    assert "[3/3] distilled-top_k_kl-T1-FromBatch-s0" in printed
    (verdict,) = tmp_path.glob("mlruns/stages/pipeline-*/verdict.json")
    models = json.loads(verdict.read_text())["models"]
    bits = {label: model["cross-entropy"]["mean"] for label, model in models.items()}
    assert max(bits.values()) < math.log2(18) - 0.5  # all have learnt
    assert len(set(bits.values())) == 3
