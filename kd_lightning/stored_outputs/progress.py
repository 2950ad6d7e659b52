"""What is printed while outputs are written, and at the end."""

import time
from collections.abc import Sequence

from kd_lightning.stored_outputs.formats import TEMPERATURES
from kd_lightning.stored_outputs.layout import Manifest


class Progress:
    """Prints how many views are written, at which rate, and when the rest will be.

    Args:
        total: Views that this process has to write.
        label: Tells processes apart.
    """

    def __init__(self, total: int, label: str = "") -> None:
        self.total, self.label, self.done = total, label, 0
        self._start = self._printed = time.monotonic()

    def add(self, views: int) -> None:
        self.done += views

    def print(self, seconds: float) -> None:
        """Print, unless it was printed less than that many seconds ago."""
        now = time.monotonic()
        if now - self._printed < seconds and self.done < self.total:
            return
        self._printed = now
        rate = self.done / max(now - self._start, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        print(
            f"stored outputs{self.label}: {self.done:,} of {self.total:,} views "
            f"({self.done / max(self.total, 1):.0%}), {rate:,.0f} a second, {duration(left)} left",
            flush=True,
        )


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def summary(manifest: Manifest) -> str:
    """Say how large the outputs are, and what storing them costs in accuracy."""
    total = manifest.rows * sum(array.bytes_per_row for array in manifest.arrays.values())
    features = len(manifest.arrays) - 1
    errors = [f"{x['mean']:.1e} (at most {x['max']:.1e}) at T = {t}" for t, x in manifest.kl.items()]
    return (
        f"stored outputs: {manifest.samples:,} samples × {manifest.views} views as {manifest.arrays['logits'].format}, "
        f"{manifest.bytes_per_view:,} bytes of logits a view, {total / 1e6:,.1f} MB"
        f"{f' with {features} layers' if features else ''}; KL from float32 in nats: {', '.join(errors)}"
    )


def errors_of(tallies: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
    """Add up the shards' (rows, sum and maximum of the error at each temperature)."""
    count = sum(tally[0] for tally in tallies)
    result = {}
    for i, temperature in enumerate(TEMPERATURES):
        mean = sum(tally[1 + 2 * i] for tally in tallies) / count
        result[f"{temperature:g}"] = {"mean": mean, "max": max(tally[2 + 2 * i] for tally in tallies)}
    return result
