"""Direct preference optimisation: a model learns which of two answers is better, without a reward model.

    python -m experiments.dpo runs/chat --data preferences.jsonl --optim.lr 1e-5
    python -m experiments.dpo runs/chat --data preferences.jsonl --lora.rank 16 --dpo.beta 0.1
    python -m experiments.dpo runs/chat --data preferences.jsonl --dpo.loss ipo --dpo.reference stored

TARGET is usually what experiments.sft made. Data are rows with `chosen` and `rejected`, and perhaps `prompt`. What the
policy is held to is TARGET itself: with an adapter, the base without it; else its log-probabilities of every answer,
computed once and kept in reference.npz of the run directory (--dpo.reference frozen keeps a second copy of the weights
instead). metrics.jsonl has rewards, margins and accuracies; the rest of the run directory is that of experiments.sft.
"""

from experiments.cli import main_guard
from experiments.tuning import tune
from experiments.tuning_options import DpoOptions, parse_options


def main(argv: list[str]) -> int:
    """Entry point."""
    tune(parse_options(DpoOptions, argv, "python -m experiments.dpo", __doc__ or ""))
    return 0


if __name__ == "__main__":
    main_guard(main)
