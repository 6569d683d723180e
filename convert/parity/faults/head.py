"""Faults of the loss that forms its gradients in the forward pass. Its value stays right: the gradients tell."""

from typing import Any

import jax
import jax.numpy as jnp

from convert.parity.faults.fault import Fault

CHUNK = 7  # tokens, so that the self-test's few are several chunks, the last of them shorter
TOKENS, GRADIENTS = "jaxlm.head_loss._chunk", "jaxlm.head_loss._over_chunks"


def _gradients_of(change: Any) -> Any:
    """Terms of the tokens as they are, gradients of a changed call: (options, targets, mask) -> the same."""

    def plant(original: Any) -> Any:
        def chunk(options, gradients, upright, head, x, turned, targets, mask):
            tokens, _ = original(options, False, upright, head, x, turned, targets, mask)
            if not gradients:
                return tokens, None
            options, targets, mask = change(options, targets, mask)
            return tokens, original(options, True, upright, head, x, turned, targets, mask)[1]

        return chunk

    return plant


def _target_before(options: Any, targets: Any, mask: Any) -> Any:
    return options, jnp.maximum(targets - 1, 0), mask


def _z_not_differentiated(options: Any, targets: Any, mask: Any) -> Any:
    return options._replace(z_coef=0.0), targets, mask


def _every_token(options: Any, targets: Any, mask: Any) -> Any:
    return options, targets, jnp.ones_like(mask)


def _cotangent_ignored(original: Any) -> Any:
    """The rule returns what it saved, as if nothing came after the loss."""

    @jax.custom_vjp
    def deaf(loss):
        return loss

    deaf.defvjp(lambda loss: (loss, None), lambda _, cotangent: (jnp.ones_like(cotangent),))

    def head_loss(*args):
        sums = original(*args)
        return sums._replace(loss=deaf(sums.loss))

    return head_loss


def _in_chunks(change: Any) -> Any:
    """Chunks of a few tokens, and another result: (call of all chunks, hidden, weight, bias, targets, mask) -> it."""

    def plant(original: Any) -> Any:
        def over_chunks(options, gradients, form, *arrays):
            small = form._replace(chunk=CHUNK)
            return change(lambda *given: original(options, gradients, small, *given), *arrays)

        return over_chunks

    return plant


def _first_chunk_lost(run: Any, hidden: Any, weight: Any, bias: Any, targets: Any, mask: Any) -> Any:
    """The sum over chunks starts anew after the first."""
    tokens, found = run(hidden, weight, bias, targets, mask)
    if found is None:
        return tokens, None
    length = -(-len(mask) // -(-len(mask) // CHUNK))
    later = run(hidden, weight, bias, targets, mask.at[:length].set(0))[1]
    return tokens, found._replace(weight=later.weight)


def _chunks_interleaved(run: Any, hidden: Any, *rest: Any) -> Any:
    """Gradients of the hidden states come back with tokens and chunks exchanged."""
    tokens, found = run(hidden, *rest)
    if found is None:
        return tokens, None
    turned = found.hidden.reshape(-1, 2, hidden.shape[-1]).swapaxes(0, 1)
    return tokens, found._replace(hidden=turned.reshape(hidden.shape))


def _padding_has_probability(run: Any, hidden: Any, weight: Any, bias: Any, *rest: Any) -> Any:
    """Columns that only fill the last tile count as words with a logit of zero."""
    assert bias is None
    V = weight.shape[1]
    tokens, found = run(hidden, jnp.pad(weight, ((0, 0), (0, -V % 128))), None, *rest)
    return tokens, None if found is None else found._replace(weight=found.weight[:, :V])


# name, kind, target, change, rung, operation
_TABLE = (
    (
        "head's gradient as if nothing came after the loss",
        "scale",
        "jaxlm.loss.head_loss",
        _cotangent_ignored,
        "gradients",
        "lm_head.weight",
    ),
    (
        "z of the loss not differentiated",
        "scale",
        TOKENS,
        _gradients_of(_z_not_differentiated),
        "gradients",
        "lm_head.weight",
    ),
    (
        "gradient of the token before",
        "masks",
        TOKENS,
        _gradients_of(_target_before),
        "gradients",
        "lm_head.weight",
    ),
    (
        "loss mask not in the gradient",
        "masks",
        TOKENS,
        _gradients_of(_every_token),
        "gradients",
        "lm_head.weight",
    ),
    (
        "first chunk's weight gradient lost",
        "accumulation",
        GRADIENTS,
        _in_chunks(_first_chunk_lost),
        "gradients",
        "lm_head.weight",
    ),
    (
        "tokens and chunks exchanged",
        "layout",
        GRADIENTS,
        _in_chunks(_chunks_interleaved),
        "gradients",
        "final_norm.weight",
    ),
    (
        "padding of the vocabulary has probability",
        "masks",
        GRADIENTS,
        _in_chunks(_padding_has_probability),
        "loss",
        "cross_entropy",
    ),
)
FAULTS = tuple(Fault(*row) for row in _TABLE)
