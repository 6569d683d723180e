"""What only a CUDA device can show, in at most nine minutes: parity on the card, then 100 steps of gptoss in bfloat16.

    python -m experiments.gpu_check --out docs/benchmarks        # what `make gpu PYTHON=python3` runs

Makes no environment and needs only jax, flax, optax, orbax, numpy, torch, tokenizers, tiktoken, safetensors, rich,
matplotlib and pytest. Exit code 1 when a check fails, 2 without CUDA.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxlm import compilation

VOCABULARY = (
    32_768  # what the default corpus can fill; the model keeps its own vocabulary, the rest is padding
)
TEST_SECONDS, WARM_UP = 270, 10


def main(argv: list[str]) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="directory of the report")
    parser.add_argument("--steps", type=int, default=100, help="training steps of gptoss")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="sequences of 2,048 tokens per step, at once"
    )
    parser.add_argument("--skip-tests", action="store_true", help="only train")
    options = parser.parse_args(argv)
    if not has_cuda():
        print(
            "error: jax sees no CUDA device here; `make test` runs everything that needs none",
            file=sys.stderr,
        )
        return 2
    failed = 0 if options.skip_tests else run_tests()
    options.out.mkdir(parents=True, exist_ok=True)
    report = train_gptoss(options.steps, options.batch_size, options.out)
    report |= {"tests": "not run" if options.skip_tests else "failed" if failed else "passed"}
    target = options.out / "gptoss-gpu.json"
    target.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in report.items() if k != "losses"}, indent=2))
    print(
        f"written to {target}; `python -m experiments.benchmark --suite h200` measures further, beside PyTorch"
    )
    return 1 if failed or report["losses"][-1] >= report["losses"][0] else 0


def has_cuda() -> bool:
    """Asked in another process: this one must not take the card's memory before the tests have run."""
    probe = "import jax; raise SystemExit(0 if any(d.platform == 'gpu' for d in jax.devices()) else 1)"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    return subprocess.run([sys.executable, "-c", probe], capture_output=True, env=environment).returncode == 0


def run_tests() -> int:
    """The tests that carry the gpu marker."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-s", "tests/gpu"]
    command += [
        "-o",
        "addopts=--import-mode=importlib",
        "-o",
        "filterwarnings=default",
        "-p",
        "no:cacheprovider",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | {"JAXLM_TEST_GPU": "1"}
    try:
        return subprocess.run(command, env=environment, timeout=TEST_SECONDS).returncode
    except subprocess.TimeoutExpired:
        print(f"the tests did not end within {TEST_SECONDS} s", file=sys.stderr)
        return 1


def train_gptoss(steps: int, batch_size: int, out: Path) -> dict[str, Any]:
    """Trains gptoss on the default corpus and reports speed and memory; one optimizer step is one dispatch."""
    os.environ.pop("JAX_PLATFORMS", None)
    for line in compilation.set_up():
        print(f"warning: {line}", file=sys.stderr)
    import jax
    import numpy as np

    from jaxlm.count import flops_per_token
    from jaxlm.data.loader import LoaderSettings, plain_batches
    from jaxlm.metrics import mfu, peak_flops
    from jaxlm.optim import as_arrays, scalars
    from jaxlm.presets import preset
    from jaxlm.train import init_state, make_train_step, place_batch

    run = preset("gptoss")
    optim = dataclasses.replace(run.optim, warmup_steps=20, decay_steps=max(steps, 20))
    train = dataclasses.replace(run.train, steps=steps, batch_size=batch_size, accumulation=1)
    run = dataclasses.replace(run, optim=optim, train=train)
    stores = [tokens_of_default_corpus(out, train.seq_len)]
    batches = plain_batches(stores, LoaderSettings(train.seq_len, batch_size, seed=0, shuffle=True))
    state, step = init_state(run), make_train_step(run)
    losses, seconds = [], []
    started = time.perf_counter()
    for i in range(steps):
        begun = time.perf_counter()
        state, metrics = step(state, place_batch(next(batches)), as_arrays(scalars(run.optim, i), np.float32))
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - begun)
        if i % 10 == 9:
            print(f"step {i + 1}/{steps}  loss {losses[-1]:.3f}  {seconds[-1]:.3f} s", flush=True)
    device = jax.devices()[0]
    tokens = batch_size * train.seq_len
    typical = statistics.median(seconds[WARM_UP:])
    rate = tokens / typical
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "versions": {"python": sys.version.split()[0], "jax": jax.__version__},
        "preset": "gptoss",
        "tokens_per_step": tokens,
        "compile_and_first_step_seconds": seconds[0],
        "step_seconds_median": typical,
        "tokens_per_second": rate,
        "mfu": mfu(
            rate, flops_per_token(run.model, train.seq_len), peak_flops(device.device_kind, "bfloat16")
        ),
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "total_seconds": time.perf_counter() - started,
        "losses": losses,
    }


def tokens_of_default_corpus(out: Path, seq_len: int) -> Any:
    """The standard library, tokenised by a vocabulary trained on it here."""
    from jaxlm.data.corpus import open_corpus
    from jaxlm.data.prepare import prepare
    from jaxlm.data.shards import open_shards
    from jaxlm.tokenizer import Tokenizer

    corpus = open_corpus("", "text")
    print(
        f"training a tokenizer of {VOCABULARY:,} tokens on {corpus.description}; gptoss's other ids stay unused",
        flush=True,
    )
    tokenizer = Tokenizer.train((d.text for d in corpus.documents("train", 0.05)), VOCABULARY)
    folder = out / "data"
    prepare(corpus, tokenizer, folder, 0.05, min_tokens=seq_len + 1)
    return open_shards(folder / "train", VOCABULARY)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
