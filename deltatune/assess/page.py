"""One page that says which method, at what cost, how sure: self-contained, to be mailed, printed and committed.

The verdict comes first, then the numbers behind it, then the pictures, then how it was measured, then what failed. It
opens from disk: styles, pictures and a hundred lines of script are inside, and its own content policy forbids it the
network. Every word from a cell goes through `html.escape`, and none becomes a class, an id or script.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape

from deltatune.assess import plots
from deltatune.assess.cells import Cell
from deltatune.assess.summary import Group, Row, Strong, count, percent, reason, seconds, size

N_PANELS = 24
"""Small panels (curves, reliability) drawn per comparison, best methods first; the cells' files hold all."""


def page(groups: Sequence[Group], title: str = "deltatune report") -> str:
    """The whole HTML document for these comparisons. The same groups give the same bytes."""
    body = "".join(_section(group, f"g{i}") for i, group in enumerate(groups))
    nav = _overview(groups) if len(groups) > 1 else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><style>{CSS}</style></head><body><main>'
        f'<p class="brand"><b>deltatune</b> report</p>{nav}{body}'
        "<footer>Made by <code>deltatune report</code> from the cells of a results folder, and from nothing else."
        f'</footer></main><div id="tip" role="status" hidden></div><script>{SCRIPT}</script></body></html>\n'
    )


def _overview(groups: Sequence[Group]) -> str:
    """Methods down, comparisons across: the table that a survey prints."""
    names: dict[str, str] = {row.name: row.label for group in groups for row in group.rows}
    heads = "".join(
        f'<th scope="col" class="num"><a href="#g{i}">{escape(group.task)}</a><small>{escape(group.backbone)}<br>'
        f"{escape(group.metric)}</small></th>"
        for i, group in enumerate(groups)
    )
    body = ""
    for name, label in names.items():
        cells = ""
        for group in groups:
            row = next((row for row in group.rows if row.name == name), None)
            if row is None:
                failed = any(cell.key.method == name for cell in group.failures)
                cells += f'<td class="num">{"<span class=bad>failed</span>" if failed else "–"}</td>'
            else:
                kind = {"best": "best", "tied": "tied"}.get(row.standing, "")
                cells += f'<td class="num {kind}">{escape(str(row.score))}</td>'
        body += f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'
    return (
        f'<section><h1>All comparisons</h1>{_scroll("all-c")}<table><caption id="all-c">Mean score per method and '
        "comparison. Bold: the best; underlined: not told apart from it.</caption><thead><tr>"
        f'<th scope="col">Method</th>{heads}</tr></thead><tbody>{body}</tbody></table></div></section>'
    )


def _scroll(caption: str) -> str:
    """Opens a box in which a wide table scrolls sideways, by finger, wheel or keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{caption}">'


def _section(group: Group, ident: str) -> str:
    parts = ((escape(part), isinstance(part, Strong)) for part in group.verdict)
    verdict = "".join(f"<strong>{words}</strong>" if strong else words for words, strong in parts)
    budget = group.budget
    rates = f"{budget.lr_trials} learning rate{'' if budget.lr_trials == 1 else 's'}"
    out = [
        f'<section id="{ident}" class="group"><header><h1>{escape(group.task)}</h1>'
        f"<p>{escape(group.backbone)} · budget {escape(budget.name)}: {budget.n_steps:,} steps of {budget.batch}, "
        f"{rates} a method · {len(group.rows)} methods, {len(group.cells)} cells</p>"
        "</header>",
        f'<p class="verdict">{verdict}</p>{_sure(group)}{_cards(group)}',
    ]
    if group.rows or group.failures:
        out.append(_table(group, ident))
    if group.rows:
        out += [_paretos(group, ident), _memory(group, ident), _panels(group, ident)]
    out += [_protocol(group, ident), _failures(group), "</section>"]
    return "".join(out)


def _sure(group: Group) -> str:
    """What the intervals are, and are not, intervals of."""
    notes = list(group.warnings)
    sources = {row.score.source for row in group.rows}
    if "seeds" in sources:
        notes.insert(0, "± is a 95 % interval over seeds (Student’s t): another run on the same test rows.")
    if "test rows" in sources:
        seeds = "One seed has no interval over seeds: where" if "seeds" not in sources else "Where one seed finished,"
        notes.insert(
            0, f"{seeds} a range is given, it is a 95 % bootstrap over test rows and says nothing of another run."
        )
    elif group.rows and "seeds" not in sources:
        notes.insert(0, "One seed and no predictions: there is no interval, and a ranking is no evidence.")
    if any(row.standing == "tied" for row in group.rows):
        noise = (
            "Within noise: a paired interval of the difference to the best, over seeds or over test rows, holds zero."
        )
        notes.insert(1, noise)
    if len(group.rows) > 2:
        notes.append("Each comparison is made at 95 % by itself; nothing is corrected for their number.")
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>' if notes else ""


def _cards(group: Group) -> str:
    if len(group.rows) < 2:
        return ""
    best, among = group.rows[0], group.contenders
    of = f"of {len(among)} not told apart from the best" if len(among) > 1 else "the only one not behind the best"
    least = min(among, key=lambda row: row.n_trainable)
    small = min(among, key=lambda row: row.memory.peak)
    fast = min(among, key=lambda row: row.time("train_s"))
    cards = [
        ("Best score", best, str(best.score), group.metric),
        ("Fewest trainable", least, count(least.n_trainable), f"parameters, {of}"),
        ("Least memory", small, size(small.memory.peak), f"peak, {of}"),
        ("Fastest to train", fast, seconds(fast.time("train_s")), of),
    ]
    cards_html = "".join(
        f'<div class="card {plots.category_class(row.category)}"><h3>{name}</h3><p class="who">{escape(row.label)}</p>'
        f'<p class="big">{escape(value)}</p><p class="soft">{escape(note)}</p></div>'
        for name, row, value, note in cards
    )
    return f'<div class="cards">{cards_html}</div>'


Column = tuple[str, str, Callable[[Row], float | None], Callable[[Row], str]]


def _columns(group: Group) -> list[Column]:
    """(head, unit or gloss, value to sort by, HTML to show) for every number of the table."""

    def plain(
        of: Callable[[Row], float | None], shown: Callable[[float], str]
    ) -> tuple[Callable[[Row], float | None], Callable[[Row], str]]:
        def show(row: Row) -> str:
            value = of(row)
            return "–" if value is None else escape(shown(value))

        return of, show

    three = "{:.3f}".format
    return [
        ("Score", group.metric, lambda row: row.score.value, lambda row: _score_html(group, row)),
        ("Trainable", "without head", *plain(lambda row: row.n_trainable, count)),
        ("Share", "of the backbone", *plain(lambda row: row.share, percent)),
        ("Head", "parameters", *plain(lambda row: row.n_head, count)),
        ("Peak memory", "split by hue", lambda row: row.memory.peak, _memory_html),
        ("Step", "median ms", *plain(lambda row: row.time("step_ms"), "{:,.1f}".format)),
        ("Tokens/s", "training", *plain(lambda row: row.time("tokens_per_s"), "{:,.0f}".format)),
        ("Training", "one run", *plain(lambda row: row.time("train_s"), seconds)),
        ("Total", "all trials", *plain(lambda row: row.time("total_s"), seconds)),
        ("Stored", "parameters", *plain(lambda row: row.n_stored, count)),
        ("File", "on disk", *plain(lambda row: row.file_bytes, size)),
        ("NLL", "test", *plain(lambda row: row.mean("nll"), three)),
        ("ECE", "test", *plain(lambda row: row.mean("ece"), three)),
        (
            "lr",
            "chosen",
            lambda row: row.lrs[0],
            lambda row: ", ".join(f"{lr:.0e}".replace("e-0", "e-") for lr in row.lrs),
        ),
        (
            "Seeds",
            "done",
            lambda row: len(row.done),
            lambda row: f"{len(row.done)} of {len(row.done) + len(row.failed)}",
        ),
    ]


def _score_html(group: Group, row: Row) -> str:
    badge = {"best": "best", "tied": "tied", "worse": "", "unknown": "?"}[row.standing]
    tip = f' title="{escape(row.gap)}"' if row.gap else ""
    tag = f'<span class="badge {row.standing}">{badge}</span>' if badge else ""
    return f"<span{tip}>{escape(str(row.score))}{tag}</span>{plots.whisker(group, row)}"


def _memory_html(row: Row) -> str:
    memory = row.memory
    total = max(memory.peak, sum(getattr(memory, part) for part in plots.PARTS)) or 1
    parts = [(part, getattr(memory, part)) for part in plots.PARTS]
    words = ", ".join(f"{part} {size(n)}" for part, n in parts)
    bar = "".join(f'<i class="part-{part}" style="width:{100 * n / total:.1f}%"></i>' for part, n in parts)
    return f'{size(memory.peak)}<span class="split" role="img" aria-label="{words}" title="{words}">{bar}</span>'


def _table(group: Group, ident: str) -> str:
    columns = _columns(group)
    text = '<th scope="col" class="text" aria-sort="none"><button type="button">{}</button></th>'
    heads = text.format("Method")
    for i, (name, gloss, _, _) in enumerate(columns):
        order = ("ascending" if group.lower_is_better else "descending") if i == 0 else "none"
        first = ' data-first="descending"' if name in ("Score", "Tokens/s") else ""
        heads += (
            f'<th scope="col" class="num" aria-sort="{order}"{first}><button type="button">{escape(name)}</button>'
            f"<small>{escape(gloss)}</small></th>"
        )
    heads += text.format("Category")
    body = ""
    for row in group.rows:
        cells = "".join(f'<td data-v="{_v(value(row))}">{show(row)}</td>' for _, _, value, show in columns)
        body += f"<tr {_about(row.category, row.name, row.label)}>{_who(row.first)}{cells}{_kind(row.first)}</tr>"
    for cell in group.failures:
        last = reason(cell)
        body += (
            f'<tr class="failed" {_about(cell.category, cell.key.method, cell.label)}>{_who(cell)}'
            f'<td colspan="{len(columns)}"><b>failed</b>, seed {cell.key.seed}: {escape(last)}</td>{_kind(cell)}</tr>'
        )
    found = {cell.category: None for cell in group.cells}
    order_of = {name: i for i, name in enumerate(plots.CATEGORIES)}
    chips = "".join(
        f'<button type="button" class="chip {plots.category_class(name)}" aria-pressed="true" '
        f'data-category="{escape(name)}">{plots.mark(name)}{escape(name)}</button>'
        for name in sorted(found, key=lambda name: (order_of.get(name, 99), name))
    )
    return (
        '<div class="tools"><label>Find '
        f'<input type="search" placeholder="method, label, category" aria-controls="{ident}-t"></label>'
        f'<div class="chips" role="group" aria-label="Categories shown">{chips}</div></div>'
        f'{_scroll(f"{ident}-c")}<table class="results" id="{ident}-t"><caption id="{ident}-c">'
        "Every method, best score first. A head sorts by its column, once more the other way. "
        "Beside the score: its interval on a common scale; the dashed line is the best."
        f"</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
        '<p class="none" hidden>No method matches.</p>'
    )


def _v(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}"


def _about(category: str, name: str, label: str) -> str:
    return f'data-category="{escape(category)}" data-find="{escape(f"{name} {label} {category}".lower())}"'


def _who(cell: Cell) -> str:
    paper = f" · {escape(cell.paper)}" if cell.paper else ""
    return (
        f'<th scope="row" class="text" data-v="{escape(cell.label.lower())}"><div class="who">'
        f"{plots.mark(cell.category)}<div>{escape(cell.label)}<small>{escape(cell.key.method)}{paper}</small>"
        "</div></div></th>"
    )


def _kind(cell: Cell) -> str:
    return f'<td class="text" data-v="{escape(cell.category)}">{escape(cell.category)}</td>'


def _paretos(group: Group, ident: str) -> str:
    costs: list[tuple[str, str, list[list[float]]]] = [
        ("Trainable parameters", "parameters", [[float(row.n_trainable)] for row in group.rows]),
        ("Peak memory", "memory", [[float(row.memory.peak)] for row in group.rows]),
        ("Training time", "time", [row.times("train_s") for row in group.rows]),
    ]
    drawn = [plots.pareto_plot(group, f"{ident}-p{unit[0]}", title, cost, unit) for title, unit, cost in costs]
    way = "Down" if group.lower_is_better else "Up"
    return (
        f"<h2>What a point of score costs</h2><p class=lead>{way} and to the left is better. The line joins the "
        "methods that none beats on both axes. Vertical bars: the score’s 95 % interval; horizontal bars: the range "
        f'over seeds.</p><div class="plots">{"".join(f"<figure>{svg}</figure>" for svg in drawn)}</div>'
    )


def _memory(group: Group, ident: str) -> str:
    keys = "".join(
        f'<li><i class="part-{part}"></i>{name}</li>'
        for part, name in zip(
            (*plots.PARTS, "rest"),
            ("weights", "activations", "gradients", "optimiser", "the method’s own", "not accounted for"),
            strict=True,
        )
    )
    return (
        "<h2>Where the memory goes</h2><p class=lead>Peak while training, least first.</p>"
        f'<ul class="keys">{keys}</ul>{plots.memory_bars(group, f"{ident}-mb")}'
    )


def _panels(group: Group, ident: str) -> str:
    rows = group.rows[:N_PANELS]
    left = len(group.rows) - len(rows)
    more = f" The {len(rows)} best methods; the cells hold the other {left}." if left else ""
    out = ""
    if curves := plots.learning_curves(group, f"{ident}-lc", rows):
        out += (
            "<h2>Learning curves</h2><p class=lead>Training loss, and where it ended; the band is the range over "
            f"seeds, grey the others.{more}</p>"
            f'<div class="panels">{"".join(curves)}</div>'
        )
    if diagrams := plots.reliability_diagrams(f"{ident}-rd", rows):
        out += (
            "<h2>Reliability</h2><p class=lead>How often it is right when it says so: on the diagonal confidence is "
            f"accuracy, below it the method is overconfident. Larger points hold more rows.{more}</p>"
            f'<div class="panels">{"".join(diagrams)}</div>'
        )
    return out


def _protocol(group: Group, ident: str) -> str:
    budget, cells = group.budget, group.cells
    lines: list[tuple[str, str]] = [
        (
            "Budget",
            f"{escape(budget.name)}: the same for every method. {budget.n_steps:,} optimiser steps of {budget.batch} "
            f"rows; {budget.lr_trials} learning rates, chosen on {budget.n_validation:,} validation rows; "
            f"{budget.n_train:,} rows to train, {budget.n_test:,} to test, which chose nothing.",
        ),
        ("Seeds", ", ".join(map(str, sorted({cell.key.seed for cell in cells})))),
        ("Machine", _each(f"{m.cpu}, {m.cores} cores, {m.device}" for m in (cell.machine for cell in cells))),
        ("Versions", _each(", ".join(f"{n} {v}" for n, v in sorted(cell.versions.items())) for cell in cells)),
    ]
    for split in ("train", "validation", "test"):
        lines.append((f"Data, {split}", _each(str(getattr(cell.data, split)) for cell in cells if cell.data)))
    measured = {"cuda": "measured by the CUDA allocator", "accounted": "accounted tensor by tensor"}
    lines.append(("Memory", _each(measured[cell.memory.measured] for cell in cells if cell.memory)))
    lines.append(
        ("Started", escape(" to ".join(dict.fromkeys((min(c.started for c in cells), max(c.started for c in cells))))))
    )
    listed = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in lines)
    return f"<h2>How it was measured</h2><dl>{listed}</dl>{_trials(group, ident)}"


def _each(values: Iterable[str]) -> str:
    return "<br>".join(escape(value) for value in dict.fromkeys(values)) or "–"


def _trials(group: Group, ident: str) -> str:
    tried = [(row, cell) for row in group.rows for cell in row.done if cell.trials]
    if not tried:
        return "<p class=lead>No learning-rate trials are recorded.</p>"
    lrs = sorted({trial.lr for _, cell in tried for trial in cell.trials})
    heads = "".join(f'<th scope="col" class="num">{lr:g}</th>' for lr in lrs)
    body, seen = "", set()
    for row, cell in tried:
        found = {trial.lr: trial.validation for trial in cell.trials}
        # Trials are often run once and shared by the seeds: the same line again says nothing.
        if (fingerprint := (row.name, cell.lr, tuple(found.items()))) in seen:
            continue
        seen.add(fingerprint)
        cells = ""
        for lr in lrs:
            value = found.get(lr)
            words = "–" if lr not in found else "diverged" if value is None else f"{value:.3f}"
            cells += f'<td class="num{" best" if lr == cell.lr else ""}">{words}</td>'
        body += f'<tr><th scope="row">{escape(row.label)}</th><td class="num">{cell.key.seed}</td>{cells}</tr>'
    return (
        f"<details open><summary>Learning rates tried ({len(lrs)} values)</summary>"
        f'{_scroll(f"{ident}-lr")}<table><caption id="{ident}-lr">{escape(group.metric)} on validation rows, by '
        "learning rate. Bold: the one taken. Seeds that shared their trials have one line.</caption>"
        f'<thead><tr><th scope="col">Method</th><th scope="col" class="num">Seed</th>{heads}</tr>'
        f"</thead><tbody>{body}</tbody></table></div></details>"
    )


def _failures(group: Group) -> str:
    if not group.failures:
        return "<h2>Failures</h2><p class=lead>None: every cell finished.</p>"
    items = "".join(
        f'<details class="failure"><summary><b>{escape(cell.label)}</b>, seed {cell.key.seed}: '
        f"{escape(reason(cell))}</summary><pre>{escape(cell.error or '')}</pre>"
        f"<pre>{escape(json.dumps(dict(cell.config), indent=1, ensure_ascii=False, default=str))}</pre></details>"
        for cell in group.failures
    )
    return f"<h2>Failures</h2><p class=lead>{len(group.failures)} of {len(group.cells)} cells.</p>{items}"


CSS = """
:root{--bg:#fbfbfa;--card:#fff;--ink:#1c1f23;--soft:#5f6670;--line:#dfe2e6;--grid:#eceef1;--bad:#b3261e;--badbg:#fdecea;
--accent:#0b62a8;--baseline:#4b5058;--additive:#b86e00;--partial:#00805d;--reparameterized:#0a6ab6;
--quantisation:#c24a00;
--multi-task:#1a8fc4;--hybrid:#b04e8f;--unified:#7d6b00;--domain:#7a4b2a;--other:#6b5bb5;
--weights:#5b6b7f;--activations:#6cb6dd;--gradients:#d8bd4f;--optimizer:#c9647a;--method:#7a2c6b;--rest:#c9cdd3}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1c2025;--ink:#e7eaee;--soft:#9aa3ad;--line:#333a42;
--grid:#272d34;--bad:#ff9b92;--badbg:#3a1d1c;--accent:#6db7f2;--baseline:#b4bac2;--additive:#eda63a;--partial:#35c39a;
--reparameterized:#5aaeee;--quantisation:#ff8549;--multi-task:#7fd0f5;--hybrid:#e58fc6;--unified:#d9c748;
--domain:#c99873;
--other:#aa9df0;--weights:#7d8da1;--activations:#6cb6dd;--gradients:#d8bd4f;--optimizer:#d3758a;--method:#b768a6;
--rest:#4a525c}}
@media print{:root{--bg:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;--grid:#e5e5e5;--bad:#b3261e;
--badbg:#fdecea}}
.cat-baseline{--c:var(--baseline)}.cat-additive{--c:var(--additive)}.cat-partial{--c:var(--partial)}
.cat-reparameterized{--c:var(--reparameterized)}.cat-quantisation{--c:var(--quantisation)}
.cat-multi-task{--c:var(--multi-task)}.cat-hybrid{--c:var(--hybrid)}.cat-unified{--c:var(--unified)}
.cat-domain{--c:var(--domain)}.cat-other{--c:var(--other)}
.part-weights{--p:var(--weights)}.part-activations{--p:var(--activations)}.part-gradients{--p:var(--gradients)}
.part-optimizer{--p:var(--optimizer)}.part-method{--p:var(--method)}.part-rest{--p:var(--rest)}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
Arial,sans-serif;-webkit-print-color-adjust:exact;print-color-adjust:exact}
main{max-width:1240px;margin:0 auto;padding:20px 24px 48px}
.brand{margin:0 0 4px;color:var(--soft);font-size:13px}.brand b{color:var(--ink)}
section>h1{margin-bottom:12px}.group{padding-top:6px}section+section{margin-top:56px;
border-top:1px solid var(--line);padding-top:28px}
header h1,section>h1{margin:0;font-size:26px;line-height:1.2;letter-spacing:-.01em}header p{margin:4px 0 0;
color:var(--soft)}
h2{margin:36px 0 4px;font-size:18px;letter-spacing:-.005em}h3{margin:0;font-size:12px;font-weight:600;color:var(--soft)}
.lead{margin:0 0 12px;color:var(--soft);max-width:75ch}.soft{color:var(--soft)}
.verdict{margin:18px 0 10px;font-size:20px;line-height:1.45;max-width:62em;text-wrap:pretty;overflow-wrap:anywhere}
.verdict strong{font-weight:650;color:var(--accent)}
.notes{margin:0 0 18px;padding:0;list-style:none;color:var(--soft);font-size:13px}
.notes li{padding-left:14px;position:relative}.notes li::before{content:"";position:absolute;left:0;top:.65em;width:6px;
height:1px;background:currentColor}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px;margin:0 0 26px}
.card{background:var(--card);border:1px solid var(--line);border-left:4px solid var(--c);border-radius:8px;
padding:12px 14px}
.card p{margin:0}.card .who{font-weight:600;overflow-wrap:anywhere}.card .big{font-size:24px;line-height:1.3;
font-variant-numeric:tabular-nums;letter-spacing:-.01em}.card .soft{font-size:12px}
.tools{display:flex;flex-wrap:wrap;gap:10px 18px;align-items:center;margin:0 0 10px}.tools label{font-size:13px;
color:var(--soft)}
input{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:5px 9px;
width:220px;margin-left:6px}
.chips{display:flex;flex-wrap:wrap;gap:6px}.chip{font:inherit;font-size:13px;color:inherit;background:var(--card);
border:1px solid var(--line);border-radius:99px;padding:3px 11px 3px 7px;cursor:pointer;display:inline-flex;
align-items:center;gap:5px}
.chip[aria-pressed=false]{opacity:.5;text-decoration:line-through}
.mark{width:14px;height:14px;flex:none}.mark path{fill:var(--c)}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px;background:var(--card)}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
caption{caption-side:bottom;text-align:left;color:var(--soft);padding:8px 12px;font-size:12px;position:sticky;left:0;
max-width:calc(100vw - 50px)}
th,td{padding:6px 9px;text-align:left;border-bottom:1px solid var(--grid);white-space:nowrap;vertical-align:top}
thead th{border-bottom:1px solid var(--line);vertical-align:bottom;font-weight:600}th small{display:block;
font-weight:400;
color:var(--soft);font-size:11px;line-height:1.3}
tbody th{font-weight:600}.num,.results td{text-align:right}.results td.text,.results td[colspan]{text-align:left}
tr>th:first-child{position:sticky;left:0;background:var(--card);z-index:1;box-shadow:1px 0 0 var(--line);
min-width:172px;
white-space:normal;overflow-wrap:anywhere}
tbody tr:hover>*{background:var(--grid)}
th button{font:inherit;font-weight:600;color:inherit;background:none;border:0;padding:0;cursor:pointer;
white-space:nowrap}
th[aria-sort] button::after{content:"↕";opacity:.3;margin-left:3px;font-weight:400}
th[aria-sort=ascending] button::after{content:"↑";opacity:1}th[aria-sort=descending] button::after{content:"↓";
opacity:1}
th .who{display:flex;gap:5px}th .mark{margin:3px 0 0 -2px}.best{font-weight:700}.tied{text-decoration:underline}
.badge{display:inline-block;margin-left:6px;padding:0 6px;border-radius:99px;font-size:11px;font-weight:600;
border:1px solid var(--line);color:var(--soft);text-decoration:none}.badge.best{background:var(--accent);
border-color:var(--accent);color:var(--bg)}
.spark{display:block;width:90px;height:14px;margin:2px 0 0 auto}.spark circle{fill:var(--c)}
.spark .whisker{stroke:var(--c)}.spark .ideal{stroke:var(--soft);stroke-dasharray:2 2;opacity:.7}
.split{display:flex;width:84px;height:6px;margin:5px 0 0 auto;background:var(--rest);border-radius:2px;overflow:hidden}
.split i{background:var(--p)}
.failed>*,tr.failed>th:first-child{color:var(--bad);background:var(--badbg)}.failed td{white-space:normal;
overflow-wrap:anywhere}.failed small{color:inherit}.bad{color:var(--bad)}tr.failed:hover>*{background:var(--badbg)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(330px,1fr));gap:14px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px}
svg{display:block}svg.plot,svg.panel{width:100%;height:auto}svg.defs{position:absolute}
svg{font-size:11px}text{fill:var(--ink)}text.tick,tspan.soft{fill:var(--soft)}.name{font-weight:600}
tspan.soft{font-weight:400}
path{fill:none}.grid{stroke:var(--grid)}.axis,.break{stroke:var(--soft)}
.frontier{stroke:var(--accent);stroke-width:1.6;stroke-dasharray:5 3;opacity:.75}
.whisker{stroke:var(--c);stroke-width:1.4;opacity:.55}path.dot{fill:var(--c);fill-opacity:.55;stroke:var(--c)}
path.dot.on{fill-opacity:1}.leader{stroke:var(--soft);stroke-width:.7;opacity:.6}
text.label{fill:var(--c);font-weight:600;paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
.hot{cursor:default}.hot:hover .dot,.hot:focus .dot{stroke-width:3}
.dim{opacity:.12}
.keys{display:flex;flex-wrap:wrap;gap:4px 16px;list-style:none;margin:0 0 12px;padding:0;font-size:13px}
.keys i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px;background:var(--p)}
.bars rect{fill:var(--p)}.bars text{font-size:12.5px}.bars .bar-value{fill:var(--soft);
font-variant-numeric:tabular-nums}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(184px,1fr));gap:10px}
.cell{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:6px}
.panel-name{font-weight:600}g.others{stroke:var(--soft);stroke-opacity:.25}
.curve{stroke:var(--c);stroke-width:2;stroke-linejoin:round}.band{fill:var(--c);opacity:.22}
path.ideal{stroke:var(--soft);stroke-dasharray:3 3;opacity:.8}.panel circle{fill:var(--c);fill-opacity:.75}
.gap{stroke:var(--c);opacity:.45}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:8px 0 18px;font-size:14px}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
summary{cursor:pointer;padding:4px 0}details table{margin:0}
.failure{border-left:3px solid var(--bad);padding:2px 0 2px 12px;margin:6px 0}
pre{overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere;font-size:12px;background:var(--card);
border:1px solid var(--line);border-radius:6px;padding:8px}
footer{margin-top:48px;color:var(--soft);font-size:12px}a{color:var(--accent)}
#tip{position:fixed;z-index:9;max-width:280px;background:var(--ink);color:var(--bg);border-radius:6px;padding:6px 10px;
font-size:12.5px;line-height:1.4;white-space:pre-line;pointer-events:none;left:0;top:0}
@media (max-width:640px){main{padding:14px 14px 36px}header h1,section>h1{font-size:22px}.verdict{font-size:17px}
.cards{grid-template-columns:1fr 1fr;gap:8px}.card{padding:9px 10px}.card .big{font-size:18px}
.plots{grid-template-columns:1fr}figure{padding:4px}.panels{grid-template-columns:1fr 1fr;gap:8px}
input{width:100%;margin:4px 0 0}.tools label{flex:1 1 100%}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}
.bars text{font-size:12px}tr>th:first-child{min-width:132px;max-width:140px}}
@media print{@page{size:A4 landscape;margin:12mm}main{max-width:none;padding:0}.tools,#tip{display:none}
.scroll{overflow:visible;border:0}thead{display:table-row-group}table{font-size:8.5px}th small,.badge{font-size:7px}
th,td{padding:3px 4px}caption{font-size:8.5px}
th[aria-sort] button::after{content:""}.plots{grid-template-columns:repeat(3,1fr)}
.panels{grid-template-columns:repeat(6,1fr)}
figure,.cell,.card,tr,.verdict{break-inside:avoid}h2{break-after:avoid}tr>th:first-child{position:static}}
"""

SCRIPT = """
(() => {
  const all = (root, what) => [...root.querySelectorAll(what)];
  const tip = document.getElementById('tip');
  const show = (hot, x, y) => {
    tip.textContent = hot.getAttribute('aria-label');
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(6, Math.min(x + 14, innerWidth - box.width - 6)) + 'px';
    tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18) + 'px';
  };
  const hide = () => { tip.hidden = true; };
  all(document, 'g.hot').forEach(hot => {
    hot.addEventListener('pointermove', e => show(hot, e.clientX, e.clientY));
    hot.addEventListener('pointerleave', hide);
    hot.addEventListener('focus', () => { const r = hot.getBoundingClientRect(); show(hot, r.right, r.top); });
    hot.addEventListener('blur', hide);
  });
  addEventListener('scroll', hide, {passive: true});

  all(document, 'section.group').forEach(group => {
    const table = group.querySelector('table.results');
    if (!table) return;
    const body = table.tBodies[0], heads = all(table, 'thead th');
    heads.forEach((head, i) => head.firstElementChild.addEventListener('click', () => {
      const text = head.classList.contains('text'), first = head.dataset.first || 'ascending';
      const other = {ascending: 'descending', descending: 'ascending'};
      const order = head.getAttribute('aria-sort') === 'none' ? first : other[head.getAttribute('aria-sort')];
      heads.forEach(h => h.setAttribute('aria-sort', h === head ? order : 'none'));
      const sign = order === 'ascending' ? 1 : -1;
      const key = row => row.cells[i] ? row.cells[i].dataset.v : '';
      // Failures and missing values stay at the end, whichever way the column runs.
      const empty = row => row.classList.contains('failed') || !key(row);
      all(body, 'tr').sort((a, b) => empty(a) - empty(b) || (empty(a) ? 0 : sign * (text
        ? key(a).localeCompare(key(b)) : key(a) - key(b)))).forEach(row => body.append(row));
    }));

    const input = group.querySelector('input[type=search]'), chips = all(group, '.chip');
    const filter = () => {
      const words = input.value.toLowerCase().split(/\\s+/).filter(Boolean);
      const off = new Set(chips.filter(c => c.getAttribute('aria-pressed') === 'false').map(c => c.dataset.category));
      let shown = 0;
      all(body, 'tr').forEach(row => {
        row.hidden = off.has(row.dataset.category) || !words.every(word => row.dataset.find.includes(word));
        shown += !row.hidden;
      });
      group.querySelector('.none').hidden = shown > 0;
      all(group, '.hot, .label').forEach(hot => hot.classList.toggle('dim', off.has(hot.dataset.category)));
    };
    input.addEventListener('input', filter);
    chips.forEach(chip => chip.addEventListener('click', () => {
      chip.setAttribute('aria-pressed', String(chip.getAttribute('aria-pressed') === 'false'));
      filter();
    }));
  });
})();
"""
