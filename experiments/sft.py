"""Supervised fine-tuning: a model learns to answer from conversations, all of its weights or an adapter.

    python -m experiments.sft runs/quickstart --data chats.jsonl --optim.lr 1e-4
    python -m experiments.sft Llama-3.1-8B --data chats.jsonl --lora.rank 16 --quant nf4 --train.dtype bfloat16
    python -m experiments.sft runs/quickstart --data chats.jsonl --optim.lr 1e-4 --epochs 4 --resume

TARGET is a run (of LoRA: base and adapter merged), a model directory (of jaxlm, torchref, Hugging Face) or a .gguf.
Data are conversations: messages, ShareGPT, instruction and response, OpenOrca, UltraChat. Loss is on what the assistant
says, its end-of-turn token included. Printed first: what the data are and how many tokens carry loss, one example with
them in colour, and what is trained. The run directory holds config.json, env.json, tokenizer.json, metrics.jsonl,
plots/, checkpoints/, samples.txt (answers to held-out prompts at every validation) and, with --lora.rank, adapter/.
"""

from experiments.cli import main_guard
from experiments.tuning import tune
from experiments.tuning_options import SftOptions, parse_options


def main(argv: list[str]) -> int:
    """Entry point."""
    tune(parse_options(SftOptions, argv, "python -m experiments.sft", __doc__ or ""))
    return 0


if __name__ == "__main__":
    main_guard(main)
