"""Trains a tokenizer on texts and writes tokenizer.json, with the chat template beside it.

    python -m experiments.train_tokenizer corpus.jsonl --vocab-size 64000 --out tok/tokenizer.json
    python -m experiments.train_tokenizer stories/ --vocab-size 16384 --kind tfm --template llama3 --max-mb 500

SOURCE is what prepare_data takes: tinystories, fineweb-edu, slimpajama-6b, redpajama, openorca or ultrachat, or a file,
folder or glob of text, jsonl or parquet; '' is Python's standard library. Kinds: gpt4 is byte-level BPE split as GPT-4
does, tfm is NFD, Metaspace and Punctuation. The special tokens are bos, eos, pad, <think>, </think> and those that the
template writes. The same texts make the same file, byte for byte.

What was learned is measured on the first texts: bytes per token, unused ids, and what does not come back as it was.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.cli import main_guard, parse, say
from jaxlm.chat import open_template, special_tokens
from jaxlm.config import ConfigError, InputError, nearest
from jaxlm.data.blocks import BLOCK_BYTES, rows
from jaxlm.data.corpus import is_validation, open_corpus
from jaxlm.data.sources import Source, open_source
from jaxlm.tokenizer import KINDS, Tokenizer, template_file

EVERY = 5.0  # seconds between lines of progress
MEASURED = 8 << 20  # characters of text to measure on


@dataclass(frozen=True)
class TrainTokenizerOptions:
    """Options of the training of a tokenizer."""

    source: Annotated[
        str, tyro.conf.Positional
    ]  # file, directory or glob of texts; '' = the standard library
    vocab_size: int  # number of ids, special tokens included
    kind: str = "gpt4"  # gpt4 or tfm
    out: str = "tokenizer.json"  # file to write
    template: str = "chatml"  # chat template: chatml, llama3 or a file of Jinja
    special: tyro.conf.UseAppendAction[
        tuple[str, ...]
    ] = ()  # another special token; may be given several times
    schema: Literal["", "text", "openorca", "ultrachat", "messages"] = ""  # of rows; '' = the source's own
    column: str = ""  # of jsonl and parquet; '' = the schema's own
    max_documents: int = 0  # read at most so many; 0 = all
    max_mb: float = 0.0  # stop after the document that reaches so many megabytes of text; 0 = never
    val_fraction: float = 0.0  # leave out the documents that a preparation with this share holds out
    overwrite: bool = False  # take the place of a tokenizer that is there already


class Texts:
    """The texts to learn from, in pieces; may be read again. The first ones are kept to measure on.

    Raises DataError while it is read, also where there is no text at all.
    """

    def __init__(self, source: Source, options: TrainTokenizerOptions) -> None:
        self._source, self._options = source, options
        self.documents, self.bytes = 0, 0
        self.sample: list[str] = []

    def __iter__(self) -> Iterator[str]:
        self.documents, self.bytes, self.sample = 0, 0, []
        kept, said = 0, time.monotonic()
        for text, is_new in self._chosen():
            self.documents += is_new
            self.bytes += len(text.encode("utf-8", "surrogatepass"))
            if kept < MEASURED:
                self.sample.append(text)
                kept += len(text)
            yield text
            if time.monotonic() - said >= EVERY:
                said = time.monotonic()
                say(f"read {self.documents:,} documents, {self.bytes / 1e6:,.0f} MB")
        if not self.documents:
            raise self._source.empty()
        say(f"read {self.documents:,} documents, {self.bytes / 1e6:,.1f} MB; learning")

    def _chosen(self) -> Iterator[tuple[str, bool]]:
        """(piece of a text, whether it begins a document) up to the limits."""
        options, index, taken, wanted = self._options, -1, 0, False
        for block in self._source.blocks({}, BLOCK_BYTES):
            for row in rows(block, self._source.schema.columns):
                text = self._source.schema.text(row)
                if not text:
                    continue
                if not row.continues:
                    index += 1
                    full = options.max_mb and self.bytes >= options.max_mb * 1e6
                    if full or (options.max_documents and taken >= options.max_documents):
                        return
                    wanted = not (options.val_fraction and is_validation(index, options.val_fraction))
                    taken += wanted
                if wanted:
                    yield text, not row.continues


def main(argv: list[str]) -> int:
    """Entry point."""
    options = parse(TrainTokenizerOptions, argv, "python -m experiments.train_tokenizer", __doc__ or "")
    _check(options)
    out = Path(options.out)
    out = out / "tokenizer.json" if out.is_dir() else out
    for path in (out, template_file(out)):
        if path.exists() and not options.overwrite:
            raise ConfigError(f"{path} is there already; choose another --out, or pass --overwrite")
    template = open_template(options.template)
    texts = Texts(_source(options), options)
    specials = special_tokens(template, options.special)
    tokenizer = Tokenizer.train(texts, options.vocab_size, options.kind, specials, template)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(out)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from None
    measure(tokenizer, texts)
    say(f"written to {out}, its chat template to {template_file(out)}")
    return 0


def _source(options: TrainTokenizerOptions) -> Source:
    return open_source(options.source, options.schema, options.column) if options.source else open_corpus("")


def _check(options: TrainTokenizerOptions) -> None:
    if options.kind not in KINDS:
        known = ", ".join(KINDS)
        raise ConfigError(f"unknown kind {options.kind!r}{nearest(options.kind, KINDS)}; known are {known}")
    for name in ("max_documents", "max_mb"):
        if not getattr(options, name) >= 0:
            raise ConfigError(f"{name}={getattr(options, name)} must not be negative")
    if not 0 <= options.val_fraction < 1:
        raise ConfigError(f"val_fraction={options.val_fraction} must be at least 0 and below 1")


def measure(tokenizer: Tokenizer, texts: Texts) -> None:
    """Says what does not come back; prints what was learned as one line of NAME=VALUE."""
    ids = tokenizer.encode_batch(texts.sample)
    size = sum(len(text.encode("utf-8", "replace")) for text in texts.sample)
    tokens = sum(map(len, ids))
    say(f"special tokens: {' '.join(t for t in tokenizer.specials if not t.startswith('<|unused_'))}")
    if tokenizer.n_unused:
        say(
            f"the text fills {tokenizer.vocab_size - tokenizer.n_unused:,} ids; {tokenizer.n_unused:,} stay unused"
        )
    if tokenizer.loss_note:
        say(f"warning: {tokenizer.loss_note}")
    changed = [(number, lost) for number, text in enumerate(texts.sample) if (lost := tokenizer.losses(text))]
    if changed:
        number, lost = changed[0]
        say(f"{len(changed):,} of {len(texts.sample):,} texts change; first text {number:,}, {lost}")
    facts = {
        "vocab_size": tokenizer.vocab_size,
        "unused": tokenizer.n_unused,
        "documents": texts.documents,
        "bytes": texts.bytes,
        "bytes_per_token": f"{size / max(tokens, 1):.4f}",
        "measured_bytes": size,
        "changed_texts": len(changed),
        "fingerprint": tokenizer.fingerprint(),
    }
    print(" ".join(f"{name}={value}" for name, value in facts.items()))


if __name__ == "__main__":
    main_guard(main)
