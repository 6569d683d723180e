"""Each number of a line is what the documentation says it is, worked out here by hand."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import RunConfig, TrainConfig
from jaxlm.memory import peak_memory, process_peak_memory
from jaxlm.metrics import VOLATILE, Throughput
from jaxlm.presets import preset
from jaxlm.reporter import Reporter, host_values, text_bytes_per_token
from jaxlm.tune_config import TuneConfig, TuneRun

TOKENS = 8 * 16  # of a step of `a_run`


class Lines(list[dict[str, Any]]):
    """A sink that keeps its lines."""

    def write(self, row: Any) -> None:
        """Keeps the line."""
        self.append(dict(row))


def a_run(log_every: int = 1) -> RunConfig:
    """8 sequences of 16 tokens a step."""
    train = TrainConfig(steps=100, batch_size=8, seq_len=16, log_every=log_every)
    return dataclasses.replace(preset("quickstart-dense"), train=train)


def a_reporter(run: RunConfig, clock: list[float], **more: Any) -> tuple[Reporter, Lines]:
    """One with 3 GFLOP a token on a device of 1 PFLOP/s, and where its lines are."""
    lines = Lines()
    meter = Throughput(TOKENS, clock=lambda: clock[0])
    return Reporter(run, lines, meter, 3e9, 1e15, **more), lines


def test_numbers_of_a_line_by_hand() -> None:
    """Steps of 0.5 ms at 128 tokens: 256,000 tokens/s, MFU 0.768; 2 ln 2 nats at 4 bytes a token: half a bit a byte."""
    clock = [0.0]
    report, lines = a_reporter(
        a_run(), clock, bytes_per_token=4.0, val_bytes_per_token=2.0, device_memory=lambda: 7
    )
    for step in (1, 2):
        clock[0] += 0.0005 if step > 1 else 30.0  # the first step compiles
        extra = {"val_loss": math.log(8)} if step == 2 else {}
        assert report(step, {"loss": 2 * math.log(2), "grad_norm": 3.0}, **extra)[0] == step
    first, second = lines
    assert first["tokens_per_second"] is None and "mfu" not in first and "val_loss" not in first
    assert second["tokens_per_second"] == pytest.approx(256_000, rel=1e-9)
    assert second["mfu"] == pytest.approx(256_000 * 3e9 / 1e15, rel=1e-9) == pytest.approx(0.768, rel=1e-9)
    assert (second["step"], second["tokens"], second["flops"]) == (2, 256, 256 * 3e9)
    assert second["perplexity"] == pytest.approx(4, rel=1e-12)
    assert second["bits_per_byte"] == pytest.approx(0.5, rel=1e-12)
    assert second["val_perplexity"] == pytest.approx(8, rel=1e-12)
    assert second["val_bits_per_byte"] == pytest.approx(1.5, rel=1e-12)
    assert (second["grad_norm"], second["peak_memory_bytes"]) == (3.0, 7)


def test_what_is_not_known_is_left_out() -> None:
    """Without a peak there is no MFU, without bytes per token no bits per byte, without a counter no memory."""
    lines = Lines()
    report = Reporter(a_run(), lines, Throughput(TOKENS), None, None)
    report(1, {"loss": 1.0}, val_loss=1.0)
    assert set(lines[0]) == {
        *("step", "tokens", "loss", "perplexity", "tokens_per_second", "val_loss", "val_perplexity")
    }


def test_a_line_holds_the_values_of_its_own_step() -> None:
    """With log_every 3: steps 3, 6, the skipped 4 and the validated 5 are written; of others the loss is shown."""
    report, lines = a_reporter(a_run(log_every=3), [0.0])
    for step in range(1, 7):
        metrics = {"loss": float(step), "skipped": int(step == 4), "skips": int(step >= 4), "grad_norm": 1.0}
        _, shown = report(step, metrics, **({"val_loss": 0.5} if step == 5 else {}))
        assert shown["loss"] == report.loss == float(step)
        assert ("grad_norm" in shown) == (step in (3, 4, 5, 6))
    assert [(line["step"], line["loss"], line["skips"]) for line in lines] == [
        *((3, 3.0, 0), (4, 4.0, 1), (5, 5.0, 1), (6, 6.0, 1))
    ]


def test_losses_that_are_no_numbers_are_reported() -> None:
    """NaN and infinity come out as themselves in every unit, and end nothing."""
    report, lines = a_reporter(a_run(), [0.0], bytes_per_token=4.0)
    report(1, {"loss": math.nan, "skipped": 1})
    report(2, {"loss": math.inf, "skipped": 1})
    assert all(math.isnan(lines[0][key]) for key in ("loss", "perplexity", "bits_per_byte"))
    assert [lines[1][key] for key in ("loss", "perplexity", "bits_per_byte")] == [math.inf] * 3


def test_two_reports_differ_in_volatile_keys_alone() -> None:
    """The same steps at another speed on another machine: all keys but those of VOLATILE are equal, bit by bit."""
    found = []
    for pace, memory in ((0.1, 10), (7.3, 20)):
        clock = [0.0]
        report, lines = a_reporter(a_run(), clock, bytes_per_token=3.7, device_memory=lambda m=memory: m)
        for step in range(1, 30):
            clock[0] += pace
            report(step, {"loss": np.float32(5 / step)}, **({"val_loss": 1.1} if step % 10 == 0 else {}))
        found.append(lines)
    different = {key for a, b in zip(*found) for key in a if a[key] != b[key]}
    assert different == set(VOLATILE)


def test_arrays_of_any_framework_become_numbers() -> None:
    """jax, torch and numpy scalars and matrices, bfloat16 included."""
    torch = pytest.importorskip("torch")
    got = host_values(
        {
            "jax": jnp.asarray(0.1, jnp.float32),
            "half": jnp.asarray(1.5, jnp.bfloat16),
            "load": jnp.asarray([[0.25, 0.75]]),
            "torch": torch.tensor(2.5, requires_grad=True),
            "numpy": np.float64(0.1),
        }
    )
    assert got == {
        "jax": float(np.float32(0.1)),
        "half": 1.5,
        "load": [[0.25, 0.75]],
        "torch": 2.5,
        "numpy": 0.1,
    }


def test_bytes_per_token_of_a_mixture() -> None:
    """Shares weigh the splits' means; without shares their tokens do; a split without text has none."""
    metas = [{"bytes": 400, "tokens": 100}, {"bytes": 200, "tokens": 300}]
    assert text_bytes_per_token(metas[:1]) == 4.0
    assert text_bytes_per_token(metas) == pytest.approx(600 / 400)
    assert text_bytes_per_token(metas, [0.75, 0.25]) == pytest.approx(0.75 * 4 + 0.25 * 2 / 3)
    assert text_bytes_per_token([{"tokens": 5}]) is None
    assert text_bytes_per_token([]) is None


def test_peak_memory_is_in_bytes_and_never_falls() -> None:
    """A buffer of 64 MiB, touched, raises the process's peak to no less; jax on the CPU tells the same."""
    buffer = np.ones(8 * 2**20)
    peak = process_peak_memory()
    assert buffer.nbytes < peak < 2**45
    assert peak_memory() >= peak


def test_the_loss_of_preferences_has_no_perplexity() -> None:
    """It is no token's: neither the training nor the validation loss is given in other units."""
    for method, said in (("sft", True), ("dpo", False)):
        run, lines = TuneRun.of(a_run(), TuneConfig(method, "base")), Lines()
        Reporter(run, lines, Throughput(TOKENS), None, None)(1, {"loss": 0.7}, val_loss=0.6)
        assert ("perplexity" in lines[0], "val_perplexity" in lines[0]) == (said, said)
