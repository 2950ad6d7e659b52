"""Small figures as inline SVG, whose colours are the page's: they follow its theme, and need no library.

A figure is 340 units wide, so that its text can be read on a telephone; pages set several beside each other. Models are
told apart by colour (a class for each role), and by dashes and marks.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 340, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 40
_TITLE_SIZE, _WIDTH_OF_LETTER = 12, 0.54  # as the page has it; of a letter, in sizes of the font
_DASHES = {
    "student": "5 3",
    "control": "2 2",
    "continued": "7 2 2 2",
    "term2": "6 3",
    "term3": "2 2",
    "term4": "8 2 2 2",
}
TERMS = ("term1", "term2", "term3", "term4")
"""What is drawn of no model, such as losses: it has the role's place, and colours of its own."""
_MARKS = {
    "teacher": "square",
    "assistant": "square",
    "student": "triangle",
    "control": "diamond",
    "distilled": "circle",
    "continued": "cross",
    "quantized": "down",
    "term2": "triangle",
    "term3": "diamond",
    "term4": "square",
}

_SHAPES = {
    "square": "M-1-1h2v2h-2z",
    "triangle": "M0-1.2l1.2,2.1h-2.4z",
    "down": "M0,1.2l1.2-2.1h-2.4z",
    "diamond": "M0-1.3l1.3,1.3-1.3,1.3-1.3-1.3z",
    "cross": "M-1-.4h.6v-.6h.8v.6h.6v.8h-.6v.6h-.8v-.6h-.6z",
}


class Series(NamedTuple):
    """What is drawn of one model.

    Attributes:
        label: As the legend has it.
        role: Of the model, which gives colour, dashes and mark.
        x: Ascending.
        y: As many; None where nothing is known.
        low: Of a band around the line, as many; empty for none.
        high: Likewise.
    """

    label: str
    role: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


class Axis(NamedTuple):
    """An axis.

    Attributes:
        title: With the unit.
        log: Whether it is logarithmic.
        low: Where it begins at least; from the data where None.
        high: Where it ends at least.
        ticks: Where they are; at round numbers where none are given.
    """

    title: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    ticks: Sequence[float] = ()


class Point(NamedTuple):
    """A model in a plane, with what is written beside it."""

    label: str
    role: str
    x: float
    y: float
    sd: float | None = None


def lines(series: Sequence[Series], x: Axis, y: Axis, alt: str, mark_x: float | None = None) -> str:
    """Draw lines, with bands where they have any.

    Args:
        series: One a model.
        x: The axis.
        y: The axis.
        alt: What the figure shows, for those who do not see it.
        mark_x: Where a vertical line stands, such as the temperature that was used.
    """
    xs = [v for s in series for v in s.x] + ([mark_x] if mark_x is not None else [])
    ys = [v for s in series for v in (*s.y, *s.low, *s.high) if v is not None]
    frame = _Frame(x, y, xs, ys)
    body = [frame.axes()]
    if mark_x is not None:
        at = frame.x(mark_x)
        body.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
    for s in series:
        if s.low:
            up = [frame.at(a, b) for a, b in zip(s.x, s.high, strict=True)]
            down = [frame.at(a, b) for a, b in zip(s.x, s.low, strict=True)]
            body.append(f'<polygon class="band r-{s.role}" points="{" ".join([*up, *reversed(down)])}"/>')
    for s in series:
        known = [(a, b) for a, b in zip(s.x, s.y, strict=True) if b is not None]
        points = " ".join(frame.at(a, b) for a, b in known)
        dash = _DASHES.get(s.role, "")
        body.append(
            f'<polyline class="line r-{s.role}" points="{points}"'
            + (f' stroke-dasharray="{dash}"' if dash else "")
            + "/>"
        )
        if len(known) <= 20:
            body += [mark(s.role, frame.x(a), frame.y(b), f"{s.label}: {_short(a)}, {_short(b)}") for a, b in known]
    return _svg(body, alt)


def scatter(points: Sequence[Point], x: Axis, y: Axis, alt: str, front: Sequence[tuple[float, float]] = ()) -> str:
    """Draw models as named marks, with a bar of one standard deviation; ``front`` are the corners of a stair."""
    ys = [v for p in points for v in (p.y - (p.sd or 0), p.y + (p.sd or 0))]
    frame = _Frame(x, y, [p.x for p in points], ys, margin=0.08)
    body = [frame.axes()]
    if len(front) > 1:
        body.append(f'<polyline class="front" points="{" ".join(frame.at(a, b) for a, b in front)}"/>')
    marks, taken = [(frame.x(p.x), frame.y(p.y)) for p in points], list[tuple[float, float]]()
    for i, p in enumerate(points, start=1):
        px, py = frame.x(p.x), frame.y(p.y)
        if p.sd:
            low, high = frame.y(p.y - p.sd), frame.y(p.y + p.sd)
            body.append(f'<line class="line r-{p.role}" x1="{px:.1f}" x2="{px:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        body.append(mark(p.role, px, py, p.label, 5))
        body.append(_number(i, px, py, marks, taken))
    return _svg(body, alt)


def dots(
    series: Sequence[Series], x: Axis, y: Axis, alt: str, diagonal: bool = True, counts: Sequence[int] = ()
) -> str:
    """Draw marks in a plane, by default with the diagonal on which both are equal.

    Args:
        series: One a model.
        x: The axis.
        y: The axis.
        alt: What the figure shows, for those who do not see it.
        diagonal: Whether to draw it.
        counts: Of how many each mark is, which its area shows; empty for equal ones.
    """
    xs, ys = [v for s in series for v in s.x], [v for s in series for v in s.y if v is not None]
    frame = _Frame(x, y, xs, ys)
    body = [frame.axes()]
    if diagonal:
        low, high = max(frame.low[0], frame.low[1]), min(frame.high[0], frame.high[1])
        (x1, y1), (x2, y2) = (frame.at(v, v).split(",") for v in (low, high))
        body.append(f'<line class="front" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')
    for s in series:
        for i, (a, b) in enumerate(zip(s.x, s.y, strict=True)):
            if b is not None:
                size = 2.4 if len(s.x) > 40 else 4.0
                told = ""
                if counts:
                    size, told = 2 + 6 * math.sqrt(counts[i] / max(counts)), f"{counts[i]:,}: {_short(a)}, {_short(b)}"
                body.append(mark(s.role, frame.x(a), frame.y(b), told, round(size, 1)))
    return _svg(body, alt)


def heatmap(rows: Sequence[Sequence[float | None]], names: Sequence[str], alt: str) -> str:
    """Draw shares from 0 to 1 as squares, the darker the more; the diagonal is left out."""
    count, left, top, right = len(names), 70, 66, 30
    size = (WIDTH - left - right) / max(count, 1)
    body = []
    for i, row in enumerate(rows):
        at, middle = top + i * size, left + (i + 0.5) * size
        body.append(_tick(names[i], f'x="{left - 4}" y="{at + size / 2 + 3.5:.1f}" text-anchor="end"'))
        body.append(_tick(names[i], f'transform="translate({middle + 3:.1f},{top - 4}) rotate(-50)"'))
        for j, share in enumerate(row):
            place = f'x="{left + j * size:.1f}" y="{at:.1f}" width="{size - 1:.1f}" height="{size - 1:.1f}"'
            if i == j or share is None:
                body.append(f'<rect class="none" {place}/>')
                continue
            told = f"<title>{escape(names[i])} taken for {escape(names[j])}: {share:.2f}</title>"
            strength = min(1.0, 0.04 + 0.96 * share**0.7)
            body.append(f'<rect class="cell" {place} fill-opacity="{strength:.2f}">{told}</rect>')
    return _svg(body, alt, height=math.ceil(top + count * size + 4))


def mark(role: str, x: float, y: float, title: str, size: float = 3.2) -> str:
    """Draw the mark of a role around a place."""
    told = f"<title>{escape(title)}</title>" if title else ""
    kind = _MARKS.get(role, "circle")
    if kind == "circle":
        return f'<circle class="dot r-{role}" cx="{x:.1f}" cy="{y:.1f}" r="{size}">{told}</circle>'
    place = f"translate({x:.1f},{y:.1f}) scale({size})"
    return f'<path class="dot r-{role}" transform="{place}" d="{_SHAPES[kind]}">{told}</path>'


def swatch(role: str, line: bool = True) -> str:
    """Draw the line and the mark of a role, for a legend; the mark alone where no lines are drawn."""
    if not line:
        return f'<svg class="swatch short" viewBox="0 0 14 14" aria-hidden="true">{mark(role, 7, 7, "", 4.5)}</svg>'
    dash = _DASHES.get(role, "")
    drawn = f'<line class="line r-{role}" x1="1" x2="27" y1="7" y2="7"' + (
        f' stroke-dasharray="{dash}"' if dash else ""
    )
    return f'<svg class="swatch" viewBox="0 0 28 14" aria-hidden="true">{drawn}/>{mark(role, 14, 7, "")}</svg>'


def ticks(low: float, high: float, log: bool = False, most: int = 5) -> list[float]:
    """Return round numbers from one to another.

    >>> ticks(0, 1), ticks(1, 20, log=True)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [1, 2, 5, 10, 20])
    """
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        if last - first > most:
            return [10.0**e for e in range(first, last + 1, math.ceil((last - first) / most)) if low <= 10.0**e <= high]
        fine = [m * 10**e if e >= 0 else m / 10**-e for e in range(first, last + 1) for m in (1, 2, 5)]
        fine = [v for v in fine if low * 0.999 <= v <= high * 1.001]
        coarse = [v for v in fine if math.log10(v) % 1 == 0]
        return fine if len(fine) <= most + 2 or len(coarse) < 2 else coarse
    span = max(high - low, 1e-12)
    power = 10 ** math.floor(math.log10(span / (most - 1)))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if span / (m * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(math.floor(high / step + 1e-9) - first + 1)]


class _Frame:
    """Where numbers lie in the figure."""

    def __init__(self, x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float], margin: float = 0.04) -> None:
        self.axis = (x, y)
        bounds = [_bounds(axis, values, margin) for axis, values in ((x, xs), (y, ys))]
        self.low, self.high = tuple(b[0] for b in bounds), tuple(b[1] for b in bounds)

    def x(self, value: float) -> float:
        return _LEFT + self._share(0, value) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - self._share(1, value) * (HEIGHT - _TOP - _BOTTOM)

    def at(self, x: float, y: float) -> str:
        return f"{self.x(x):.1f},{self.y(y):.1f}"

    def axes(self) -> str:
        right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
        drawn = []
        for v in self._ticks(1):
            at = self.y(v)
            drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
            drawn.append(_tick(_short(v), f'x="{_LEFT - 5}" y="{at + 4:.1f}" text-anchor="end"'))
        for v in self._ticks(0):
            at = self.x(v)
            drawn.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            drawn.append(_tick(_short(v), f'x="{at:.1f}" y="{bottom + 16}" text-anchor="middle"'))
        drawn.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        below = f'x="{(_LEFT + right) / 2}" y="{HEIGHT - 6}"'
        beside = f'transform="translate(12,{(_TOP + bottom) / 2}) rotate(-90)"'
        for axis, place, room in zip(self.axis, (below, beside), (WIDTH - _LEFT, bottom + _TOP), strict=True):
            size = room / max(len(axis.title), 1) / _WIDTH_OF_LETTER
            smaller = f' style="font-size:{size:.1f}px"' if size < _TITLE_SIZE else ""
            drawn.append(f'<text class="title" {place} text-anchor="middle"{smaller}>{escape(axis.title)}</text>')
        return "".join(drawn)

    def _ticks(self, i: int) -> Sequence[float]:
        low, high, axis = self.low[i], self.high[i], self.axis[i]
        return [v for v in axis.ticks if low <= v <= high] if axis.ticks else ticks(low, high, axis.log)

    def _share(self, i: int, value: float) -> float:
        low, high = self.low[i], self.high[i]
        if self.axis[i].log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return min(max((value - low) / (high - low), -0.02), 1.02)


def _bounds(axis: Axis, values: Sequence[float], margin: float) -> tuple[float, float]:
    found = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)] or [1.0]
    low, high = min(found), max(found)
    differ = high - low > 1e-9 * max(abs(low), abs(high))  # by more than rounding
    if axis.log:
        room = (high / low) ** margin if differ else 1.5
        low, high = low / room, high * room
    else:
        room = margin * (high - low) if differ else max(abs(high) * 0.1, 0.5)
        low, high = low - room, high + room
    return (low if axis.low is None else axis.low), (high if axis.high is None else axis.high)


def _number(
    number: int, x: float, y: float, marks: Sequence[tuple[float, float]], taken: list[tuple[float, float]]
) -> str:
    """Write a number beside a mark, where neither a mark nor a number stands yet, if there is such a place."""
    for dx, dy in ((9, -5), (-15, -5), (9, 12), (-15, 12), (18, 4), (-24, 4), (9, -15), (9, 22), (-15, -15), (-15, 22)):
        at = x + dx, y + dy
        free = all(abs(at[0] - a) > 13 or abs(at[1] - b) > 10 for a, b in taken)
        seen = all(not (-6 < a - at[0] < 12 and -12 < b - at[1] < 4) for a, b in marks)
        if free and seen and _LEFT < at[0] < WIDTH - 12:
            break
    taken.append(at)
    return f'<text class="number" x="{at[0]:.1f}" y="{at[1]:.1f}">{number}</text>'


def _svg(body: Sequence[str], alt: str, height: int = HEIGHT) -> str:
    begin = f'<svg class="figure" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(alt)}">'
    return f"{begin}{''.join(body)}</svg>"


def _short(value: float) -> str:
    if 1e4 <= abs(value) < 1e6:
        return f"{value / 1000:.4g}k"
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:,.4g}"


def _tick(name: str, place: str, most: int = 11) -> str:
    """Write a name that may be long."""
    return f'<text class="tick" {place}>{escape(name if len(name) <= most else name[: most - 1] + "…")}</text>'
