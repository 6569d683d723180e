"""The tokenizer files that `AutoTokenizer` opens, in transformers 4 and 5, with exactly our ids."""

from pathlib import Path
from typing import Any

from convert.specials import TEMPLATE, Specials, of_tokenizer
from jaxlm.model_dir import write_json
from jaxlm.tokenizer import Tokenizer

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


def write_tokenizer(
    tokenizer: Tokenizer, directory: Path, context: int, family: str = "", specials: Specials | None = None
) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json, and a chat template where there are turns.

    context: longest sequence of the model, in tokens. family: the model_type of the config.json beside it. specials:
    None = what the tokenizer's own names say.
    """
    directory, specials = Path(directory), specials or of_tokenizer(tokenizer)
    tokenizer.save(directory / "tokenizer.json")
    ids = (("bos", specials.bos), ("eos", specials.eos[0] if specials.eos else None), ("pad", specials.pad))
    named = {f"{role}_token": tokenizer.decode([i]) for role, i in ids if i is not None}
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
    if specials.chat_template is not None:
        settings["chat_template"] = specials.chat_template
        (directory / TEMPLATE).write_text(specials.chat_template, encoding="utf-8")
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / "special_tokens_map.json", named)
