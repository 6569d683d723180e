"""jaxlm: decoder-only language models in JAX/Flax, provably the same model in PyTorch.

Package map (imports go from right to left only; a test reads the AST):

    config, presets, tokenizer, rope_table, sampling, supervise <- data, text, chat, windows <- sharding, distributed
        <- layers <- dispatch <- grouped_kernels <- grouped <- attention, moe <- model <- loss, logits, cached, beam,
        generate, evaluate, quant <- optim, guard, vitals, checkpoint, metrics, reporter, sinks <- train <- loop,
        plan, ablation

`config`, `presets`, `count`, `tokenizer`, `rope_table`, `sampling`, `text` and `windows` import neither jax nor torch:
`torchref`, the PyTorch column, shares them.

Dimension legend, used in annotations, einsum strings and name suffixes in both frameworks:

    B batch        T query length   S key/cache length   D model width
    N query heads  K kv heads       G = N/K              H head dim
    F ffn width    V vocabulary     E experts            A active experts
    L layers       R LoRA rank      M microbatches       P tokens of a batch (B*T)
"""
