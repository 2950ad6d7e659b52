"""A pipeline's ``report.json`` as the report reads it: models by their names, figures with their units."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_lightning.headline import Headline
from kd_lightning.records import FIGURES, TITLES
from kd_lightning.report.words import percent

VERSION = 1
RECORD, PAGE = "report.json", "report.html"
SHOWN_SECONDS = 0.1
"""What took less is no item of a price."""
_NO_SLOWER = 1.05  # latencies differ by as much from one measurement to the next
_FORMS = {figure.key: figure for figure in FIGURES}


class Facts:
    """What was recorded of one pipeline.

    Args:
        record: As :mod:`kd_lightning.pipeline.report_record` wrote it.
        folder: Where it was found; empty for nowhere.

    Raises:
        ValueError: For a record of another version.
    """

    def __init__(self, record: Mapping[str, Any], folder: str = "") -> None:
        if record.get("version") != VERSION:
            raise ValueError(
                f"the record in {folder or RECORD} has version {record.get('version')}, expected {VERSION}: run the "
                "pipeline again, which uses its finished stages"
            )
        self.record, self.folder = record, folder
        self.verdict: Mapping[str, Any] = record["verdict"]
        self.details: Mapping[str, Any] = record["details"]
        self.models: Mapping[str, Mapping[str, Any]] = self.verdict["models"]
        said = self.verdict["headline"]
        self.headline = Headline(**said, digits=record["task"]["digits"])
        self._name = said["name"].replace(" ", "_")

    @property
    def distilled(self) -> str | None:
        """Key of the model that the decision is about."""
        found: str | None = self.verdict["distilled"]
        return found

    @property
    def served(self) -> str | None:
        """Key of what would be served: the better quantised student, or the distilled one where that is faster."""
        quantized: str | None = self.details["served"]
        if quantized is None or self.distilled is None:
            return quantized or self.distilled
        own, after = (self.figure(key, "latency_ms_p50") for key in (self.distilled, quantized))
        return self.distilled if own and after and after > _NO_SLOWER * own else quantized

    def quantized_from(self, source: str) -> list[str]:
        """Return the keys of what was quantised from a model."""
        return [key for key, model in self.models.items() if (model.get("quantized") or {}).get("source") == source]

    def title(self, key: str) -> str:
        role = self.role(key)
        if role == "quantized":
            return key
        return TITLES[role] if key == role else f"{TITLES[role]} {key}"

    def role(self, key: str) -> Any:
        return self.models[key]["role"] if key in self.models else key

    def value(self, key: str) -> float:
        return float(self.models[key][self._name]["mean"])

    def sd(self, key: str) -> float | None:
        found: float | None = self.models[key][self._name]["sd"]
        return found

    def seeds(self, key: str) -> int:
        return len(self.models[key][self._name]["seeds"])

    def figure(self, key: str, name: str) -> float | None:
        """Return a figure of a model; None where it was not measured."""
        found = self.models[key].get(f"{name}_{self._name}" if name == "val" else name)
        return None if found is None else float(found)

    def written(self, key: str, name: str) -> str:
        """Write a figure of a model as it is declared."""
        value = self.figure(key, name)
        if value is None:
            return "–"
        form = _FORMS[name].form
        if form == "headline":
            return self.headline.number(value)
        return percent(value) if form == "percent" else format(value, ",.0f" if form == "count" else form)

    def seconds(self, key: str) -> float:
        """Return how long a model was trained, a mean over seeds."""
        found = self.record["seconds"].get(key) or [0.0]
        return float(sum(found) / len(found))

    def further(self, key: str) -> float:
        """Return how many seconds it took to make of a model what would be served; 0 where that is the model."""
        return self.seconds(self.served) if self.served is not None and self.served != key else 0.0

    def storing(self, key: str) -> float:
        """Return how many seconds storing the outputs took that a model was trained on; 0 for a live teacher's."""
        return self.figure(key, "store_seconds") or 0.0

    def shown(self, number: float) -> float:
        """Return a value of the headline as axes have it: a share in percent."""
        return 100 * number if self.headline.percent else number

    @property
    def axis(self) -> str:
        """The headline's name with its unit, as axes have it."""
        unit = "%" if self.headline.percent else self.headline.symbol
        return f"{self.headline.name}, {unit}" if unit else self.headline.name

    @property
    def others(self) -> str:
        """What a teacher's probability goes to that its answer does not get."""
        labels = self.record["task"]["kind"] == "MultiLabel"
        return "the contrary of its answer" if labels else f"other {self.things} than its answer"

    @property
    def things(self) -> str:
        """What a model tells apart."""
        return "tokens" if self.record["task"]["kind"] == "LanguageModelling" else "classes"

    @property
    def short(self) -> str:
        """The headline as narrow columns have it."""
        name, key = self.headline.name, self.headline.key
        found = name[-len(key) :] if name.lower().endswith(key) else key  # mIoU; F1 of macro-F1; but acc
        return found.replace("_", " ")

    def temperature(self, key: str) -> float | tuple[float, float] | None:
        found = self.models[key].get("temperature")
        return (found[0], found[1]) if isinstance(found, list) else found

    def names(self, classes: Sequence[int]) -> list[str]:
        """Name classes."""
        found = self.record.get("classes", {})
        if isinstance(found, list):
            return [found[i] for i in classes]
        return [found.get(str(i), str(i)) for i in classes]


def read_facts(folder: Path) -> Facts:
    """Read the record in a pipeline's folder.

    Raises:
        ValueError: For a folder without, and for one that is torn or of another version.
    """
    file = folder / RECORD
    if not file.is_file():
        raise ValueError(
            f"there is no {RECORD} in {folder}, expected the folder of a pipeline, such as "
            "mlruns/stages/pipeline-0123456789ab: run kd-lightning, which ends by writing it"
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is torn ({error}): run the pipeline again, which uses its finished stages") from error
    return Facts(record, str(folder))


def duration(seconds: float) -> str:
    """Write a time as people do.

    >>> duration(0.4), duration(31), duration(400), duration(9000)
    ('0.4 s', '31 s', '6.7 min', '2.5 h')
    """
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def capital(text: str) -> str:
    """Begin a text with a capital, unless its second letter is one.

    >>> capital("accuracy, %"), capital("mIoU, %")
    ('Accuracy, %', 'mIoU, %')
    """
    return text if text[1:2].isupper() else text[:1].upper() + text[1:]


def times(ratio: float) -> str:
    """Write a ratio: ``4.7 times``, ``35 times``."""
    return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:.0f} times"
