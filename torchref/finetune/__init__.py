"""Fine-tuning in plain PyTorch: the twins of jaxlm.finetune.lora, sft and dpo."""
