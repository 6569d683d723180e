"""A random order of n things that is computed where it is read: place i of epoch e costs the same for any n.

The order is a keyed permutation of 0 .. n-1: a Feistel network over pairs of digits (x = a R + L, the generalised
Feistel cipher of Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002) on the smallest a x b >= n with a
the root of n rounded up and b even (with two odd sizes all rounds are even permutations), and cycle walking: a result
of n or more is encrypted again until it is below n. As a b - n < 2 a, that is two values in sqrt(n). The round function
is SplitMix64's finaliser (Steele, Lea & Flood 2014), keyed by seed, stream, epoch and round. The order is statistically
random, not secret.

All of it is arithmetic of uint64 modulo 2^64 in numpy, so that an order stays what it is under every version of
every library; `SCHEME` names it in saved positions.
"""

import math

import numpy as np

SCHEME = "feistel-1"
_ROUNDS = 8
_FEW, _ROUNDS_OF_FEW = 4096, 24  # fewer things need more rounds until all their orders are equally likely
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1

Words = np.ndarray  # uint64


def shuffled(places: np.ndarray, n: int, seed: int, stream: int = 0) -> np.ndarray:
    """What stands at `places` of an endless order in which every epoch visits 0 .. n-1 once, int64 [len(places)].

    Place i is place i mod n of epoch i // n; each epoch has an order of its own. A pure function of every single
    place and (n, seed, stream).

    Args:
        places: integers >= 0, any shape [K].
        n: things of an epoch, 1 to 2^62.
        seed: of the order, any integer (modulo 2^64).
        stream: another order of the same seed, as of another store.

    Raises:
        ValueError: n is out of range, or a place is negative.
    """
    places = np.asarray(places, np.int64)
    if not 1 <= n <= 1 << 62:
        raise ValueError(f"an order of {n} things is not possible; n must be 1 to 2^62")
    if places.size and places.min() < 0:
        raise ValueError(f"place {places.min()} is negative")
    epochs, positions = np.divmod(places, n)
    a = math.isqrt(n - 1) + 1
    b = -(-n // (2 * a)) * 2
    keys = _keys(epochs.astype(np.uint64), seed, stream)
    found = _encrypt(positions.astype(np.uint64), keys, a, b)
    while (outside := np.flatnonzero(found >= n)).size:
        found[outside] = _encrypt(found[outside], keys[outside], a, b)
    return found.astype(np.int64)


def _mix(x: Words) -> Words:
    """SplitMix64's finaliser, a bijection of the 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(epochs: Words, seed: int, stream: int) -> Words:
    """One key for each epoch [K]: a hash of seed, stream and epoch, one after the other."""
    key = np.array([seed & _MASK], np.uint64)
    key = _mix(_mix(key + _GOLDEN) ^ np.uint64(stream))
    return _mix(_mix(key + _GOLDEN) ^ epochs)


def _encrypt(x: Words, keys: Words, a: int, b: int) -> Words:
    """The network on 0 .. a b - 1 [K]: each half in turn moves by a hash of the other, modulo its own size."""
    left_size, right_size = np.uint64(a), np.uint64(b)
    right, left = np.divmod(x, left_size)
    for _ in range((_ROUNDS if a * b >= _FEW else _ROUNDS_OF_FEW) // 2):
        keys = keys + _GOLDEN
        left = (left + _mix(right ^ keys) % left_size) % left_size
        keys = keys + _GOLDEN
        right = (right + _mix(left ^ keys) % right_size) % right_size
    return left_size * right + left
