"""The tokens of a run: raw text that is tokenised into the run directory, prepared data, or a mixture of such."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxlm.config import ConfigError, DataConfig, RunConfig, nearest
from jaxlm.data.corpus import Corpus, open_corpus
from jaxlm.data.folder import DATASET, SPLITS, TOKENIZER
from jaxlm.data.prepare import prepare
from jaxlm.data.shards import TokenStore, open_shards
from jaxlm.run_dir import RunDir
from jaxlm.tokenizer import Tokenizer, open_tokenizer

_EVERY = 5.0  # seconds between lines of progress
Say = Callable[[str], None]


@dataclass(frozen=True)
class RunData:
    """What a run trains on and is judged by; entry i of each tuple belongs to part i of the mixture."""

    tokenizer: Tokenizer
    train: tuple[TokenStore, ...]
    val: tuple[TokenStore, ...]
    weights: tuple[float, ...]  # share of the windows that each part gives; they sum to 1
    names: tuple[str, ...]  # what to call each part


def open_run_data(run: RunConfig, directory: RunDir, resumed: bool, say: Say) -> RunData:
    """Tokenizer and tokens of a run; raw text is tokenised first, once.

    Args:
        run: `data.path` is raw text or a folder of `python -m experiments.prepare_data`; `data.mixture` holds
            several such folders with weights.
        directory: gets tokenizer.json, and data/ where raw text is tokenised.
        resumed: whether `directory` holds a run that goes on; then its tokenizer must be that of the data.
        say: takes lines for the person at the terminal.

    Raises:
        InputError: the data or the tokenizer cannot be used, or do not fit each other or the model; one line.
    """
    parts = parse_mixture(run.data.mixture)
    if not parts and is_prepared(run.data.path):
        parts = ((run.data.path, 1.0),)
    if parts:
        data = _prepared(run, parts, say)
    else:
        data = _raw(run, directory, resumed, say)
    _keep_tokenizer(directory, data.tokenizer, resumed)
    for name, weight, train, val in zip(data.names, data.weights, data.train, data.val):
        share = f", {weight:.4g} of the mixture" if len(parts) > 1 else ""
        say(f"data: {len(train):,} training and {len(val):,} validation tokens of {name}{share}")
    return data


def is_prepared(path: str) -> bool:
    """Whether `path` is a folder of tokenised data rather than raw text."""
    folder = Path(path)
    named = any((folder / name).is_file() for name in (TOKENIZER, DATASET))
    return bool(path) and named and (folder / "train" / "meta.json").is_file()


def parse_mixture(entries: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """("a=0.7", "b=0.3") -> (("a", 0.7), ("b", 0.3)).

    Raises:
        ConfigError: an entry is not FOLDER=WEIGHT, a weight is not positive, they do not sum to 1, or a folder
            stands twice.
    """
    parts = []
    for entry in entries:
        folder, sign, weight = entry.rpartition("=")
        try:
            share = float(weight)
        except ValueError:
            share = math.nan
        if not sign or not folder or math.isnan(share):
            raise ConfigError(f"data.mixture entry {entry!r} is not of the form FOLDER=WEIGHT")
        if not 0 < share < math.inf:
            raise ConfigError(f"data.mixture: the weight of {folder} is {weight}; weights must be positive")
        parts.append((folder, share))
    places = [Path(folder).resolve() for folder, _ in parts]
    twice = [folder for i, (folder, _) in enumerate(parts) if places[i] in places[:i]]
    if twice:
        raise ConfigError(f"data.mixture names {twice[0]} twice; give it once, with the sum of its weights")
    total = math.fsum(share for _, share in parts)
    if parts and abs(total - 1) > 1e-6:
        listed = " + ".join(f"{share:.12g}" for _, share in parts)
        raise ConfigError(f"data.mixture: the weights sum to {total:.12g}, not 1: {listed}")
    return tuple(parts)


def _prepared(run: RunConfig, parts: Sequence[tuple[str, float]], say: Say) -> RunData:
    tokenizers = [_tokenizer_of(folder) for folder, _ in parts]
    for (folder, _), tokenizer in zip(parts[1:], tokenizers[1:]):
        if tokenizer.fingerprint() != tokenizers[0].fingerprint():
            raise ConfigError(
                f"data.mixture: {folder} was tokenised by another tokenizer than {parts[0][0]}; "
                "prepare both with the same --tokenizer"
            )
    _check_choice(run.data, tokenizers[0], parts[0][0])
    _check_vocabulary(run, tokenizers[0], f"of {parts[0][0]}", say)
    stores = {
        split: tuple(
            open_shards(Path(folder) / split, run.model.vocab_size, run.data.verify) for folder, _ in parts
        )
        for split in SPLITS
    }
    for (folder, _), store in zip(parts, stores["train"]):
        if store.meta["tokenizer"] != tokenizers[0].fingerprint():
            raise ConfigError(f"{folder}: tokenizer.json is not the tokenizer that its shards were made with")
    return RunData(
        tokenizers[0],
        stores["train"],
        stores["val"],
        tuple(weight for _, weight in parts),
        tuple(folder for folder, _ in parts),
    )


def _tokenizer_of(folder: str) -> Tokenizer:
    if not is_prepared(folder):
        parent = Path(folder).parent
        siblings = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        hint = "" if Path(folder).exists() else nearest(Path(folder).name, siblings)
        raise ConfigError(
            f"{folder} holds no prepared data (tokenizer.json, train/, val/){hint}; "
            "make it with python -m experiments.prepare_data SOURCE --out FOLDER"
        )
    return Tokenizer.load(Path(folder) / "tokenizer.json")


def _check_choice(data: DataConfig, tokenizer: Tokenizer, folder: str) -> None:
    """data.tokenizer may repeat what the prepared data was made with, not contradict it."""
    if data.tokenizer == "train":
        return
    if open_tokenizer(data.tokenizer).fingerprint() != tokenizer.fingerprint():
        raise ConfigError(
            f"{folder} was tokenised by another tokenizer than data.tokenizer={data.tokenizer}; "
            "leave --data.tokenizer out, or prepare the data with it"
        )


def _raw(run: RunConfig, directory: RunDir, resumed: bool, say: Say) -> RunData:
    corpus = open_corpus(run.data.path, run.data.column)
    tokenizer = _raw_tokenizer(run, directory, corpus, resumed, say)
    _check_vocabulary(run, tokenizer, run.data.tokenizer, say)
    out = Path(run.data.cache) if run.data.cache else directory.path / "data"
    prepare(
        corpus,
        tokenizer,
        out,
        run.data.val_fraction,
        run.train.seq_len + 1,
        progress=_progress(say),
    )
    train, val = (open_shards(out / split, run.model.vocab_size, run.data.verify) for split in SPLITS)
    return RunData(tokenizer, (train,), (val,), (1.0,), (corpus.description,))


def _raw_tokenizer(run: RunConfig, directory: RunDir, corpus: Corpus, resumed: bool, say: Say) -> Tokenizer:
    if resumed and directory.tokenizer.is_file():
        return Tokenizer.load(directory.tokenizer)
    if run.data.tokenizer != "train":
        tokenizer = open_tokenizer(run.data.tokenizer)
        if tokenizer.loss_note:
            say(f"warning: {tokenizer.loss_note}")
        return tokenizer
    size = run.model.vocab_size
    say(f"training a byte-level BPE of {size} tokens on {corpus.description}")
    texts = (document.text for document in corpus.documents("train", run.data.val_fraction))
    tokenizer = Tokenizer.train(texts, size)
    if tokenizer.n_unused:
        say(f"the text fills {size - tokenizer.n_unused} tokens; {tokenizer.n_unused} stay unused")
    return tokenizer


def _check_vocabulary(run: RunConfig, tokenizer: Tokenizer, name: str, say: Say) -> None:
    """Before anything is tokenised or opened: the model must have a row for every id."""
    has, wants = tokenizer.vocab_size, run.model.vocab_size
    if has > wants:
        raise ConfigError(
            f"the tokenizer {name} has {has} tokens but model.vocab_size={wants}; "
            f"set --model.vocab-size {has}"
        )
    if has < wants:
        say(f"the vocabulary of {has} tokens is padded to model.vocab_size={wants}")


def _keep_tokenizer(directory: RunDir, tokenizer: Tokenizer, resumed: bool) -> None:
    if not resumed or not directory.tokenizer.is_file():
        tokenizer.save(directory.tokenizer)
    elif Tokenizer.load(directory.tokenizer).fingerprint() != tokenizer.fingerprint():
        raise ConfigError(
            f"{directory.path} was trained with another tokenizer than that of its data now; "
            "give it the data that it began with"
        )


def _progress(say: Say) -> Callable[[int, int], None]:
    said = time.monotonic()

    def tell(documents: int, tokens: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _EVERY:
            said = time.monotonic()
            say(f"tokenised {documents:,} documents, {tokens:,} tokens")

    return tell
