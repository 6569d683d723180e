"""Loss, perplexity and bits per byte of a trained model on texts; every token is scored once, by strided windows.

    python -m experiments.evaluate runs/quickstart --data notes.txt corpus.jsonl --stride 64
    python -m experiments.evaluate model-dir --text "The quick brown fox" --framework torch --dtype float64

A window reads --window tokens; each but the first scores its last --stride, so a token has at least window - stride
tokens of context. The table goes to standard output and ends in one line of NAME=VALUE. With --out, or for a run, a
directory gets evaluation.json and loss_by_position.png. With --quant each layer's error is shown too, and
the perplexity in bfloat16. TARGET is a run, a model directory with its tokenizer or .gguf.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from convert.targets import open_target
from experiments.cli import main_guard, parse, say
from experiments.loading import (
    Dtype,
    Framework,
    Front,
    Quant,
    TargetPath,
    check_place,
    devices,
    front_id,
    load_model,
    precision,
    print_any_name,
)
from experiments.quant_report import quant_report, show_quant
from jaxlm.config import ConfigError, ModelConfig
from jaxlm.data.corpus import Document, open_corpus
from jaxlm.model_dir import write_json
from jaxlm.perplexity import Total, by_position, total, totals
from jaxlm.run_dir import environment
from jaxlm.tokenizer import Tokenizer
from jaxlm.windows import Scores

Words = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]  # of each time that the option stands there
SHOWN = 3  # documents with the highest and with the lowest loss
SCHEMA = 1
DEFINITIONS = {
    "loss": "mean of -ln p(token | context) over scored tokens, in nats",
    "perplexity": "exp(loss)",
    "bits_per_byte": "sum of -log2 p over scored tokens / UTF-8 bytes that these tokens stand for",
    "accuracy": "share of scored tokens that were the most likely one",
    "context": "a scored token has at least window - stride tokens of context, or all that the document has",
    "loss_by_position": "by the number of tokens that were read before the one predicted",
}


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of evaluation."""

    target: TargetPath  # run, model directory or .gguf
    data: Words = ()  # text files, .jsonl, .parquet, or directories of them; each text is a document
    text: Words = ()  # texts themselves, each a document; one that begins with - as --text=-x
    window: int | None = None  # tokens that the model reads at once; left out = its context
    stride: int | None = None  # tokens that each window but the first scores; left out = half the window
    batch_size: int = 8  # windows computed together; no result depends on it
    framework: Framework = "jax"  # which of the two models computes
    dtype: Dtype = "float32"  # of the computation
    quant: Quant = "none"  # weights rounded to this before anything is computed
    front: Front = "auto"  # token before a document; auto = bos where texts start with it, else eos
    column: str = "text"  # key of the text in jsonl and parquet
    max_tokens: int = 0  # stop after so many tokens; 0 = all
    checkpoint: Literal["latest", "best"] = "latest"  # of a run: newest, or lowest validation loss
    out: str = ""  # directory of evaluation.json and the figure; '' = TARGET/evaluation of a run, else none


def main(argv: list[str]) -> int:
    """Entry point."""
    options = parse(EvaluateOptions, argv, "python -m experiments.evaluate", __doc__ or "")
    print_any_name()
    target = open_target(options.target, options.checkpoint, optimizer=False)
    directory = Path(options.out) if options.out else target.path / "evaluation" if target.run else None
    if directory is not None:
        check_place(directory, directory=True)
    window, stride = window_and_stride(options, target.config)
    names, documents = encode(read(options), target.tokenizer, options.max_tokens)
    front = front_id(target, options.front)
    with precision(options.framework, options.dtype):
        model = load_model(target, options.framework, options.dtype, options.quant)
        scores = compute(model, options, documents, window, stride, front)
        lengths = target.tokenizer.byte_lengths()
        overall, each = total(scores, documents, lengths), totals(scores, documents, lengths)
        cost = None
        if options.quant != "none" and overall.tokens:
            cost = quant_report(
                target,
                options.framework,
                options.quant,
                lambda m: total(compute(m, options, documents, window, stride, front), documents, lengths),
            )
    if not overall.tokens:
        raise ConfigError(
            f"nothing could be scored: {len(documents)} document(s) of fewer than 2 tokens and no token in front; "
            "give longer texts or --front eos"
        )
    if not math.isfinite(overall.loss):
        say("warning: the loss is not finite: the model gives NaN or infinite logits")
    facts = {
        "target": str(target.path.absolute()),
        "options": dataclasses.asdict(options)
        | {"window": window, "stride": stride, "data": flat(options.data), "text": flat(options.text)},
        "front": front,
        "definitions": DEFINITIONS,
    }
    show(overall, each, names, facts)
    if cost is not None:
        show_quant(cost, overall)
        facts["quantisation"] = {"weights": cost.weights, "bfloat16": _finite(cost.bfloat16._asdict())}
    if directory is not None:
        write(directory, scores, overall, each, names, facts | about(options))
    print(summary_line(overall, len(documents)))
    return 0


def window_and_stride(options: EvaluateOptions, config: ModelConfig) -> tuple[int, int]:
    """Both with their defaults filled in. Raises ConfigError where they cannot be."""
    window = config.context if options.window is None else options.window
    if not 1 <= window <= config.context:
        raise ConfigError(f"--window {window} must be between 1 and the model's context of {config.context}")
    stride = max(1, window // 2) if options.stride is None else options.stride
    if not 1 <= stride <= window:
        raise ConfigError(f"--stride {stride} must be between 1 and the window of {window}")
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size} must be at least 1")
    if options.max_tokens < 0:
        raise ConfigError(f"--max-tokens {options.max_tokens} must not be negative; 0 = all")
    return window, stride


def read(options: EvaluateOptions) -> Iterator[Document]:
    """The documents of --text and --data. Raises ConfigError where there is none, DataError on what cannot be read."""
    if not any(options.data) and not any(options.text):
        raise ConfigError("nothing to evaluate: give --data PATH … or --text TEXT")
    for number, text in enumerate(flat(options.text), 1):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"--text {number} is not valid UTF-8") from None
        yield Document(f"text {number}", text)
    for path in flat(options.data):
        if not path:
            raise ConfigError("--data '' names no file")
        corpus = open_corpus(path, options.column)
        for document in corpus:
            yield Document(str(corpus.root / document.name), document.text)


def flat(words: tuple[tuple[str, ...], ...]) -> list[str]:
    """The words of an option that may stand several times."""
    return [word for some in words for word in some]


def encode(
    texts: Iterator[Document], tokenizer: Tokenizer, max_tokens: int
) -> tuple[list[str], list[np.ndarray]]:
    """Names and ids of the documents, up to so many tokens in all (0 = all)."""
    names, documents, room = [], [], max_tokens or sys.maxsize
    for document in texts:
        ids = np.asarray(tokenizer.encode(document.text)[:room], np.int32)
        names.append(document.name)
        documents.append(ids)
        room -= len(ids)
        if room == 0:
            break
    return names, documents


def compute(
    model: Any,
    options: EvaluateOptions,
    documents: list[np.ndarray],
    window: int,
    stride: int,
    front: int | None,
) -> Scores:
    """The scores, with a bar on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    score = scorer(options.framework)
    tokens = sum(max(len(ids) - (front is None), 0) for ids in documents)
    columns = (TextColumn("tokens"), MofNCompleteColumn(), BarColumn(bar_width=None), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=tokens)
        return score(
            model, documents, window, stride, options.batch_size, front, lambda n: bar.advance(task, n)
        )


def scorer(framework: Framework) -> Callable[..., Scores]:
    """`score` of a framework."""
    if framework == "torch":
        from torchref.evaluate import score as torch_score

        return torch_score
    from jaxlm.evaluate import score

    return score


def show(overall: Total, each: list[Total], names: list[str], facts: dict[str, Any]) -> None:
    """The table on standard output; of several documents, those with the highest and lowest loss."""
    window, stride = facts["options"]["window"], facts["options"]["stride"]
    without = f", {overall.unscored:,} without context" if overall.unscored else ""
    front = "no token in front" if facts["front"] is None else f"token {facts['front']} in front"
    for name, value in (
        ("documents", f"{len(each):,}"),
        ("tokens", f"{overall.tokens:,} scored{without}"),
        ("context", f"window {window}, stride {stride}, {front}"),
        ("loss", f"{overall.loss:.6f} nats per token"),
        ("perplexity", f"{overall.perplexity:.6g}"),
        ("bits per byte", f"{overall.bits_per_byte:.6f} over {overall.bytes:,} bytes"),
        ("accuracy", f"{overall.accuracy:.4%}"),
    ):
        print(f"{name:<15}{value}")
    ranked = sorted((i for i in range(len(each)) if each[i].tokens), key=lambda i: -each[i].loss)
    if len(ranked) < 2:
        return
    chosen = ranked if len(ranked) <= 2 * SHOWN else [*ranked[:SHOWN], None, *ranked[-SHOWN:]]
    print(f"\n{'loss':>9}  {'bits/byte':>9}  {'tokens':>9}  document")
    for i in chosen:
        if i is None:
            print(f"{'…':>9}")
            continue
        print(f"{each[i].loss:9.4f}  {each[i].bits_per_byte:9.4f}  {each[i].tokens:9,}  {names[i]}")
    print()


def summary_line(overall: Total, documents: int) -> str:
    """The result as NAME=VALUE words."""
    return (
        f"loss={overall.loss:.10g} perplexity={overall.perplexity:.10g} bits_per_byte={overall.bits_per_byte:.10g} "
        f"accuracy={overall.accuracy:.10g} tokens={overall.tokens} documents={documents}"
    )


def about(options: EvaluateOptions) -> dict[str, Any]:
    """Versions, devices and the texts' fingerprints."""
    where = environment(devices(options.framework), 0)
    del where["seed"]  # nothing is drawn
    texts = {path: open_corpus(path, options.column).fingerprint for path in flat(options.data)}
    return {"environment": where, "data_sha256": texts}


def write(
    directory: Path,
    scores: Scores,
    overall: Total,
    each: list[Total],
    names: list[str],
    facts: dict[str, Any],
) -> None:
    """evaluation.json and loss_by_position.png; what is not finite is null."""
    from jaxlm.plots import PlotError
    from jaxlm.plots_evaluation import plot_evaluation

    positions = by_position(scores)
    report = {
        "schema": SCHEMA,
        **facts,
        "total": _finite(overall._asdict()),
        "documents": [{"name": n, **_finite(t._asdict())} for n, t in zip(names, each, strict=True)],
        "loss_by_position": {
            "position": [p.first for p in positions],
            "tokens": [p.tokens for p in positions],
            "loss": [_finite({"loss": p.loss})["loss"] for p in positions],
        },
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "evaluation.json", report)
    say(f"wrote {directory / 'evaluation.json'}")
    try:
        for path in plot_evaluation(directory):
            say(f"wrote {path}")
    except PlotError as error:
        say(f"note: {error}")


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


if __name__ == "__main__":
    main_guard(main)
