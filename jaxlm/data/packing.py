"""Documents of a window kept apart: segment ids, positions that restart, and no loss across a border.

A packed window is a window of the token stream like any other, so that any of them is found at once; the documents
in it are told apart by the store's index of where documents start. A document that the window's start cuts
off begins at position 0 there.
"""

import numpy as np

from jaxlm.data.shards import TokenStore


def pack(store: TokenStore, starts: np.ndarray, seq_len: int) -> dict[str, np.ndarray]:
    """What sets the documents of windows apart.

    Args:
        store: tokens and the starts of its documents.
        starts: first tokens of the windows, int64 [b].
        seq_len: T; window i has tokens starts[i] to starts[i] + T, the last of them only as a target.

    Returns:
        segments [b, T] int32: 1, 2, ... for the documents of each window. positions [b, T] int32: from 0 in each
        document. loss_mask [b, T] float32: 0 where the target belongs to another document than its input, else 1.
    """
    begins = np.zeros((len(starts), seq_len + 1), bool)
    for row, start in zip(begins, np.asarray(starts).tolist(), strict=True):
        row[store.document_starts(start + 1, start + seq_len + 1) - start] = True
    inside = begins[:, :-1]
    columns = np.arange(seq_len, dtype=np.int32)
    return {
        "segments": np.cumsum(inside, axis=1, dtype=np.int32) + np.int32(1),
        "positions": columns - np.maximum.accumulate(np.where(inside, columns, np.int32(0)), axis=1),
        "loss_mask": (~begins[:, 1:]).astype(np.float32),
    }
