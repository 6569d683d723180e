"""How likely a model finds given tokens: log-probabilities, each token once. Twin: jaxlm/evaluate.py.

    log p(t_i | t_<i) = logits[t_i] - logsumexp(logits)

The head is applied in chunks of tokens, so that logits of a whole batch never exist; softmax upcast. Which tokens are
scored with which context: jaxlm/windows.py.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from jaxlm.windows import Scores, Window, as_documents, batches, check_window, plan
from torchref.layers import upcast
from torchref.loss import CHUNK_LOGITS
from torchref.model import Decoder
from torchref.shapes import Bool, Float, Int


def token_scores(
    hidden: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D V"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, "B T"],
    chunk_logits: int = CHUNK_LOGITS,
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Natural log-probability of each target, and whether it has the largest logit (the lowest id on ties)."""
    length = max(1, chunk_logits // weight.shape[1])
    logprobs, greedy = [], []
    for x, target in zip(hidden.flatten(0, 1).split(length), targets.flatten().split(length), strict=True):
        logits = x @ weight.to(x.dtype)
        wide = upcast(logits if bias is None else logits + bias.to(x.dtype))
        logprobs.append(wide.gather(-1, target[:, None])[:, 0] - wide.logsumexp(-1))
        greedy.append(wide.argmax(-1) == target)
    return torch.cat(logprobs).view(targets.shape), torch.cat(greedy).view(targets.shape)


def score_windows(
    model: Decoder,
    documents: Sequence[np.ndarray],
    windows: Sequence[Window],
    batch: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Scores:
    """The tokens that windows score. `batch`: rows computed together; `progress`: told how many tokens were done.

    Raises ConfigError where a window exceeds the model's context or batch < 1.
    """
    check_window(windows, model.config.context)
    scores, device = Scores.empty(documents), model.embed.weight.device
    for rows in batches(documents, windows, batch):
        inputs, targets, segments = (
            torch.from_numpy(ids).to(device, torch.long) for ids in (rows.inputs, rows.targets, rows.segments)
        )
        with torch.no_grad():
            hidden, _, _ = model.hidden(inputs, segments=segments)
            logprobs, greedy = token_scores(hidden, *model.head(), targets)
        progress(scores.put(rows, logprobs.cpu().numpy(), greedy.cpu().numpy()))
    return scores


def score(
    model: Decoder,
    documents: Sequence[Sequence[int] | np.ndarray],
    window: int,
    stride: int,
    batch: int,
    front: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Scores:
    """Every token of every document, scored once by strided windows.

    Args:
        model: the decoder, in the dtype to compute in.
        documents: ids.
        window: tokens read at once, at most the model's context.
        stride: tokens that each window but the first scores: a token has at least window - stride of context.
        batch: windows computed together.
        front: id that stands before each document, so that its first token has a context; None = it is not scored.
        progress: told how many tokens were done.

    Raises:
        ConfigError: a window, stride or batch that cannot be, or an id outside the vocabulary.
    """
    arrays = as_documents(documents, front, model.config.vocab_size)
    windows = plan([len(ids) for ids in arrays], window, stride)
    scores = score_windows(model, arrays, windows, batch, progress)
    return scores if front is None else scores.without_front()
