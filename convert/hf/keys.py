"""Keys of a config.json that say nothing about the numbers a model computes, or that must say one thing.

Every key is read, stands here, or is refused: a key that nobody knows may well change the model.
"""

from typing import Any

_GENERATION = (
    "max_length",
    "min_length",
    "max_new_tokens",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "num_return_sequences",
    "output_scores",
    "return_dict_in_generate",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
)

INERT: dict[str, str] = {
    **dict.fromkeys(_GENERATION, "a setting of generation, from when config.json held them"),
    **dict.fromkeys(
        (
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "sep_token_id",
            "unk_token_id",
            "cls_token_id",
            "mask_token_id",
        ),
        "an id for tokenizing and stopping",
    ),
    **dict.fromkeys(("decoder_start_token_id", "prefix", "tokenizer_class"), "a setting of the tokenizer"),
    **dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type"), "read by classifiers only"),
    **dict.fromkeys(("finetuning_task", "task_specific_params"), "says what the model was tuned for"),
    **dict.fromkeys(
        ("name_or_path", "_name_or_path", "_commit_hash", "transformers_version"), "says where it is from"
    ),
    **dict.fromkeys(
        ("unsloth_fixed", "unsloth_version", "is_llama_config", "transformers.js_config"),
        "says which tool wrote it",
    ),
    **dict.fromkeys(
        ("use_cache", "return_dict", "output_attentions", "output_hidden_states", "num_logits_to_keep"),
        "what a call returns",
    ),
    **dict.fromkeys(("output_router_logits", "tie_last_hidden_states", "torchscript"), "what a call returns"),
    **dict.fromkeys(
        (
            "attn_implementation",
            "_attn_implementation",
            "_attn_implementation_autoset",
            "_flash_attn_2_enabled",
        ),
        "which kernel runs",
    ),
    **dict.fromkeys(("experts_implementation", "_experts_implementation"), "which kernel runs"),
    **dict.fromkeys(
        ("gradient_checkpointing", "tf_legacy_loss", "use_bfloat16", "neftune_noise_alpha"),
        "read by training code only",
    ),
    "pretraining_tp": "splits products into slices that are added again",
    "max_sequence_length": "a second name of the context that no class reads",
    "is_decoder": "these classes are decoders whatever it says",
    "dtype": "how the weights are stored; the tensors say it themselves",
    "torch_dtype": "the older name of dtype",
}

TRAINING = {  # read by transformers in training only, and not carried over unless zero
    "attention_dropout": "dropout of attention probabilities",
    "router_jitter_noise": "noise on the router's input",
}

FIXED: dict[str, tuple[Any, ...]] = {  # key -> values under which the class computes what it computes here
    "hidden_act": ("silu",),
    "partial_rotary_factor": (None, 1, 1.0),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
    "quantization_config": (None,),
    "auto_map": (None, {}),
    "per_layer_config": (None, {}),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (None, False),
    "chunk_size_feed_forward": (None, 0),
    "pruned_heads": (None, {}),
    # Read by some families; where the class has no such key, these are what it does.
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "num_experts": (None,),
    "num_local_experts": (None,),
    "shared_expert_intermediate_size": (None, 0),
}
# Keys that only say something beside one that is read, and nothing where that one is absent.
IDLE = ("max_window_layers",)

WHY = {  # what a refused value would mean
    "quantization_config": "quantised weights are not read; save the model in bfloat16 or float32",
    "auto_map": "it names code of its own, which may compute something else",
    "hidden_act": "only SwiGLU with silu is",
    "partial_rotary_factor": "heads are rotated whole",
}
