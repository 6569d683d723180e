"""tiktoken's published encodings gpt2, cl100k_base and o200k_base, from a local file or tiktoken's cache.

A file of ranks says neither how text is split nor which tokens are special; those stand here, as tiktoken defines
them. Which encoding a file holds is told by its SHA-256, not by its name.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken

from jaxlm.config import nearest
from jaxlm.tokenizer_base import TokenizerError
from jaxlm.tokenizer_bytes import GPT2_PATTERN, ByteLevel

END_OF_TEXT = "<|endoftext|>"  # how the published encodings name their only separator
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


@dataclass(frozen=True)
class Published:
    """An encoding whose ids are public."""

    name: str
    sha256: str  # of its .tiktoken file
    pattern: str  # how text is split
    specials: dict[str, int] = field(default_factory=dict)
    also: str = ""  # another name of the same file


PUBLISHED = (
    Published(
        "gpt2",
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        GPT2_PATTERN,
        {END_OF_TEXT: 50256},
        "r50k_base",
    ),
    Published(
        "cl100k_base",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
        r"|\s+(?!\S)|\s",
        {END_OF_TEXT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
        | {"<|endofprompt|>": 100276},
    ),
    Published(
        "o200k_base",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
    ),
)
NAMED = tuple(published.name for published in PUBLISHED)


def from_cache(name: str) -> ByteLevel:
    """A published encoding from tiktoken's cache or the network.

    Raises:
        TokenizerError: the name is unknown, or the file is neither cached nor reachable.
    """
    if name not in NAMED:
        raise TokenizerError(
            f"unknown tokenizer {name!r}{nearest(name, NAMED)}; known are {', '.join(NAMED)}"
        )
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ImportError, ValueError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise TokenizerError(
            f"tokenizer {name!r} could not be fetched ({reason}); without network, give the path of {name}.tiktoken, "
            "or set TIKTOKEN_CACHE_DIR to a folder that tiktoken filled on another machine, or use tokenizer 'train'"
        ) from None
    return ByteLevel(encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)


def from_file(path: Path, known: Sequence[Published] = PUBLISHED) -> ByteLevel:
    """A published encoding from its .tiktoken file: a line for each token, base64 and rank.

    Raises:
        TokenizerError: the file cannot be read, or its SHA-256 is that of no published encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"tokenizer file {path} cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(content).hexdigest()
    for published in known:
        if digest == published.sha256:
            lines = (line.split() for line in content.splitlines() if line)
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            return ByteLevel(published.pattern, ranks, published.specials)
    for published in known:
        if path.stem in (published.name, published.also):
            raise TokenizerError(
                f"tokenizer file {path} is damaged: its SHA-256 is {digest}, that of the published "
                f"{path.stem} is {published.sha256}"
            )
    raise TokenizerError(
        f"tokenizer file {path} holds none of {', '.join(p.name for p in known)}, by its SHA-256 {digest}; of other "
        "encodings a .tiktoken file does not say how text is split: use a tokenizer.json"
    )
