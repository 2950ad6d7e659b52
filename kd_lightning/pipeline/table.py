"""The verdict as a person reads it in the terminal."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kd_lightning.pipeline.latency import Latency
from kd_lightning.pipeline.results import Verdict
from kd_lightning.pipeline.sentence import number, percent, points, title


def print_verdict(verdict: Verdict, console: Console) -> None:
    """Quality and cost of every model, then the sentence. Several tables, so that each is readable at 100 columns."""
    rows = {key: Text(title(key, model)) for key, model in verdict.models.items()}
    models = verdict.models.values()
    with_temperature = any(model.temperature is not None for model in models)
    with_entropy = any(model.teacher_entropy is not None for model in models)
    classes = list(dict.fromkeys(name for model in models for name in model.recall))

    wide = console.width >= 100
    quality = _table(wide, "test acc. %", "agreement %", "retention %", "gap closed %")
    quality.columns[1].no_wrap = True  # "79.0 ± 0.4" stays on one line
    if with_temperature:
        quality.add_column("T", justify="right")
    if with_entropy:
        quality.add_column(Text("teacher entropy %"), justify="right")
    with_fp32 = any(model.quantized is not None for model in models)
    if with_fp32:
        quality.add_column("as in fp32 %", justify="right")
    for name in classes:
        quality.add_column(Text(f"recall {name} %"), justify="right")
    with_file = any(model.file_mb is not None for model in models)
    sizes = ["size MB", *(["file MB"] if with_file else [])]
    runtimes = dict.fromkeys(model.latency.runtime for model in models if model.latency is not None)
    first = f"{', '.join(runtimes)} p50 ms" if runtimes else "p50 ms"
    cost = _table(wide, "parameters", *sizes, first, "p95 ms", "per s at 64", "training s")
    for key, model in verdict.models.items():
        share = model.gap_closed
        cells = [
            f"{percent(model.accuracy)} ± {percent(model.sd)}",
            percent(model.agreement),
            percent(model.retention),
            percent(share.mean if share and share.low is not None else None),  # else any share could be true
        ]
        if with_temperature:
            cells.append(number(model.temperature, ".3g"))
        if with_entropy:
            cells.append(percent(model.teacher_entropy))
        if with_fp32:
            cells.append(percent(model.quantized.agreement_fp32 if model.quantized else None))
        cells += [percent(model.recall.get(name)) for name in classes]
        quality.add_row(rows[key], *cells)
        files = [number(model.file_mb, ".3f")] if with_file else []
        size = number(model.size_mb if model.quantized is None else None, ".3f" if with_file else ".2f")
        seconds = number(model.train_seconds, ",.1f")
        cost.add_row(rows[key], f"{model.params:,}", size, *files, *_speed(model.latency), seconds)
    if verdict.processor is not None:
        cost.caption, cost.caption_justify = Text(f"speed on a processor with {verdict.processor}"), "left"
    for table in (quality, cost, *_openvino(verdict, rows), *_comparison(verdict, rows)):
        console.print(table)
        console.print()
    console.print(Text(verdict.sentence))


def _speed(latency: Latency | None) -> list[str]:
    return [
        number(latency.p50_ms if latency else None, ".3f"),
        number(latency.p95_ms if latency else None, ".3f"),
        number(latency.throughput_per_s if latency else None, ",.0f"),
    ]


def _openvino(verdict: Verdict, rows: Mapping[str, Text]) -> list[Table]:
    """The speed in the second runtime, where it was measured."""
    measured = {key: model for key, model in verdict.models.items() if model.latency_openvino is not None}
    table = _table(True, "OpenVINO p50 ms", "p95 ms", "per s at 64")
    for key, model in measured.items():
        table.add_row(rows[key], *_speed(model.latency_openvino))
    return [table] if measured else []


def _comparison(verdict: Verdict, rows: Mapping[str, Text]) -> list[Table]:
    """Several distilled models against one of them, where that was asked for."""
    distilled = {key: model for key, model in verdict.models.items() if model.role == "distilled"}
    reference = [key for key, model in distilled.items() if model.against_reference is None]
    if len(reference) != 1 or len(distilled) == 1:
        return []
    several = all(len(model.seeds) > 1 for model in distilled.values())
    interval = "95 % interval" if several else "one seed: 95 % interval of the test images alone"
    adjusted = f"p (Holm, {len(distilled) - 1} comparisons)"
    table = _table(True, f"points over {reference[0]} ({interval})", *([adjusted] if several else []))
    for key, model in distilled.items():
        if key != reference[0]:
            p = model.against_reference_p
            cells = ["< 0.001" if p is not None and p < 0.001 else number(p, ".3f")] if several else []
            table.add_row(rows[key], points(model.against_reference), *cells)
    return [table]


def _table(wide: bool, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=wide)
    for column in columns:
        table.add_column(column, justify="right")
    return table
