"""Fine-tuning: each method is a loss and a batch for the one training loop.

    lora   low-rank adapters: the adapted decoder, fresh factors, merging
    sft    supervised fine-tuning: the task of all weights, or of an adapter on a frozen base
    dpo    direct preference optimisation: log-probabilities, loss, its task
    tasks  the task of a run

Twins of lora, sft and dpo: torchref/finetune.
"""
