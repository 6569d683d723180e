"""A parity report as files: report.json for programs, report.md and report.html for people, figures where they can be.

Both texts are made of the same parts (verdict, boxes, sections), which are made of the JSON alone. report.html is one
file that needs nothing else: figures inside, no script, light and dark as the reader's system is.
"""

import base64
import html
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.parity.limits import LIMITS
from convert.parity.results import Report
from jaxlm.disk import replace_text

FAILURES = 12  # failing findings of one rung that the texts list
CAPTIONS = {
    "activations": "Error of every activation in the order of the forward pass",
    "gradients": "Error of every gradient in the order of the backward pass",
    "rungs": "Headroom of every rung: from its worst value to its limit",
    "trajectory": "Losses of both frameworks over training steps, and their relative difference",
    "faults": "Planted faults by kind and by the rung that caught them",
}
Data = dict[str, Any]


class Code(str):
    """A name or a number as a program writes it."""


class Bad(str):
    """A verdict or value that failed."""


class Section(NamedTuple):
    """A heading with a sentence, a table and a list; any of them may be empty."""

    title: str
    lead: str = ""
    columns: tuple[str, ...] = ()
    rows: Sequence[Sequence[str]] = ()
    items: Sequence[str] = ()


class Box(NamedTuple):
    """A divergence: where, what the values are, what may be behind it."""

    title: str
    fields: Mapping[str, str]
    causes: Sequence[str]


class Figure(NamedTuple):
    """A drawn file with its caption."""

    caption: str
    path: Path


def write_report(report: Report, directory: Path) -> None:
    """Writes report.json, plots/*.png, report.md and report.html into a directory, which is created.

    Each file appears whole or not at all. Without matplotlib there are no figures, and the texts say so. Raises
    OSError where the directory cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = plain(report.to_json())
    replace_text(directory / "report.json", json.dumps(data, indent=2, allow_nan=False) + "\n")
    figures, missing = _figures(directory)
    replace_text(directory / "report.md", markdown(data, figures, missing))
    replace_text(directory / "report.html", page(data, figures, missing))


def plain(value: Any) -> Any:
    """Only what JSON has: numpy's scalars as Python's, infinity and NaN spelled, other objects as their text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _figures(directory: Path) -> tuple[list[Figure], str]:
    """The figures, or why there are none; those of an earlier report are removed."""
    from jaxlm.plots import PlotError
    from jaxlm.plots_parity import plot_parity

    for name in CAPTIONS:
        (directory / "plots" / f"{name}.png").unlink(missing_ok=True)
    try:
        return [Figure(CAPTIONS[path.stem], path) for path in plot_parity(directory)], ""
    except PlotError as error:
        return [], f"No figures: {error}."


def number(value: Any) -> str:
    """1.2e-15; integers, truth and text as they are."""
    if value in ("inf", "-inf"):
        return str(value).replace("inf", "∞")
    if isinstance(value, float):
        if value == 0:
            return "0"
        return f"{value:.1e}" if not 0.01 <= abs(value) < 10_000 else f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(number, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {number(item)}" for key, item in value.items())
    return "-" if value is None else str(value)


def verdict(data: Data) -> tuple[str, str, str]:
    """AGREE or DISAGREE, the sentence, and what it took."""
    word = "AGREE" if data["passed"] else "DISAGREE"
    rungs = data["rungs"]
    failed = sum(not rung["passed"] for rung in rungs)
    does = "agree" if data["passed"] else "disagree"
    sentence = f"{data['target']} (JAX) and {data['against']} (PyTorch) {does} in {data['dtype']}."
    compared = sum(rung["compared"] for rung in rungs)
    outcome = f"{len(rungs) - failed} of {len(rungs)} rungs passed, {compared:,} comparisons"
    return word, sentence, f"{outcome}, {data['seconds']:.0f} seconds, computed in {data['dtype']}."


def boxes(data: Data) -> list[Box]:
    """The first divergence, then where forward and backward pass part, as far as that is another place."""
    first = data.get("first_divergence")
    found = [("First divergence", first)] if first else []
    ways = data.get("divergences", {})
    found += [(f"First divergence {way}", ways[way]) for way in ("forward", "backward") if way in ways]
    made = []
    for title, place in found:
        same = title != "First divergence" and place == first
        made.append(Box(title, {"the same as": "the first divergence"}, ()) if same else _box(title, place))
    return made


def _box(title: str, place: Data) -> Box:
    detail = dict(place["detail"])
    guess = detail.pop("looks_like", None)
    fields = {
        "rung": Code(place["rung"]) + (f" ({place['case']} weights)" if place["case"] else ""),
        "layer": "none" if place["layer"] is None else str(place["layer"]),
        "operation": Code(place["operation"]),
        "tensor": Code(place["name"]),
        "error": Bad(number(place["value"])),
        "limit": number(place["limit"]),
    }
    fields |= {"looks like": str(guess)} if guess else {}
    # Of single values a person wants all digits.
    fields |= {
        key.replace("_", " "): Code(repr(value) if isinstance(value, float) else number(value))
        for key, value in detail.items()
    }
    return Box(title, fields, [cause for cause in place["causes"] if cause != guess])


def sections(data: Data) -> list[Section]:
    """Everything below verdict, boxes and figures, in reading order; without those that are empty."""
    parts = [
        _rungs(data["rungs"]),
        _failures(data["rungs"]),
        *_self_test(data),
        _random(data),
        *_ledger(data["ledger"]),
        _inputs(data),
        Section("Blind spots", "What this configuration cannot show.", items=data["blind_spots"]),
        Section(
            "Gradients that are zero by mathematics",
            "Judged by their size alone, since rounding is all there is of them.",
            items=[Code(name) for name in data["zero_gradients"]],
        ),
        _flips(data["inputs"]),
        _notes(data["rungs"]),
        _limits(data),
    ]
    return [part for part in parts if part.rows or part.items]


def _rungs(rungs: list[Data]) -> Section:
    rows = [
        (
            Code(rung["name"]),
            rung["case"] or "-",
            "pass" if rung["passed"] else Bad("FAIL"),
            number(rung["value"]) if rung["passed"] else Bad(number(rung["value"])),
            number(rung["limit"]),
            _below(rung),
            str(rung["compared"]),
            Code(rung["worst"]),
            number(float(rung["seconds"])),
        )
        for rung in rungs
    ]
    columns = (
        *("rung", "weights", "verdict", "worst value", "limit", "orders of magnitude below the limit"),
        *("compared", "worst tensor", "seconds"),
    )
    lead = (
        "In order of blame: what fails first explains what fails after it. Values are relative errors"
        " unless the limit's reason says otherwise."
    )
    return Section("Rungs", lead, columns, rows)


def _below(rung: Data) -> str:
    value, limit = float(rung["value"]), float(rung["limit"])
    if value == 0:
        return "exact"
    if limit == 0 or not math.isfinite(value):
        return "over"
    return f"{math.log10(limit / value):.1f}"


def _failures(rungs: list[Data]) -> Section:
    rows, left_out = [], 0
    for rung in rungs:
        failed = [finding for finding in rung["findings"] if not finding["passed"]]
        left_out += max(0, len(failed) - FAILURES)
        for finding in failed[:FAILURES]:
            detail = finding.get("detail", {})
            told = detail.get("looks_like") or detail.get("error") or ""
            rows.append(
                (
                    Code(rung["name"]),
                    rung["case"] or "-",
                    Code(finding["name"]),
                    Bad(number(finding["value"])),
                    number(finding["limit"]),
                    number(detail.get("jax")),
                    number(detail.get("torch")),
                    str(told),
                )
            )
    lead = "In the order of execution" + (f"; {left_out} more are in report.json." if left_out else ".")
    columns = ("rung", "weights", "tensor", "error", "limit", "jax", "torch", "looks like")
    return Section("What is over its limit", lead, columns, rows)


def _self_test(data: Data) -> list[Section]:
    if "faults" not in data:
        return []
    faults: list[Data] = data["faults"]
    alarms = list(data.get("false_alarms", []))
    rows = []
    for kind in dict.fromkeys(fault["kind"] for fault in faults):
        own = [fault for fault in faults if fault["kind"] == kind]
        caught = [fault for fault in own if fault["caught"]]
        located = sum(bool(fault.get("located")) for fault in caught)
        by = Counter(str(fault["caught_by"]) for fault in caught)
        all_caught = len(caught) == len(own)
        rows.append(
            (
                kind,
                str(len(own)),
                str(len(caught)) if all_caught else Bad(str(len(caught))),
                str(located) if located == len(own) else Bad(str(located)),
                ", ".join(f"{rung} {count}" for rung, count in by.items()),
            )
        )
    total = sum(bool(fault["caught"]) for fault in faults)
    lead = f"{total} of {len(faults)} planted faults caught, {len(alarms)} false alarms."
    columns = ("kind of fault", "planted", "caught", "located", "caught by rung")
    missed = [
        (
            Code(fault["name"]),
            fault["kind"],
            "caught, not located" if fault["caught"] else Bad("not caught"),
            Code(fault.get("expected") or "-"),
            Code(fault.get("found") or fault.get("caught_by") or "-"),
            str(fault.get("error") or ""),
        )
        for fault in faults
        if not (fault["caught"] and fault.get("located", True))
    ]
    return [
        Section("Self-test: planted faults", lead, columns, rows),
        Section(
            "Self-test: faults that were missed or misplaced",
            columns=("fault", "kind", "outcome", "expected", "found", "error"),
            rows=missed,
        ),
        Section("Self-test: false alarms", items=[Code(name) for name in alarms]),
        Section("Self-test: problems", items=[str(line) for line in data.get("problems", [])]),
    ]


def _random(data: Data) -> Section:
    found = data.get("random", {})
    failures = found.get("failures", [])
    count = failures if isinstance(failures, int) else len(failures)
    items = [f"{key.replace('_', ' ')}: {number(value)}" for key, value in found.items() if key != "failures"]
    if found:
        items.insert(0, Bad(f"failures: {count}") if count else "failures: 0")
    if not isinstance(failures, int):
        items += [Code(number(failure)) for failure in failures]
    return Section("Random configurations", items=items)


def _ledger(ledger: Data) -> list[Section]:
    shared = [(key.replace("_", " "), number(v)) for key, v in ledger.items() if not isinstance(v, dict)]
    ours, theirs = ledger.get("jax", {}), ledger.get("torch", {})
    sides = [
        (key.replace("_", " "), number(ours[key]) if key in ours else "", number(theirs.get(key, "")))
        for key in dict.fromkeys([*ours, *theirs])
    ]
    return [
        Section(
            "Precision ledger", "What was computed in which dtype.", ("part", "dtype or setting"), shared
        ),
        Section("Both sides", columns=("setting", "jax", "torch"), rows=sides),
    ]


def _inputs(data: Data) -> Section:
    rows = [
        (key.replace("_", " "), number(value))
        for key, value in data["inputs"].items()
        if not key.startswith("flips_")
    ]
    return Section("Inputs and settings", columns=("input", "value"), rows=rows)


def _flips(inputs: Data) -> Section:
    found = {key.removeprefix("flips_"): v for key, v in inputs.items() if key.startswith("flips_")}
    rows = [
        (case, number(counts["decisions"]), number(counts.get("jax")), number(counts.get("torch")))
        for case, counts in found.items()
        if counts
    ]
    lead = "Choices of experts that differ from float64's where routing is not replayed; shown, not judged."
    columns = ("weights", "decisions of the router", "flipped in jax", "flipped in torch")
    return Section("Flipped experts", lead, columns, rows)


def _notes(rungs: list[Data]) -> Section:
    rows = [
        (Code(rung["name"]), rung["case"] or "-", key.replace("_", " "), number(value))
        for rung in rungs
        for key, value in rung["notes"].items()
    ]
    return Section("Notes", "Shown, not judged.", ("rung", "weights", "what", "value"), rows)


def _limits(data: Data) -> Section:
    used = {finding["limit"] for rung in data["rungs"] for finding in rung["findings"]}
    others = {"float64", "float32", "bfloat16"} - {data["dtype"]}
    rows = [
        (Code(name), number(limit.value), limit.reason)
        for name, limit in LIMITS.items()
        if limit.value in used and (name.partition("_")[0] not in others or name == "float64_scalar")
    ]
    return Section("Limits and their reasons", columns=("limit", "value", "reason"), rows=rows)


def markdown(data: Data, figures: Sequence[Figure] = (), missing: str = "") -> str:
    """The report as Markdown; figures are links to their files."""
    word, sentence, took = verdict(data)
    lines = [f"# Parity: {word}", "", f"{_md(sentence)} {_md(took)}", ""]
    for box in boxes(data):
        lines += [f"## {box.title}", ""]
        lines += [f"- {_md(key)}: {_md(value)}" for key, value in box.fields.items()]
        lines += [f"- likely: {_md(cause)}" for cause in box.causes] + [""]
    drawn = [f"![{figure.caption}](plots/{figure.path.name})" for figure in figures]
    shown = [f"{line}\n" for line in drawn] or ([_md(missing), ""] if missing else [])
    for place, part in enumerate(sections(data)):
        lines += [f"## {part.title}", ""] + ([_md(part.lead), ""] if part.lead else [])
        if part.rows:
            lines += [" | ".join(["", *map(_md, row), ""]).strip() for row in (part.columns,)]
            lines.append("|" + " --- |" * len(part.columns))
            lines += [" | ".join(["", *map(_md, row), ""]).strip() for row in part.rows] + [""]
        if part.items:
            lines += [f"- {_md(item)}" for item in part.items] + [""]
        if place == 0:
            lines += shown
            shown = []
    return "\n".join(lines + shown).rstrip() + "\n"


def _md(text: str) -> str:
    """A piece of Markdown that is only text: no tag, no cell border, no line break of its own."""
    one_line = " ".join(text.split()).replace("|", "\\|")
    if isinstance(text, Code):
        return f"`{one_line.replace('`', chr(39))}`"
    for sign in "`*_[]":
        one_line = one_line.replace(sign, f"\\{sign}")
    one_line = html.escape(one_line, quote=False)
    return f"**{one_line}**" if isinstance(text, Bad) else one_line


def page(data: Data, figures: Sequence[Figure] = (), missing: str = "") -> str:
    """The report as one HTML file that refers to nothing outside."""
    word, sentence, took = verdict(data)
    mood = "good" if data["passed"] else "bad"
    body = [
        f'<header class="{mood}"><h1>{word}</h1>',
        f"<p>{_html(sentence)}</p><p>{_html(took)}</p></header>",
    ]
    body += [_html_box(box) for box in boxes(data)]
    drawn = [_html_figure(figure) for figure in figures] or ([f"<p>{_html(missing)}</p>"] if missing else [])
    parts = [_html_section(part) for part in sections(data)]
    body += [*parts[:1], *drawn, *parts[1:]]
    title = _html(f"Parity of {data['target']}: {word}")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{CSS}</style></head>\n<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def _html(text: str) -> str:
    safe = html.escape(text)
    if isinstance(text, Code):
        return f"<code>{safe}</code>"
    return f'<strong class="bad">{safe}</strong>' if isinstance(text, Bad) else safe


def _html_box(box: Box) -> str:
    fields = "".join(f"<dt>{_html(key)}</dt><dd>{_html(value)}</dd>" for key, value in box.fields.items())
    causes = "".join(f"<li>{_html(cause)}</li>" for cause in box.causes)
    likely = f"<p>Likely causes</p><ul>{causes}</ul>" if causes else ""
    return f'<section class="box"><h2>{_html(box.title)}</h2><dl>{fields}</dl>{likely}</section>'


def _html_figure(figure: Figure) -> str:
    image = base64.b64encode(figure.path.read_bytes()).decode("ascii")
    caption = _html(figure.caption)
    drawn = f'<img alt="{caption}" src="data:image/png;base64,{image}">'
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def _html_section(part: Section) -> str:
    text = f"<section><h2>{_html(part.title)}</h2>" + (f"<p>{_html(part.lead)}</p>" if part.lead else "")
    if part.rows:
        head = "".join(f'<th scope="col">{_html(name)}</th>' for name in part.columns)
        rows = "".join("<tr>" + "".join(f"<td>{_html(c)}</td>" for c in row) + "</tr>\n" for row in part.rows)
        text += (
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'
        )
    if part.items:
        text += "<ul>" + "".join(f"<li>{_html(item)}</li>" for item in part.items) + "</ul>"
    return text + "</section>"


CSS = """
:root { color-scheme: light dark; --back: #fbfbfc; --text: #1b1f24; --muted: #5b6572; --line: #dde1e6;
  --card: #ffffff; --good: #0b6e4f; --bad: #b3132b; --bad-back: #fdeef0; --code: #eef0f3; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --text: #e6e9ee; --muted: #9aa4b2; --line: #2b313a;
  --card: #1a1e25; --good: #5fd0a5; --bad: #ff7b89; --bad-back: #2c1a1f; --code: #232932; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
header { border-left: .5rem solid; padding: .25rem 1.25rem; margin-bottom: 2rem; }
header.good { border-color: var(--good); } header.bad { border-color: var(--bad); }
header.good h1 { color: var(--good); } header.bad h1 { color: var(--bad); }
h1 { margin: 0; font-size: 2.4rem; letter-spacing: .04em; }
header p { margin: .2rem 0; } header p + p { color: var(--muted); }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
.box { background: var(--bad-back); border: 1px solid var(--bad); border-radius: .5rem; padding: .25rem 1.25rem .75rem;
  margin: 0 0 1.25rem; }
.box h2 { margin-top: .75rem; } .box p { margin: .75rem 0 0; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: .25rem 0; padding-left: 1.25rem; } li { overflow-wrap: anywhere; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 600; } tbody tr:last-child td { border-bottom: 0; }
code { font: .86em ui-monospace, monospace; background: var(--code); padding: .08em .3em; border-radius: .25em; }
.bad { color: var(--bad); }
figure { margin: 1.75rem 0; } img { width: 100%; height: auto; border-radius: .5rem; }
figcaption { color: var(--muted); font-size: .9rem; margin-top: .35rem; }
"""
