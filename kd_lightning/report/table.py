"""What the tables of a verdict show, as plain text: the columns that decide. All figures are in ``verdict.json``."""

from typing import NamedTuple

from kd_lightning.headline import Headline
from kd_lightning.records import FIGURES, Figure, Verdict
from kd_lightning.report.words import change, percent, title

_BY_KEY = {figure.key: figure for figure in FIGURES}


class Table(NamedTuple):
    """Rows of cells under columns; the first column names the model, and has no title."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def overview(verdict: Verdict) -> Table:
    """Return the headline with its spread over seeds, what was closed of the gap, and what each model costs."""
    models, headline = verdict.models, verdict.headline
    unit = "%" if headline.percent else headline.symbol
    columns = ["", f"{headline.name} {unit}".rstrip(), "agreement %", "gap closed %"]
    with_temperature = any(model.temperature is not None for model in models.values())
    columns += ["T"] * with_temperature
    measured = {key for model in models.values() for key in model.figures}
    size = "file_mb" if "file_mb" in measured else "size_mb"
    deciding = (size, "latency_ms_p50", "acceptance", "tokens_per_s")
    figures = [_BY_KEY[key] for key in deciding if key in measured]
    rows = []
    for key, model in models.items():
        share = model.gap_closed
        known = share is not None and share.low is not None  # else any share could be true
        cells = [
            title(key, model),
            f"{headline.number(model.value)} ± {headline.number(model.sd)}",
            percent(model.agreement),
            percent(share.mean if share is not None and known else None),
        ]
        cells += [temperature(model.temperature)] * with_temperature
        rows.append((*cells, *(write(figure, model.figures.get(figure.key), headline) for figure in figures)))
    return Table((*columns, *(figure.title for figure in figures)), tuple(rows), _note(verdict))


def comparison(verdict: Verdict) -> Table | None:
    """Return several distilled models against one of them, where that was asked for."""
    distilled = {key: model for key, model in verdict.models.items() if model.role == "distilled"}
    reference = [key for key, model in distilled.items() if model.against_reference is None]
    if len(reference) != 1 or len(distilled) == 1:
        return None
    several = all(len(model.seeds) > 1 for model in distilled.values())
    interval = "95 % interval" if several else f"one seed: 95 % interval of the test {verdict.headline.units} alone"
    columns = ["", f"improvement on {reference[0]} ({interval})"]
    columns += [f"p (Holm, {len(distilled) - 1} comparisons)"] * several
    rows = []
    for key, model in distilled.items():
        if model.against_reference is not None:
            p = model.against_reference_p
            written = ["–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"] * several
            rows.append((title(key, model), change(verdict.headline, model.against_reference), *written))
    return Table(tuple(columns), tuple(rows))


def write(figure: Figure, value: float | None, headline: Headline) -> str:
    """Write a figure as it is declared, without its unit."""
    if value is None:
        return "–"
    if figure.form == "headline":
        return headline.number(value)
    if figure.form == "percent":
        return percent(value)
    return format(value, ",.0f" if figure.form == "count" else figure.form)


def temperature(t: float | tuple[float, float] | None) -> str:
    """Write a temperature; where it was scheduled or learnt, that at the first and at the last step."""
    if t is None:
        return "–"
    return f"{t[0]:.3g} to {t[1]:.3g}" if isinstance(t, tuple) else f"{t:.3g}"


def _note(verdict: Verdict) -> str:
    seeds = max(len(model.seeds) for model in verdict.models.values())
    said = [f"± over {seeds} seeds"] * (seeds > 1)
    if verdict.runtime is not None and any("latency_ms_p50" in model.figures for model in verdict.models.values()):
        said.append(f"p50 in {verdict.runtime}" + (f" on {verdict.processor}" if verdict.processor else ""))
    if any("tokens_per_s" in model.figures for model in verdict.models.values()):
        said.append("tokens per s of one text, with a cache, in PyTorch")
    if any("acceptance" in model.figures for model in verdict.models.values()):
        said.append("accepted: by the teacher in speculative decoding")
    return "; ".join(said)
