"""The report's section on what fewer bits cost and bring."""

from collections.abc import Mapping, Sequence
from typing import Any

from kd_lightning.report import svg
from kd_lightning.report.facts import Facts
from kd_lightning.report.figures import Drawing, legend


def quantization(facts: Facts) -> dict[str, Any] | None:
    """What fewer bits cost and bring."""
    keys = [key for key, model in facts.models.items() if model["role"] == "quantized"]
    if not keys:
        return None
    rows = []
    for key in keys:
        how = facts.models[key]["quantized"]
        source = how["source"]
        lost = ""
        if source in facts.models:
            change = facts.value(key) - facts.value(source)
            lost = facts.headline.write_difference(change if facts.headline.higher_is_better else -change)
        layers, integers = facts.figure(key, "quantized_layers"), facts.figure(key, "integer_operators")
        weights, activations = how["weight_bits"], how["activation_bits"]
        rows.append(
            {
                "title": key,
                "source": facts.title(source) if source in facts.models else source,
                "how": "QAT: trained for it" if how["training"] else "PTQ: after training",
                "bits": f"{weights} / {activations or 32}",
                "file": facts.written(key, "file_mb"),
                "quality": facts.headline.number(facts.value(key)),
                "lost": lost,
                "fp32": facts.written(key, "agreement_fp32"),
                "network": facts.written(key, "agreement_file"),
                "layers": "–" if layers is None else f"{layers:.0f}",
                "integers": "–" if integers is None or activations is None else f"{integers:.0f}",
                "mismatch": how["mismatch"],
            }
        )
    return {"rows": rows, "drawings": _bits(facts, keys), "notes": _notes(facts, rows)}


def _notes(facts: Facts, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which layers stay in float, or something of them, and why."""
    notes = []
    for row in rows:
        layers = facts.record.get("layers", {}).get(row["title"], [])
        for note in dict.fromkeys(layer["note"] for layer in layers if layer["note"]):
            those = [layer["name"] for layer in layers if layer["note"] == note]
            named = "all layers" if len(those) == len(layers) else ", ".join(those)
            notes.append(f"{row['title']}: {named}: {note}.")
        if row["integers"] not in ("–", row["layers"]):
            notes.append(f"{row['title']}: of {row['layers']} quantised layers {row['integers']} run on integers.")
        if row["mismatch"]:
            notes.append(f"{row['title']}: {row['mismatch']}.")
    return notes


def _bits(facts: Facts, keys: Sequence[str]) -> list[Drawing]:
    sources = dict.fromkeys(facts.models[key]["quantized"]["source"] for key in keys)
    every = [key for key in (*sources, *keys) if key in facts.models and facts.figure(key, "file_mb")]
    if not every:
        return []

    def point(key: str, x: float) -> svg.Point:
        sd = facts.sd(key)
        y = facts.shown(facts.value(key))
        return svg.Point(facts.title(key), facts.role(key), x, y, None if sd is None else facts.shown(sd))

    def bits(key: str) -> float:
        how = facts.models[key].get("quantized")
        return float(how["weight_bits"]) if how else 32.0

    drawings = []
    for title, xs, axis in (
        (
            "Quality against bits",
            [bits(key) for key in every],
            svg.Axis("bits of a weight (logarithmic)", log=True, ticks=(4, 8, 16, 32)),
        ),
        (
            "Quality against bytes",
            [facts.figure(key, "file_mb") or 0 for key in every],
            svg.Axis("file, MB (logarithmic)", log=True),
        ),
    ):
        points = [point(key, x) for key, x in zip(every, xs, strict=True)]
        alt = f"{title}: " + ", ".join(f"{p.label} {p.y:.3g} at {p.x:.3g}" for p in points)
        named = legend([(p.label, p.role) for p in points], numbered=True)
        drawings.append(Drawing(title, svg.scatter(points, axis, svg.Axis(facts.axis), alt), named))
    return drawings
