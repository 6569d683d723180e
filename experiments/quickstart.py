"""The whole way in one command: train a mixture-of-experts decoder on real text, sample, export, prove.

    python -m experiments.quickstart                 # what `make demo` runs; about five minutes on two CPU cores
    python -m experiments.quickstart quickstart-dense --train.steps 100

Trains a tokenizer and the model on the default corpus (the Python standard library), prints training and validation
loss beside two baselines, two samples, and the float64 agreement of logits, loss and every gradient between JAX and
PyTorch. Everything is written to runs/quickstart; an older run there is moved aside, never overwritten.
"""

import json
from pathlib import Path

import numpy as np

from convert.targets import Contents, Target
from experiments.cli import main_guard, need, parse_run, say
from experiments.pretrain import Trained, check_devices, check_inputs, pretrain
from jaxlm.config import ConfigError
from jaxlm.data.baselines import bigram_loss, gzip_bits_per_byte
from jaxlm.host_memory import keep_memory
from jaxlm.live_plots import LivePlots
from jaxlm.metrics import bits_per_byte
from jaxlm.run_dir import move_aside
from jaxlm.tensor_file import Lazy

PROMPTS = ("    def __init__(self, ", "import os\n")


def main(argv: list[str]) -> int:
    """Entry point; exit code 1 when the model loses against the bigram table or the frameworks disagree."""
    options = parse_run(argv, "python -m experiments.quickstart", __doc__ or "", default="quickstart")
    if options.framework != "jax":
        raise ConfigError(
            "quickstart compares both frameworks and trains in JAX; use experiments.pretrain for torch"
        )
    if options.run.data.mixture:
        raise ConfigError(
            "quickstart counts its baselines on one text; use experiments.pretrain for a mixture"
        )
    if options.launch.several:
        raise ConfigError("quickstart runs in one process; use experiments.pretrain for --launch")
    need("torch")
    from convert.parity.report import write_report
    from convert.prove import export_and_prove

    keep_memory()
    check_devices(options.run, options.framework)
    check_inputs(options.run)  # bad input must not move anything
    path = Path(options.run_dir or f"runs/{options.preset}")
    if path.exists() and not options.resume:
        say(f"{path} is kept as {move_aside(path)}")
    trained = pretrain(options)
    if trained.result.stopped_by:
        return 0
    beaten = compare_with_baselines(trained)
    print_samples(trained)
    parity = export_and_prove(as_trained(trained), path / "torchref")
    write_report(parity, trained.directory.report.parent)
    print("\n" + "\n".join(parity.lines()))
    print(f"\neverything is in {path}: metrics.jsonl, plots/, checkpoints/, samples.txt, torchref/, parity/")
    return 0 if beaten and parity.passed else 1


def as_trained(trained: Trained) -> Target:
    """The parameters in memory as a target: what was trained, not what a checkpoint made of it."""
    tensors = {name: Lazy.of(np.asarray(x)) for name, x in trained.engine.params.items()}
    return Target(trained.directory.path, trained.run.model, None, "latest", "jaxlm", Contents(tensors))


def compare_with_baselines(trained: Trained) -> bool:
    """Prints losses beside a bigram table on the same tokens and gzip; True when the model beats the table."""
    run, data, result = trained.run, trained.data, trained.result
    train, val = data.train[0], data.val[0]
    seen = min(len(train), result.step * run.train.batch_size * run.train.seq_len)
    say("counting bigrams for the baseline")
    bigram = bigram_loss(train, val, run.model.vocab_size, seen)
    text = data.tokenizer.decode_bytes(val[0 : len(val)])
    bytes_per_token = len(text) / len(val)
    gzip = gzip_bits_per_byte(text)
    trained.directory.baselines.write_text(json.dumps({"bigram": bigram}) + "\n", encoding="utf-8")
    rows = [
        ("training loss (last step)", result.loss),
        ("validation loss", result.val_loss),
        (f"smoothed bigram table on the same {seen:,} tokens", bigram),
    ]
    print(
        f"\n{result.step * run.train.batch_size * run.train.seq_len:,} tokens seen   nats per token   bits per byte"
    )
    for name, nats in rows:
        print(f"  {name:<52} {nats:8.4f} {bits_per_byte(nats, bytes_per_token):12.4f}")
    print(f"  {'gzip -9 of the validation text (shown, not a target)':<52} {'':8} {gzip:12.4f}")
    beaten = result.val_loss < bigram
    verdict = "beats the bigram table by" if beaten else "DOES NOT BEAT the bigram table:"
    print(f"  the model {verdict} {bigram - result.val_loss:+.4f} nats per token")
    if run.train.plots:
        plots = LivePlots(trained.directory.path)
        plots()
        plots.close()
    return beaten


def print_samples(trained: Trained) -> None:
    """Two continuations, printed and kept in samples.txt."""
    from jaxlm.generate import generate
    from jaxlm.model import Split, abstract_model

    tokenizer, model = trained.data.tokenizer, trained.run.model
    room = model.context - max(len(tokenizer.encode(prompt)) for prompt in PROMPTS)
    seed = trained.run.train.seed
    settings = {"temperature": 0.8, "top_k": 40, "seed": seed, "max_new_tokens": min(64, room), "stop": ()}
    split = Split(abstract_model(model).graphdef, trained.engine.params)
    answers = generate(split, tokenizer, PROMPTS, **settings)
    texts = [prompt + best.text for prompt, (best,) in zip(PROMPTS, answers, strict=True)]
    titles = [f"--- {prompt!r}, temperature 0.8, top-k 40" for prompt in PROMPTS]
    body = "\n".join(f"{title}\n{text}" for title, text in zip(titles, texts, strict=True))
    print(f"\n{body}")
    trained.directory.samples.write_text(body + "\n", encoding="utf-8")


if __name__ == "__main__":
    main_guard(main)
