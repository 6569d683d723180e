"""From what a step returns to one line of the log: what it means in other units is computed here. No jax here.

docs/metrics.md lists every key with its unit and formula.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxlm.config import RunConfig
from jaxlm.metrics import Throughput, bits_per_byte, mfu, perplexity
from jaxlm.tune_config import TuneRun

ALWAYS = ("loss", "skipped")  # read from the device after every step, logged or not


@runtime_checkable
class Sink(Protocol):
    """Where lines go: one dict of `step` and whatever else is known of it."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes one line."""
        ...


class Reporter:
    """Turns a step's metrics into one line of the log. Blocks until the step is done.

    Attributes:
        loss: of the newest step reported, nats per token; NaN before the first.
    """

    RATE_STEPS = 10  # steps a tokens/s figure is averaged over

    def __init__(
        self,
        run: RunConfig,
        sink: Sink,
        meter: Throughput,
        flops_per_token: float | None,
        peak_flops: float | None,
        bytes_per_token: float | None = None,
        device_memory: Callable[[], int] | None = None,
        val_bytes_per_token: float | None = None,
    ) -> None:
        """What is None is left out of the lines, and so is what follows from it.

        Args:
            run: for the tokens of a step and how often a line is due.
            sink: takes every due line.
            meter: ticked once per report; whoever owns it pauses it.
            flops_per_token: of a training step (jaxlm.count.flops_per_token).
            peak_flops: FLOP/s of all devices of the run together.
            bytes_per_token: bytes of text per token of the training split (`text_bytes_per_token`).
            device_memory: peak memory so far in bytes, for example jaxlm.memory.peak_memory.
            val_bytes_per_token: as bytes_per_token, of the validation split; None = the same.
        """
        self.run, self.sink, self.meter = run, sink, meter
        self.flops_per_token, self.peak_flops, self.device_memory = flops_per_token, peak_flops, device_memory
        self.bytes_per_token = bytes_per_token
        self.val_bytes_per_token = val_bytes_per_token or bytes_per_token
        # The loss of preferences is no token's.
        self._of_tokens = not (isinstance(run, TuneRun) and run.tune.method == "dpo")
        self.loss, self._rate, self._steps = math.nan, None, 0

    def __call__(self, step: int, metrics: Mapping[str, Any], **extra: float) -> tuple[int, dict[str, Any]]:
        """Reports that `step` steps are done; `metrics` are the last one's, `extra` what else is known (val_loss).

        A line is written for every `log_every`-th step, for a step whose update was skipped and for one with `extra`;
        it holds the values of that step alone, not means since the line before. Of other steps only the loss and
        `skipped` leave the device. Returns the step and what is known of it, for the progress bar.
        """
        values = host_values({name: metrics[name] for name in ALWAYS if name in metrics})
        self.loss = values["loss"]
        self.meter.tick()
        self._steps += 1
        if self._rate is None or self._steps % self.RATE_STEPS == 0:
            self._rate = self.meter.tokens_per_second() or self._rate
        due = step % self.run.train.log_every == 0 or bool(extra) or bool(values.get("skipped"))
        if due:
            values = host_values(metrics)
        line = self._line(step, values, extra)
        if due:
            self.sink.write(line)
        return step, line

    def _line(self, step: int, values: dict[str, Any], extra: dict[str, float]) -> dict[str, Any]:
        tokens = step * tokens_per_step(self.run)
        line: dict[str, Any] = {"step": step, "tokens": tokens, "loss": self.loss}
        if self.flops_per_token:
            line["flops"] = tokens * self.flops_per_token
        line |= values | (_units(self.loss, self.bytes_per_token) if self._of_tokens else {})
        if "val_loss" in extra and self._of_tokens:
            units = _units(extra["val_loss"], self.val_bytes_per_token)
            extra = extra | {f"val_{name}": value for name, value in units.items()}
        line["tokens_per_second"] = self._rate
        if self.flops_per_token and self.peak_flops and self._rate:
            line["mfu"] = mfu(self._rate, self.flops_per_token, self.peak_flops)
        if self.device_memory is not None:
            line["peak_memory_bytes"] = self.device_memory()
        return line | extra


def tokens_per_step(run: RunConfig) -> int:
    """Places of a batch, padding among them; a pair of answers has two sequences."""
    pairs = isinstance(run, TuneRun) and run.tune.method == "dpo"
    return (2 if pairs else 1) * run.train.batch_size * run.train.seq_len


def _units(loss: float, bytes_per_token: float | None) -> dict[str, float]:
    """The same loss in other units."""
    units = {"perplexity": perplexity(loss)}
    return units | ({"bits_per_byte": bits_per_byte(loss, bytes_per_token)} if bytes_per_token else {})


def host_values(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and nested lists from arrays of jax, torch or numpy; all copies are under way before one is awaited."""
    for value in metrics.values():
        if hasattr(value, "copy_to_host_async"):  # a jax array, without importing jax
            value.copy_to_host_async()
    return {name: _plain(value) for name, value in metrics.items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "detach"):  # a torch tensor, without importing torch
        value = value.detach().cpu().numpy()
    return np.asarray(value).tolist()


def text_bytes_per_token(metas: Sequence[Mapping[str, Any]], weights: Sequence[float] = ()) -> float | None:
    """Mean bytes of text that a token stands for: of one split, or of a mixture of several.

    Args:
        metas: contents of the splits' meta.json: `bytes` of text and `tokens`, special ones included.
        weights: share of the tokens that each split gives; without any, each counts by its tokens.

    Returns None where a split has no text or does not say how much.
    """
    sizes = [(meta.get("bytes", 0), meta["tokens"]) for meta in metas]
    if not sizes or not all(size and tokens for size, tokens in sizes):
        return None
    shares = weights or [tokens for _, tokens in sizes]
    means = [size / tokens for size, tokens in sizes]
    return sum(share * mean for share, mean in zip(shares, means, strict=True)) / sum(shares)
