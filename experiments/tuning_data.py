"""What a fine-tuning run learns from: its template, its examples or pairs, and what is held out of them."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from convert.targets import Target
from experiments.cli import say
from experiments.tuning_options import TuneOptions
from jaxlm.chat import Chat, open_template
from jaxlm.config import ConfigError, InputError
from jaxlm.data.conversations import (
    Statistics,
    encode_conversations,
    encode_preferences,
    open_conversations,
    split_validation,
)
from jaxlm.data.examples import Examples, Pairs
from jaxlm.data.tune_batches import TuneSettings
from jaxlm.run_dir import RunDir
from jaxlm.tokenizer import Tokenizer

_MARK = re.compile(r"<\|[^|<>\s]+\|>")  # how special tokens are spelled in templates


@dataclass(frozen=True)
class TuneData:
    """What a run learns from and is judged by."""

    chat: Chat  # tokenizer, template and special tokens
    train: Examples | Pairs
    val: Examples | Pairs
    read: Statistics  # of --data, all of it
    read_val: Statistics | None = None  # of --val

    @cached_property
    def shown(self) -> Examples:
        """What samples are taken from: the held-out examples, of pairs the chosen answers.

        All of the last answer is marked, its thought too where that carries no loss: a model is to think for itself.
        """
        held = self.val.chosen if isinstance(self.val, Pairs) else self.val
        return Examples.of((_whole_answer(held, i) for i in range(len(held))), held.fingerprint)


def open_chat(target: Target, template: str) -> Chat:
    """How conversations with a target are written.

    template: chatml, llama3 or a file of Jinja; '' = the target's own. Raises InputError where there is none, or where
    the tokenizer lacks what it writes.
    """
    tokenizer, specials = target.tokenizer, target.specials
    if tokenizer.vocab_size > target.config.vocab_size:
        raise ConfigError(
            f"the tokenizer of {target.path} has {tokenizer.vocab_size} tokens, but its model only "
            f"{target.config.vocab_size}; give it the tokenizer that it was trained with"
        )
    stored = open_template(template) if template else specials.chat_template
    eos = specials.eos[0] if specials.eos else None
    chat = Chat.of(tokenizer, stored, bos=specials.bos, eos=eos, pad=specials.pad)
    text = chat.text([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], False)
    missing = [mark for mark in dict.fromkeys(_MARK.findall(text)) if mark not in tokenizer.specials]
    if missing:
        raise ConfigError(
            f"the chat template writes {', '.join(missing)}, which are no special tokens of the tokenizer of "
            f"{target.path}; choose another --chat.template, or a model whose tokenizer has them"
        )
    return chat


def open_data(options: TuneOptions, target: Target, seq_len: int) -> TuneData:
    """Reads and encodes all that the options name. Raises InputError, with file and line where a row is at fault."""
    chat = open_chat(target, options.chat.template)
    encode = encode_preferences if options.method == "dpo" else encode_conversations

    def read(files: tuple[str, ...]) -> tuple[Any, Statistics]:  # Examples, or Pairs
        rows = open_conversations(files, options.chat.schema)
        return encode(rows, target.tokenizer, chat, options.chat, seq_len + 1, say)

    train, found = read(options.data)
    if options.val:
        val, found_val = read(options.val)
        return TuneData(chat, train, val, found, found_val)
    return TuneData(chat, *split_validation(train, options.val_fraction, options.train.seed), found)


def settings_of(options: TuneOptions, seq_len: int) -> TuneSettings:
    """How batches are made; pairs are never packed."""
    packing = options.chat.packing and options.method != "dpo"
    return TuneSettings(seq_len, options.train.batch_size, options.train.seed, packing=packing)


def check_tokenizer(directory: RunDir, data: TuneData) -> None:
    """Raises InputError where a run that goes on began with another tokenizer or chat template."""
    if not directory.tokenizer.is_file():
        return
    stored = Tokenizer.load(directory.tokenizer)
    if (
        stored.fingerprint() != data.chat.tokenizer.fingerprint()
        or stored.chat_template != data.chat.template
    ):
        raise InputError(
            f"{directory.path} was trained with another tokenizer or chat template than that of its base now; "
            "give it the one that it began with"
        )


def _whole_answer(held: Examples, i: int) -> tuple[np.ndarray, np.ndarray]:
    ids, carries = held.example(i)
    marked = carries.copy()
    marked[held.answers[i, 1] : np.flatnonzero(carries)[-1] + 1] = True
    return ids, marked


def last_answer(ids: np.ndarray, carries: np.ndarray) -> tuple[list[int], list[int]]:
    """An example cut before its last answer: what it follows, and the answer with its end."""
    at = np.flatnonzero(carries)
    last = at[-1] + 1
    first = at[np.flatnonzero(np.diff(at, prepend=-2) > 1)[-1]]
    return ids[:first].tolist(), ids[first:last].tolist()
