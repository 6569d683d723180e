"""The same decoder in plain PyTorch, written to be read beside jaxlm: same files, classes, order and argument names.

    layers <- attention, moe <- model <- loss, generate <- optim, checkpoint <- train <- engine

Imports torch, numpy, safetensors and of jaxlm only what is free of any framework: config, presets, tokenizer, count
and rope_table. Batches come in as numpy arrays. Never jax: after `import torchref.model`, jax is not loaded.
The dimension letters are those of jaxlm.
"""
