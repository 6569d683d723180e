"""The report of an ablation: as JSON, as a table on a terminal and in Markdown, and as a figure."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.cli import say
from jaxlm.config import to_dict
from jaxlm.metrics import perplexity, short
from jaxlm.model_dir import write_json
from jaxlm.variants import Axis, Variant, shown

if TYPE_CHECKING:
    from jaxlm.ablation import Outcome

SCHEMA = 1
REPORT, TABLE = "ablation.json", "ablation.md"
DEFINITIONS = {
    "loss": "cross-entropy of the last training step, nats per token",
    "val_loss": "mean cross-entropy on the validation batches, nats per token, computed the variant's way",
    "change": "val_loss less the baseline's",
    "tokens_per_second": "tokens of a step / median seconds of a step, its result waited for; compilation apart",
    "weight_bytes": "weights as served: cast to the dtype of the computation, quantised if asked",
    "temporary_bytes": "memory of a training step beside weights, moments and batch, as the compiler says",
    "activations": "the baseline's trained weights, computed the variant's way on one validation batch: "
    "||variant - baseline|| / ||baseline|| of what each module gives, over the valid tokens",
    "rerouted": "share of the choices of an expert that the baseline did not make, of the same weights on that batch",
    "weight_errors": "||quantised - original|| / ||original|| of each weight that is quantised",
    "distances": "||variant's trained weights - baseline's|| / ||baseline's|| by layer, where shapes agree",
    "trained_as": "number (from 0) of the variant whose training this is: variants that train alike share one",
    "started_alike": "tensors that began as the baseline's: same path and shape, and no other seed or initialisation",
}


def describe(
    options: dict[str, Any], axes: Sequence[Axis], variants: Sequence[Variant], outcomes: Sequence["Outcome"]
) -> dict[str, Any]:
    """The report: everything that was told and measured, as JSON; what is not finite is null."""
    rows = []
    for variant, outcome in zip(variants, outcomes, strict=True):
        row: dict[str, Any] = {"label": variant.label, "settings": variant.settings}
        row |= {"trained_as": outcome.trained_as, "val_loss": outcome.val_loss}
        row |= {"perplexity": perplexity(outcome.val_loss), "change": outcome.val_loss - outcomes[0].val_loss}
        if (trained := outcome.trained) is not None:
            tokens = variant.run.train.batch_size * variant.run.train.seq_len
            row |= {"loss": trained.losses[-1], "tokens_per_second": tokens / trained.step_seconds}
            row |= {name: value for name, value in trained._asdict().items() if name != "params"}
        row |= {
            name: getattr(outcome, name)
            for name in ("weight_bytes", "activations", "rerouted", "weight_errors")
        }
        rows.append(row | {"distances": outcome.distances, "config": to_dict(variant.run)})
    return {
        "schema": SCHEMA,
        "base": options["base"],
        "options": options,
        "axes": {axis.name: list(axis.values) for axis in axes},
        "definitions": DEFINITIONS,
        "variants": _finite(rows),
    }


COLUMNS = {  # heading -> how a variant's entry is written
    "train loss": lambda row: _number(row.get("loss"), ".4f"),
    "val loss": lambda row: _number(row["val_loss"], ".4f"),
    "change": lambda row: _number(row["change"], "+.2g"),
    "perplexity": lambda row: _number(row["perplexity"], ".5g"),
    "tok/s": lambda row: _size(row.get("tokens_per_second")),
    "compile": lambda row: _number(row.get("compile_seconds"), ".1f", " s"),
    "weights": lambda row: _size(row["weight_bytes"], "B"),
    "temporary": lambda row: _size(row.get("temporary_bytes"), "B"),
    "logits' error": lambda row: _number((row["activations"] or {}).get("logits"), ".1e"),
    "rerouted": lambda row: _share(row.get("rerouted")),
    "weights apart": lambda row: _number((row["distances"] or {}).get("all"), ".1e"),
}


def table(report: dict[str, Any]) -> list[list[str]]:
    """Headings, then a row for each variant; what no variant has gets no column."""
    rows, varying = report["variants"], [name for name, values in report["axes"].items() if len(values) > 1]
    columns = [[name, *(shown(row["settings"][name]) for row in rows)] for name in varying]
    columns += [[name, *(text(row) for row in rows)] for name, text in COLUMNS.items()]
    return [list(line) for line in zip(*(c for c in columns if set(c[1:]) != {"–"}), strict=True)]


def show(report: dict[str, Any]) -> None:
    """The table on standard output; a block for each variant where the terminal is too narrow for it."""
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    headings, *rows = table(report)
    told = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    varying = sum(len(values) > 1 for values in report["axes"].values())
    for i, heading in enumerate(headings):
        told.add_column(heading, justify="left" if i < varying else "right", no_wrap=True)
    for row in rows:
        told.add_row(*row)
    console = Console(highlight=False)
    needed = Measurement.get(console, console.options.update(max_width=10_000), told).maximum
    if needed <= console.width or not console.is_terminal:
        Console(highlight=False, width=max(needed, console.width)).print(told)
        return
    for row in rows:
        lines = [f"  {heading:<14}{entry}" for heading, entry in zip(headings, row, strict=True)]
        console.print("\n".join([*lines, ""]), soft_wrap=True)


def write(out: Path, report: dict[str, Any]) -> None:
    """ablation.json, ablation.md and, where matplotlib is installed, ablation.png."""
    from jaxlm.plots import PlotError
    from jaxlm.plots_ablation import plot_ablation

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / REPORT, report)
    headings, *rows = table(report)
    lines = [f"# Ablation of {report['base']}", "", _about(report), "", _line(headings)]
    lines += ["|" + "---|" * len(headings), *map(_line, rows), ""]
    (out / TABLE).write_text("\n".join(lines), encoding="utf-8")
    written = [out / REPORT, out / TABLE]
    try:
        written += plot_ablation(out)
    except PlotError as error:
        say(f"note: {error}")
    say(f"wrote {', '.join(map(str, written))}")


def _about(report: dict[str, Any]) -> str:
    first, data = report["variants"][0], report["data"]
    done = f"{len(first['losses'])} steps each" if "losses" in first else "stored weights, nothing trained"
    return (
        f"Baseline {first['label']}; {done}; {data['validation_batches']} validation batches of "
        f"{data['path'] or 'the default corpus'}; {', '.join(report['environment']['devices'])}."
    )


def _line(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entries)} |"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _share(shares: dict[str, float] | None) -> str:
    return f"{sum(shares.values()) / len(shares):.2%}" if shares else "–"


def _size(value: float | None, unit: str = "") -> str:
    return "–" if value is None else short(value) + unit


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
