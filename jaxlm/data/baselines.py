"""What a model has to beat: n-gram tables trained on the same tokens, and gzip."""

import gzip

import numpy as np

from jaxlm.data.shards import TokenStore

_CHUNK = 1 << 23  # tokens counted at once
_BLOCK = 4096  # tokens kept together when a part of the text is taken
_HELD_OUT = 10  # one in so many blocks of the training tokens chooses the smoothing
_DISCOUNTS = (0.0, 0.25, 0.5, 0.65, 0.8, 0.9, 1.0)
_STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4, np.inf)

Tokens = TokenStore | np.ndarray  # a sequence of token ids


class _Counts:
    """Unigram and bigram counts of a sequence; bigrams as sorted codes left * V + right."""

    def __init__(self, tokens: np.ndarray, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.unigram = np.bincount(tokens, minlength=vocab_size)
        codes, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        for start in range(0, len(tokens) - 1, _CHUNK):
            part = self.codes(tokens[start : start + _CHUNK + 1])
            more, more_counts = np.unique(part, return_counts=True)
            codes, inverse = np.unique(np.concatenate([codes, more]), return_inverse=True)
            counts = np.bincount(inverse, np.concatenate([counts, more_counts])).astype(np.int64)
        self._codes, self._counts = codes, counts
        left = codes // vocab_size
        self.followers = np.bincount(left, counts, minlength=vocab_size)  # tokens seen after each left token
        self.kinds = np.bincount(left, minlength=vocab_size)  # different ones among them

    def codes(self, tokens: np.ndarray) -> np.ndarray:
        return tokens[:-1].astype(np.int64) * self.vocab_size + tokens[1:]

    def bigram(self, tokens: np.ndarray) -> np.ndarray:
        """How often each adjacent pair of `tokens` was seen, [len - 1]."""
        wanted = self.codes(tokens)
        if not len(self._codes):
            return np.zeros(len(wanted))
        at = np.minimum(np.searchsorted(self._codes, wanted), len(self._codes) - 1)
        return np.where(self._codes[at] == wanted, self._counts[at], 0).astype(np.float64)

    def unigram_probability(self) -> np.ndarray:
        """Add-one estimate, [V]."""
        return (self.unigram + 1.0) / (self.unigram.sum() + self.vocab_size)


def _bigram_loss(counts: _Counts, tokens: np.ndarray, settings: list[tuple[float, float]]) -> list[float]:
    """Nats per token for each (discount d, strength k).

    p(b|a) = (max(c(ab) - d, 0) + (k + d kinds(a)) p(b)) / (c(a) + k): additive smoothing towards the unigram
    (MacKay & Peto 1995) with absolute discounting (Ney et al. 1994). k = inf is the unigram.
    """
    pair, left = counts.bigram(tokens), tokens[:-1]
    base = counts.unigram_probability()[tokens[1:]]
    total, kinds = counts.followers[left], counts.kinds[left]
    losses = []
    for d, k in settings:
        probability = base
        if np.isfinite(k):
            probability = (np.maximum(pair - d, 0.0) + (k + d * kinds) * base) / (total + k)
        losses.append(float(-np.log(probability).mean()))
    return losses


def bigram_loss(train: Tokens, val: Tokens, vocab_size: int, n_train_tokens: int = 0) -> float:
    """Cross-entropy of the best smoothed bigram table, in nats per token of `val` after the first.

    Discount and strength of the smoothing are those that do best on every tenth block of the training tokens for a
    table of the rest; the final table counts all of them.

    Args:
        train: tokens the table may see.
        val: tokens to predict.
        vocab_size: V.
        n_train_tokens: use only so many, in blocks spread evenly like shuffled windows; 0 = all.
    """
    seen = _spread(train, n_train_tokens)
    block = max(2, min(_BLOCK, len(seen) // (2 * _HELD_OUT)))
    chooses = np.arange(len(seen)) // block % _HELD_OUT == _HELD_OUT - 1
    settings = [(d, k) for d in _DISCOUNTS for k in _STRENGTHS]
    held_out = _bigram_loss(_Counts(seen[~chooses], vocab_size), seen[chooses], settings)
    best = settings[int(np.argmin(held_out))]
    return _bigram_loss(_Counts(seen, vocab_size), val[0 : len(val)], [best])[0]


def unigram_loss(train: Tokens, val: Tokens, vocab_size: int, n_train_tokens: int = 0) -> float:
    """Cross-entropy of add-one token frequencies on `val` after its first token; arguments as `bigram_loss`."""
    counts = np.bincount(_spread(train, n_train_tokens), minlength=vocab_size)
    probability = (counts + 1.0) / (counts.sum() + vocab_size)
    return float(-np.log(probability[val[1 : len(val)]]).mean())


def gzip_bits_per_byte(text: bytes) -> float:
    """Bits that gzip at its best level needs per byte of `text`."""
    if not text:
        raise ValueError("gzip_bits_per_byte needs at least one byte of text")
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)


def _spread(tokens: Tokens, n: int) -> np.ndarray:
    """`n` tokens (0 = all) in blocks at even distances."""
    if n == 0 or n >= len(tokens):
        return tokens[0 : len(tokens)]
    blocks = -(-n // _BLOCK)
    starts = [i * len(tokens) // blocks for i in range(blocks)]
    return np.concatenate([tokens[start : start + -(-n // blocks)] for start in starts])[:n]
