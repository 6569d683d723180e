"""The bridge between the twins, and from them to the formats of other tools.

tree      parameters as a flat {dotted path: array}
rules     pairs of paths with an invertible transform; one report of everything that does not fit
stream    conversion tensor by tensor, without holding a model
native    jaxlm <-> torchref
hf/       Hugging Face directories, one rule table per family
gguf_*    GGUF of the llama architecture
gptoss*   the .pt checkpoints of gptoss;  pt_file: a plain state dict
onnx_*    an ONNX graph with a cache, and its runner
peft_*    LoRA adapters;  adapters: their directories and merging
optstate  optimizer state across frameworks: a run started in one continues in the other
targets   a TARGET of a command line, opened;  writers: what export writes;  prove: is it the same model?
parity/   are they the same model? rungs from the configuration to decoded tokens, in float64, float32 and bfloat16
"""
