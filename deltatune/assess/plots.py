"""The report's pictures, drawn by hand as inline SVG.

Why not plotly, which is at hand: its script alone is above 4 MB, and a page that is mailed around and committed should
stay under 300 kB, open without a network, print as vectors and be read by a screen reader. So: plain SVG, coloured by
the page's CSS variables (light and dark for nothing), each mark with its words in `aria-label`. Drawn 380 wide: one to
one on a phone, three in a row on a desk, text the same size on both.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from deltatune.assess import stats
from deltatune.assess.summary import Group, Row, count, seconds, size

W, H = 380, 330
LEFT, RIGHT, TOP, BOTTOM = 44, 22, 26, 42
LINE = 13.0

CATEGORIES = {
    "baseline": "M-4,-4H4V4H-4Z",
    "additive": "M0,-4.8A4.8,4.8 0 1 1 -.01,-4.8Z",
    "partial": "M0,-5.4L5.2,4H-5.2Z",
    "reparameterized": "M0,-5.8L5.8,0L0,5.8L-5.8,0Z",
    "quantisation": "M0,5.4L5.2,-4H-5.2Z",
    "multi-task": "M-1.7,-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
    "hybrid": "M0,-6L1.6,-2L5.8,-1.8L2.5,.9L3.6,5L0,2.7L-3.6,5L-2.5,.9L-5.8,-1.8L-1.6,-2Z",
    "unified": "M-2.6,-5H2.6L5.2,0L2.6,5H-2.6L-5.2,0Z",
    "domain": "M-5,-3V3H5V-3Z",
    "other": "M-4.6,-2.8L-2.8,-4.6L0,-1.8L2.8,-4.6L4.6,-2.8L1.8,0L4.6,2.8L2.8,4.6L0,1.8L-2.8,4.6L-4.6,2.8L-1.8,0Z",
}
"""Each category has a shape as well as a colour: nobody has to tell colours apart."""

PARTS = ("weights", "activations", "gradients", "optimizer", "method")


def category_class(category: str) -> str:
    """The CSS class of a category; what the table does not know is `other`, so no foreign text becomes a class."""
    return f"cat-{category if category in CATEGORIES else 'other'}"


def mark(category: str) -> str:
    """The category's shape alone, for a legend or a table."""
    path = CATEGORIES.get(category, CATEGORIES["other"])
    cls = category_class(category)
    return f'<svg class="mark {cls}" viewBox="-7 -7 14 14" aria-hidden="true"><path d="{path}"/></svg>'


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels. On a logarithmic one, zeros get a place of their own left of the first decade."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    zero: bool = False

    def __call__(self, value: float) -> float:
        if self.log and value <= 0:
            return self.start + 8
        a, b, v = (math.log10(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        start = self.start + (34 if self.zero else 0)
        share = (v - a) / (b - a)
        return start + min(max(share, 0.0), 1.0) * (self.end - start)

    def ticks(self, n: int = 5) -> list[float]:
        if not self.log:
            return _nice(self.low, self.high, n)
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        step = max(1, math.ceil((last - first + 1) / 6))
        decades = [10.0**e for e in range(first, last + 1, step)]
        if len(decades) < 3:
            decades = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
            decades = [value for value in decades if self.low <= value <= self.high]
        return ([0.0] if self.zero else []) + decades


def axis(values: Sequence[float], start: float, end: float, log: bool | None = None) -> Axis:
    """An axis around the values; logarithmic where asked, or where they span more than a factor of 12."""
    positive = [value for value in values if value > 0]
    if log is None:
        log = len(positive) == len(values) and max(values) > 12 * min(values)
    if log and positive:
        low, high = math.log10(min(positive)), math.log10(max(positive))
        pad = max(0.06 * (high - low), 0.12)
        return Axis(10 ** (low - pad), 10 ** (high + pad), start, end, True, len(positive) < len(values))
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low - pad, high + pad, start, end)


def _nice(low: float, high: float, n: int) -> list[float]:
    raw = (high - low) / n
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


Box = tuple[float, float, float, float]


def place_labels(
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    frame: Box,
    order: Sequence[int],
    bars: Sequence[Box] = (),
) -> dict[int, Box]:
    """A box (left, top, right, bottom) for each label that finds one: inside the frame, over no label and no point.

    Greedy in the given order (the important first): nearest place first, dearer where it covers one of the bars. A
    label without a free place is left out; its point still has its tip.
    """
    dots = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    placed: dict[int, Box] = {}
    for i in order:
        x, y = points[i]
        width = text_width(texts[i]) + 3
        best: tuple[float, Box] | None = None
        for distance in (9.0, 17.0, 27.0, 39.0, 53.0, 69.0):
            for angle in range(0, 360, 30 if distance > 9 else 45):
                cos, sin = math.cos(math.radians(angle)), -math.sin(math.radians(angle))
                left = x + distance * cos + (0 if cos > 0.3 else -width if cos < -0.3 else -width / 2)
                middle = y + distance * sin + (LINE / 2 if sin > 0.8 else -LINE / 2 if sin < -0.8 else 0)
                box = (left, middle - LINE / 2, left + width, middle + LINE / 2)
                if not _inside(box, frame) or any(_overlap(box, other) for other in (*placed.values(), *dots)):
                    continue
                cost = distance + 14 * sum(_overlap(box, bar) for bar in bars) + (0 if cos > 0.3 else 2)
                if best is None or cost < best[0]:
                    best = cost, box
        if best:
            placed[i] = best[1]
    return placed


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inside(a: Box, frame: Box) -> bool:
    return a[0] >= frame[0] and a[1] >= frame[1] and a[2] <= frame[2] and a[3] <= frame[3]


def text_width(text: str) -> float:
    """Pixels of bold text at 11 px in a wide font (DejaVu Sans): in a narrower one labels only stand further apart."""
    return sum(4.4 if c in "fijlrt.,:;()[]|'!1I" else 11.2 if c in "mwMW…" else 7.6 for c in text)


def short(name: str, n: int = 18) -> str:
    return name if len(name) <= n else name[: n - 1] + "…"


def pareto_plot(group: Group, ident: str, title: str, costs: Sequence[Sequence[float]], unit: str) -> str:
    """Score against a cost, one mark a method; `costs` holds each row's values, one a seed or one in all.

    Bars are the score's 95 % interval and the range of the cost over seeds. The line is the frontier: no method is both
    better and cheaper than one on it.
    """
    rows = group.rows
    shown: Callable[[float], str] = {"parameters": count, "memory": size, "time": seconds}[unit]
    means = [sum(values) / len(values) for values in costs]
    scores = [row.score.value for row in rows]
    x = axis([value for values in costs for value in values], LEFT, W - RIGHT, True if unit == "parameters" else None)
    # An interval over two seeds can be ten times as wide as all scores together: what it adds to the axis is bounded.
    reach = 0.6 * (max(scores) - min(scores)) or 0.05 * abs(scores[0]) or 1.0
    ends = [end for row in rows if row.score.interval for end in row.score.interval]
    y = axis(scores + [min(max(end, min(scores) - reach), max(scores) + reach) for end in ends], H - BOTTOM, TOP)
    points = [(x(mean), y(score)) for mean, score in zip(means, scores, strict=True)]
    front = stats.pareto(means, [-s for s in scores] if group.lower_is_better else scores)

    out = [_frame(x, y, shown, title, group.metric, group.lower_is_better)]
    path, bars = f"M{_p(*points[front[0]])}", []
    for a, b in pairwise(front):
        (ax, ay), (bx, by) = points[a], points[b]
        path += f"H{bx:.1f}V{by:.1f}"
        bars += [(ax, ay - 1, bx, ay + 1), (bx - 1, min(ay, by), bx + 1, max(ay, by))]
    out.append(f'<path class="frontier" d="{path}H{W - RIGHT}"/>')
    marks = []
    for i, row in enumerate(rows):
        px, py = points[i]
        body = ""
        if row.score.interval:
            low, high = y(row.score.interval.low), y(row.score.interval.high)
            body += f'<path class="whisker" d="M{px:.1f},{low:.1f}V{high:.1f}"/>'
            bars.append((px - 1, high, px + 1, low))
        left, right = x(min(costs[i])), x(max(costs[i]))
        if right - left > 12:
            body += f'<path class="whisker" d="M{left:.1f},{py:.1f}H{right:.1f}"/>'
            bars.append((left, py - 1, right, py + 1))
        exact = f"{means[i]:,.0f}" if unit == "parameters" else shown(means[i])
        on = ", on the frontier" if i in front else ""
        words = f"{row.label}\n{group.metric} {row.score}\n{title.lower()}: {exact}{on}"
        shape = CATEGORIES.get(row.category, CATEGORIES["other"])
        body += f'<path class="dot{" on" if i in front else ""}" transform="translate({_p(px, py)})" d="{shape}"/>'
        marks.append(_hot(row, words, body))
    order = sorted(range(len(rows)), key=lambda i: (i not in front, i))
    texts = [short(row.name) for row in rows]
    labels = place_labels(points, texts, (LEFT + 2, TOP - 4, W - 2, H - BOTTOM - 2), order, bars)
    for i, (left, top, right, bottom) in labels.items():
        px, py = points[i]
        # A leader line where the label had to move away: from the mark to the nearest point of the box.
        lx, ly = min(max(px, left), right), min(max(py, top + 3), bottom - 3)
        attributes = f'class="label {category_class(rows[i].category)}" data-category="{escape(rows[i].category)}"'
        if math.hypot(lx - px, ly - py) > 14:
            out.append(f'<path class="leader" d="M{_p(px, py)}L{_p(lx, ly)}"/>')
        out.append(f'<text {attributes} x="{left + 1:.1f}" y="{bottom - 3:.1f}">{escape(texts[i])}</text>')
    description = f"{len(rows)} methods. On the frontier: {', '.join(rows[i].label for i in front)}."
    name = f"{group.metric} against {title.lower()}"
    return _svg(ident, W, H, name, description, "".join([out[0], *out[1:], *marks]), "plot")


def _frame(x: Axis, y: Axis, shown: Callable[[float], str], title: str, metric: str, lower: bool) -> str:
    out = []
    for value in y.ticks():
        at = y(value)
        out.append(f'<path class="grid" d="M{LEFT},{at:.1f}H{W - RIGHT}"/>')
        out.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{at + 4:.1f}">{_tick(value)}</text>')
    for value in _binary_ticks(x) if shown is size else x.ticks(4):
        at = x(value)
        words = "0" if value == 0 else _short_tick(value, shown)
        out.append(f'<path class="grid" d="M{at:.1f},{TOP}V{H - BOTTOM}"/>')
        out.append(f'<text class="tick" text-anchor="middle" x="{at:.1f}" y="{H - BOTTOM + 15}">{words}</text>')
    if x.zero:
        at, base = x.start + 24, H - BOTTOM
        out.append(f'<path class="break" d="M{at - 2},{base + 4}l4,-8m2,8l4,-8"/>')
    out.append(f'<path class="axis" d="M{LEFT},{TOP}V{H - BOTTOM}H{W - RIGHT}"/>')
    better = "lower is better" if lower else "higher is better"
    out.append(f'<text class="name" x="4" y="14">{escape(metric)} <tspan class="soft">({better})</tspan></text>')
    scale = ", log scale" if x.log else ""
    out.append(f'<text class="name" text-anchor="end" x="{W - RIGHT}" y="{H - 8}">{escape(title)}')
    out.append(f' <tspan class="soft">(lower is cheaper{scale})</tspan></text>')
    return "".join(out)


def _binary_ticks(x: Axis) -> list[float]:
    """Ticks that are round in the binary unit they are printed in."""
    if x.log:
        powers = range(math.ceil(math.log2(x.low)), math.floor(math.log2(x.high)) + 1)
        return [2.0**e for e in powers][:: max(1, math.ceil(len(powers) / 5))]
    unit = 1024.0 ** max(0, math.floor(math.log(x.high, 1024) + 0.03))
    return [value * unit for value in _nice(x.low / unit, x.high / unit, 4)]


def _short_tick(value: float, shown: Callable[[float], str]) -> str:
    """20.0 MiB as 20 MiB."""
    return re.sub(r"\.0+(?=\D|$)", "", str(shown(value)))


def _tick(value: float) -> str:
    text = f"{value:.3f}".rstrip("0")
    return text + "00"[: max(0, 2 - len(text.split(".")[1]))] if abs(value) < 10 else f"{value:g}"


def memory_bars(group: Group, ident: str) -> str:
    """Peak training memory per method, stacked; widths in percent, so the text keeps its size at every width."""
    rows = sorted(group.rows, key=lambda row: row.memory.peak)
    top = max(max(row.memory.peak, sum(getattr(row.memory, part) for part in PARTS)) for row in rows) or 1
    pitch, out = 38, []
    for i, row in enumerate(rows):
        memory, at, left, y = row.memory, 0.0, "", i * pitch
        pieces = [(part, getattr(memory, part)) for part in PARTS]
        rest = memory.peak - sum(n for _, n in pieces)
        # Allocator slack and temporaries: what was measured at the peak and no tensor accounts for.
        if rest > 0.005 * memory.peak:
            pieces.append(("rest", rest))
        for part, n in pieces:
            width = 100 * n / top
            left += f'<rect class="part-{part}" x="{at:.2f}%" y="{y + 17}" width="{width:.2f}%" height="13"/>'
            at += width
        words = f"{row.label}: {size(memory.peak)} at the peak ({memory.measured})\n" + "\n".join(
            f"{part}: {size(n)}" for part, n in pieces
        )
        left += f'<text class="bar-name" x="0" y="{y + 12}">{escape(short(row.label, 38))}</text>'
        left += f'<text class="bar-value" text-anchor="end" x="100%" y="{y + 12}">{size(memory.peak)}</text>'
        out.append(_hot(row, words, left))
    description = "; ".join(f"{row.label} {size(row.memory.peak)}" for row in rows)
    names = f'role="group" aria-labelledby="{ident}-t {ident}-d"'
    head = f'<svg class="bars" {names} width="100%" height="{len(rows) * pitch}">'
    words = f'<title id="{ident}-t">Peak training memory</title><desc id="{ident}-d">{escape(description)}</desc>'
    return f"{head}{words}{''.join(out)}</svg>"


PW, PH = 184, 124


def learning_curves(group: Group, ident: str, rows: Sequence[Row]) -> list[str]:
    """One small panel a method: its training loss, mean and range over seeds, before everybody else's in grey."""
    curves = {row.name: [_thinned(cell.curve) for cell in row.done if len(cell.curve) > 1] for row in rows}
    curves = {name: lines for name, lines in curves.items() if lines}
    losses = [loss for lines in curves.values() for line in lines for _, loss in line]
    if not losses:
        return []
    # One diverging run must not flatten all others: the axis ends a little above the 98th percentile.
    top = sorted(losses)[int(0.98 * (len(losses) - 1))]
    x = Axis(0, max(step for lines in curves.values() for line in lines for step, _ in line), 28, PW - 6)
    y = axis([min(losses), top], PH - 18, 28)
    means = {name: _mean_line(lines) for name, lines in curves.items()}
    grey = "".join(f'<path d="{_line(x, y, line)}"/>' for line in means.values())
    shared = _panel_frame(y, f"{x.high:,.0f} steps")
    shared += f'<g class="others">{grey}</g>'
    out = [_shared(f"{ident}-all", shared)]
    for i, row in enumerate(row for row in rows if row.name in curves):
        mean, lines = means[row.name], curves[row.name]
        body = f'<use href="#{ident}-all"/>{_panel_name(row.name, f"{mean[-1][1]:.2f}")}'
        if len(lines) > 1:
            there = [dict(line) for line in lines]
            low, high = ([(step, of(line.get(step, m) for line in there)) for step, m in mean] for of in (min, max))
            body += f'<path class="band" d="{_line(x, y, [*low, *reversed(high)])}Z"/>'
        body += f'<path class="curve" d="{_line(x, y, mean)}"/>'
        title = f"Training loss of {row.label}"
        words = f"It ends at {mean[-1][1]:.3f} after {x.high:,.0f} steps."
        out.append(_figure(row, _svg(f"{ident}-{i}", PW, PH, title, words, body, "panel")))
    return out


def reliability_diagrams(ident: str, rows: Sequence[Row]) -> list[str]:
    """One small panel a method: accuracy against confidence, the area of a point the rows in its bin."""
    x, y = Axis(0, 1, 28, PW - 6), Axis(0, 1, PH - 18, 28)
    ideal = f'<path class="ideal" d="M{_p(x(0), y(0))}L{_p(x(1), y(1))}"/>'
    out = []
    for i, row in enumerate(rows):
        bins = pooled([point for cell in row.done for point in cell.reliability])
        if not bins:
            continue
        total, ece = sum(n for _, _, n in bins), row.mean("ece")
        body = f'<use href="#{ident}-all"/>{_panel_name(row.name, "" if ece is None else f"ECE {ece:.3f}")}'
        gaps = "".join(f"M{_p(x(confidence), y(accuracy))}V{y(confidence):.1f}" for confidence, accuracy, _ in bins)
        body += f'<path class="gap" d="{gaps}"/>'
        for confidence, accuracy, n in bins:
            radius = max(1.6, 11 * math.sqrt(n / total))
            body += f'<circle cx="{x(confidence):.1f}" cy="{y(accuracy):.1f}" r="{radius:.1f}"/>'
        words = "; ".join(f"confidence {c:.2f}, accuracy {a:.2f}, {n:,} rows" for c, a, n in bins)
        svg = _svg(f"{ident}-{i}", PW, PH, f"Reliability of {row.label}", words, body, "panel")
        out.append(_figure(row, svg))
    return [_shared(f"{ident}-all", _panel_frame(y, "confidence") + ideal), *out] if out else []


def pooled(points: Iterable[tuple[float, float, int]], n_bins: int = 10) -> list[tuple[float, float, int]]:
    """The seeds' reliability bins as one set of `n_bins` equal bins of confidence, weighted by their rows."""
    bins: dict[int, list[tuple[float, float, int]]] = {}
    for confidence, accuracy, n in points:
        if n:
            bins.setdefault(min(int(confidence * n_bins), n_bins - 1), []).append((confidence, accuracy, n))
    out = []
    for _, inside in sorted(bins.items()):
        n = sum(point[2] for point in inside)
        out.append((sum(p[0] * p[2] for p in inside) / n, sum(p[1] * p[2] for p in inside) / n, n))
    return out


def whisker(group: Group, row: Row) -> str:
    """The score and its interval on the group's common scale, for a table cell: overlaps show at a glance."""
    scores = [other.score.value for other in group.rows]
    ends = [end for other in group.rows if other.score.interval for end in other.score.interval]
    reach = 0.6 * (max(scores) - min(scores)) or 1e-9
    x = axis(scores + [min(max(end, min(scores) - reach), max(scores) + reach) for end in ends], 2, 88)
    at = x(row.score.value)
    bar = ""
    if row.score.interval:
        bar = f'<path class="whisker" d="M{x(row.score.interval.low):.1f},7H{x(row.score.interval.high):.1f}"/>'
    best = x(scores[0])
    return (
        f'<svg class="spark {category_class(row.category)}" viewBox="0 0 90 14" aria-hidden="true">'
        f'<path class="ideal" d="M{best:.1f},0V14"/>{bar}<circle cx="{at:.1f}" cy="7" r="3.4"/></svg>'
    )


def _shared(ident: str, body: str) -> str:
    """What all panels have in common, written once and referred to."""
    return f'<svg class="defs" width="0" height="0" aria-hidden="true"><defs><g id="{ident}">{body}</g></defs></svg>'


def _panel_name(name: str, note: str) -> str:
    text = f'<text class="panel-name" x="2" y="12">{escape(short(name, 16))}</text>'
    return text + f'<text class="tick" text-anchor="end" x="{PW - 4}" y="12">{escape(note)}</text>'


def _panel_frame(y: Axis, below: str) -> str:
    out = [f'<text class="tick" text-anchor="end" x="{PW - 6}" y="{PH - 4}">{escape(below)}</text>']
    for value in y.ticks(2):
        at = y(value)
        out.append(f'<path class="grid" d="M28,{at:.1f}H{PW - 6}"/>')
        out.append(f'<text class="tick" text-anchor="end" x="24" y="{at + 3.5:.1f}">{value:g}</text>')
    return "".join(out)


def _thinned(curve: Sequence[tuple[int, float | None]], n: int = 48) -> list[tuple[int, float]]:
    """At most `n` points, each the mean of its stretch: a page does not need every step."""
    points = [(step, loss) for step, loss in curve if loss is not None]
    width = max(1, math.ceil(len(points) / n))
    chunks = [points[i : i + width] for i in range(0, len(points), width)]
    return [(chunk[-1][0], sum(loss for _, loss in chunk) / len(chunk)) for chunk in chunks]


def _mean_line(lines: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean over seeds at the steps that all of them logged; the first seed's line where they share none."""
    by_step = [dict(line) for line in lines]
    steps = sorted(set.intersection(*(set(line) for line in by_step)))
    return [(step, sum(line[step] for line in by_step) / len(by_step)) for step in steps] or list(lines[0])


def _line(x: Axis, y: Axis, line: Sequence[tuple[int, float]]) -> str:
    """A path in steps of a tenth of a pixel, relative: half as long as absolute ones. Steps add up without drift."""
    points = [(round(10 * x(step)), round(10 * y(loss))) for step, loss in line]
    steps = [(bx - ax, by - ay) for (ax, ay), (bx, by) in pairwise(points)]
    return f"M{points[0][0] / 10:g},{points[0][1] / 10:g}l" + " ".join(f"{dx / 10:g},{dy / 10:g}" for dx, dy in steps)


def _figure(row: Row, svg: str) -> str:
    return f'<div class="hot cell {category_class(row.category)}" data-category="{escape(row.category)}">{svg}</div>'


def _hot(row: Row, words: str, body: str) -> str:
    """A mark with words: under the mouse, by the keyboard, and for a screen reader."""
    return (
        f'<g class="hot {category_class(row.category)}" tabindex="0" role="img" aria-label="{escape(words)}" '
        f'data-category="{escape(row.category)}">{body}</g>'
    )


def _svg(ident: str, width: int, height: int, title: str, description: str, body: str, kind: str) -> str:
    return (
        f'<svg class="{kind}" role="group" aria-labelledby="{ident}-t {ident}-d" viewBox="0 0 {width} {height}">'
        f'<title id="{ident}-t">{escape(title)}</title><desc id="{ident}-d">{escape(description)}</desc>{body}</svg>'
    )


def _p(x: float, y: float) -> str:
    return f"{x:.1f},{y:.1f}"
