"""The tokenizer files that `AutoTokenizer` opens, in transformers 4 and 5, with exactly our ids."""

import json
from pathlib import Path
from typing import Any

from jaxlm.tokenizer import Tokenizer, TokenizerError

# What an import carries along verbatim, and an export of the same model writes back.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)

# ChatML, as in the release notes of OpenAI's ChatGPT API: each message between <|im_start|>role and <|im_end|>.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids that config.json and generation_config.json name."""
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def write_tokenizer(tokenizer: Tokenizer, directory: Path, context: int, family: str = "") -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json, and a chat template where there are turns.

    context: longest sequence of the model, in tokens. family: the model_type of the config.json beside it.
    """
    directory = Path(directory)
    tokenizer.save(directory / "tokenizer.json")
    named = {
        f"{role}_token": tokenizer.decode([i])
        for role, i in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id))
        if i is not None
    }
    settings: dict[str, Any] = {
        # The only name under which transformers 4 and 5 both take tokenizer.json as it is, whatever the model_type.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        # Off, or decoding removes spaces before punctuation.
        "clean_up_tokenization_spaces": False,
        **named,
    }
    if family == "qwen2":
        # To transformers 5 this model_type means Qwen2's own tokenizer whatever is said here: it keeps the tokens of
        # tokenizer.json and puts its own normalisation, splitting and special tokens around them. This key, whose name
        # says more than it does, makes it take the file whole; nothing is run.
        settings |= {"trust_remote_code": True, "unk_token": None, "pad_token": named.get("pad_token")}
    if _end_of_turn(tokenizer) is not None:
        settings["chat_template"] = CHAT_TEMPLATE
        (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / "special_tokens_map.json", named)


def _end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The id of <|im_end|> where the tokenizer has both marks of a turn."""
    try:
        tokenizer.special_id("<|im_start|>")
        return tokenizer.special_id("<|im_end|>")
    except TokenizerError:
        return None


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: the special ids; a turn's end ends an answer too."""
    ids: dict[str, Any] = {key: value for key, value in special_ids(tokenizer).items() if value is not None}
    end = _end_of_turn(tokenizer)
    if end is not None:
        ids["eos_token_id"] = [end] if tokenizer.eos_id in (None, end) else [tokenizer.eos_id, end]
    return ids


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes an object as the files on the hub are written."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
