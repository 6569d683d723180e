"""Tokenises a data set into a folder of checksummed shards that runs read: --data.path DIR, or --data.mixture DIR=0.7 …

    python -m experiments.prepare_data tinystories --out data/stories --tokenizer gpt2
    python -m experiments.prepare_data 'crawl/*.parquet' --out data/crawl --tokenizer tokenizer.json --column body
    python -m experiments.prepare_data chats.jsonl.gz --schema messages --template chatml --tokenizer runs/a --out chats
    python -m experiments.prepare_data fineweb-edu --out data/edu --tokenizer o200k_base --max-tokens 1e9

SOURCE is one of tinystories, fineweb-edu, slimpajama-6b, redpajama, openorca and ultrachat, which are streamed from the
Hugging Face hub (needs jaxlm[datasets]), or local: a .txt, .jsonl or .parquet, a folder of them, or a glob in quotes.
The same command goes on after a kill; the folder has its name once it is whole, and does not depend on --workers.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxlm.chat import open_template, template_for
from jaxlm.cli import main_guard, parse, say
from jaxlm.config import require
from jaxlm.data.folder import SPLITS
from jaxlm.data.prepare import SHARD_TOKENS, Done, Settings, write_dataset
from jaxlm.data.shards import read_meta
from jaxlm.data.sources import Source, open_source
from jaxlm.tokenizer import Tokenizer, open_tokenizer

LINES_EVERY = 10.0  # seconds between lines of progress where there is no terminal


@dataclass(frozen=True)
class Options:
    """Options of prepare_data."""

    source: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")
    ]  # a name or a path, as above
    out: str  # folder to write
    tokenizer: str  # a tokenizer.json or a folder that holds one; gpt2, cl100k_base, o200k_base
    # What rows mean; auto = as the source's name says, else text.
    schema: Literal["auto", "text", "openorca", "ultrachat", "messages"] = "auto"
    column: str = ""  # of jsonl and parquet that holds the text or the messages; '' = the schema's own
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"  # of local files; auto = by their names
    template: str = ""  # of conversations: chatml, llama3 or a file of Jinja; '' = the tokenizer's own
    val_fraction: float = 0.05  # documents held out (sources under 20 documents: last share of tokens)
    workers: int = 0  # processes that tokenise; 0 = one per core
    shard_tokens: int = SHARD_TOKENS  # tokens per file
    limit_documents: int = 0  # take so many documents; 0 = all
    max_tokens: float = 0  # stop after the document that reaches so many tokens; 0 = never
    config: str = ""  # part of a named source; '' = as in the table of docs/data.md
    split: str = ""  # split of a named source; '' = as in that table
    revision: str = ""  # version of a named source, '' = as in that table; a commit's hash makes it exact


def main(argv: list[str]) -> int:
    """Entry point."""
    options = parse(Options, argv, "python -m experiments.prepare_data", __doc__ or "")
    check(options)
    kind = None if options.format == "auto" else options.format
    source = open_source(
        options.source,
        "" if options.schema == "auto" else options.schema,
        options.column,
        kind,
        options.config,
        options.split,
        options.revision,
    )
    tokenizer, template = with_template(options, source)
    settings = Settings(
        options.val_fraction,
        shard_tokens=options.shard_tokens,
        limit_documents=options.limit_documents,
        max_tokens=int(options.max_tokens),
        workers=options.workers or len(os.sched_getaffinity(0)),
    )
    with Meter(source, settings) as meter:
        written = write_dataset(source, tokenizer, options.out, settings, template, progress=meter.show)
    describe(Path(options.out), written)
    return 0


def check(options: Options) -> None:
    """Refuses numbers that cannot be, before anything is read."""
    share = options.val_fraction
    require(0 < share < 1, f"--val-fraction {share} must be between 0 and 1")
    require(options.shard_tokens > 0, f"--shard-tokens {options.shard_tokens} must be positive")
    require(0 <= options.max_tokens < 2**62, f"--max-tokens {options.max_tokens} must not be negative")
    for name in ("workers", "limit_documents"):
        value = getattr(options, name)
        require(value >= 0, f"--{name.replace('_', '-')} {value} must not be negative")


def with_template(options: Options, source: Source) -> tuple[Tokenizer, str | None]:
    """The tokenizer, which holds the template if there is one, and the template if the source needs it."""
    tokenizer = open_tokenizer(options.tokenizer)
    if tokenizer.loss_note:
        say(f"warning: {tokenizer.loss_note}")
    if options.template:
        tokenizer = Tokenizer.of(tokenizer.codec, open_template(options.template))
    if not source.schema.chat:
        return tokenizer, None
    template = template_for(tokenizer)
    return Tokenizer.of(tokenizer.codec, template), template


class Meter:
    """Documents, tokens, tokens per second and the time left: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, source: Source, settings: Settings) -> None:
        from rich.console import Console

        self._source, self._settings = source, settings
        self._console = Console(stderr=True)
        self._bar: Any = None
        self._total: int | None = None
        self._started = self._said = time.monotonic()

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: Done) -> None:
        """How far it is."""
        now = time.monotonic()
        share, rate = self._share(done), (done.tokens - done.resumed) / max(1e-9, now - self._started)
        facts = f"{done.documents:,} documents, {done.tokens:,} tokens, {rate:,.0f} tokens/s"
        facts += self._left(done, share, now)
        if self._console.is_terminal:
            self._draw(facts, share)
        elif now - self._said >= LINES_EVERY:
            self._said = now
            say(facts)

    def _share(self, done: Done) -> float | None:
        """Of the work, as far as it is known: the limit that will be reached first."""
        if self._total is None:
            self._total = self._source.total or 0
        wanted = ((done.read, self._total), (done.documents, self._settings.limit_documents)) + (
            (done.tokens, self._settings.max_tokens),
        )
        shares = [have / total for have, total in wanted if total]
        return min(1.0, max(shares)) if shares else None

    def _left(self, done: Done, share: float | None, now: float) -> str:
        if not share:
            return ""
        here = share * (done.tokens - done.resumed) / max(1, done.tokens)  # of this process
        seconds = (1 - share) / max(here, 1e-9) * (now - self._started)
        return f", {duration(seconds)} left"

    def _draw(self, facts: str, share: float | None) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        if self._bar is None:
            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=None if share is None else 1.0)
            self._bar.start()
        self._bar.update(self._task, description=facts, completed=share or 0.0)


def duration(seconds: float) -> str:
    """As 2 h 05 min, 3 min 20 s or 12 s."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{minutes} min {s:02d} s" if minutes else f"{s} s"


def describe(out: Path, written: bool) -> None:
    """What the folder holds, on standard output."""
    parts = []
    for split in SPLITS:
        meta = read_meta(out / split)
        parts.append(f"{split} {meta['tokens']:,} tokens of {meta['documents']:,} documents")
    known = "" if written else " (as before)"
    print(f"{out}: {', '.join(parts)}{known}; train with --data.path {out}")


if __name__ == "__main__":
    main_guard(main)
