"""The verdict as ``verdict.json``: the figures, the decision, and what is said of it."""

import json
import os
from pathlib import Path
from typing import Any

from kd_lightning.durable_files import write_atomically
from kd_lightning.records import Verdict
from kd_lightning.report.words import say

VERDICT = "verdict.json"


def as_dict(verdict: Verdict) -> dict[str, Any]:
    """Return everything for strict JSON: what is not a number is None."""
    words, figures = say(verdict), verdict.to_dict()
    said = {"sentence": words.sentence, "findings": list(words.findings), "warnings": list(words.warnings)}
    first = {key: figures.pop(key) for key in ("worth_it", "decided", "reason")}
    return first | said | figures


def text_of(verdict: Verdict) -> str:
    """Return the text of ``verdict.json``."""
    return json.dumps(as_dict(verdict), indent=2, ensure_ascii=False, allow_nan=False)


def write_verdict(verdict: Verdict, path: str | os.PathLike[str]) -> None:
    """Write ``verdict.json`` under a temporary name and rename it: a reader never sees half a file."""
    write_atomically(Path(path), f"{text_of(verdict)}\n".encode())
