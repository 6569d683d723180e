"""What travels with the weights: the tokenizer, its special tokens, and the files of the format a model came from."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.kept import CONFIG, SOURCE, TOKENIZER, VOCABULARY
from convert.specials import GENERATION, SETTINGS, TEMPLATE
from convert.targets import Target
from jaxlm import model_dir
from jaxlm.config import ConfigError, InputError, ModelConfig
from jaxlm.tokenizer import Tokenizer, TokenizerError, template_file


def keep(target: Target, out: Path, dtype: str, with_tokenizer: bool) -> tuple[str, ...]:
    """Writes tokenizer.json and source/ into a model directory; a note where there is no tokenizer.

    Raises ConfigError where the tokenizer has ids that the model does not.
    """
    contents, folder = target.contents, out / SOURCE
    if contents.raw is not None or contents.carried or contents.specials is not None:
        folder.mkdir()
    if contents.raw is not None:
        _keep_config(target, contents.raw, dtype, folder / CONFIG)
    if contents.specials is not None and not contents.carried:
        model_dir.write_json(folder / GENERATION, contents.specials.generation_config())
        if contents.specials.adds_bos:
            model_dir.write_json(folder / SETTINGS, {"add_bos_token": True})
        if contents.specials.chat_template is not None:
            (folder / TEMPLATE).write_text(contents.specials.chat_template, encoding="utf-8")
    for name, path in carried(target, with_tokenizer).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    return _keep_tokenizer(target, out) if with_tokenizer else ()


def carried(target: Target, with_tokenizer: bool) -> dict[str, Path]:
    """The files of an imported model that go along; how it generates is no part of its tokenizer."""
    found: Mapping[str, Path] = target.contents.carried
    return {name: path for name, path in found.items() if with_tokenizer or name == GENERATION}


def tokenizer_of(target: Target) -> Tokenizer | None:
    """The tokenizer of a target, None where it has none. Raises TokenizerError where it cannot be read."""
    try:
        return target.tokenizer
    except TokenizerError:
        raise
    except InputError:
        return None


def require_vocabulary(target: Target, config: ModelConfig) -> None:
    """Raises ConfigError where the tokenizer, if it can be read, has ids that the model has no row for."""
    try:
        tokenizer = tokenizer_of(target)
    except TokenizerError:
        return
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids in a model of vocab_size={config.vocab_size}; "
            "--no-tokenizer leaves it out"
        )


def _keep_config(target: Target, raw: dict[str, Any], dtype: str, path: Path) -> None:
    """The config.json that a model was imported with: byte for byte, unless it would name another dtype."""
    folder = target.path if target.kind == "hf" else target.path / SOURCE
    named = {key: dtype for key in ("dtype", "torch_dtype") if dtype and key in raw}
    if named or not (folder / CONFIG).is_file():
        model_dir.write_json(path, raw | named)
    else:
        shutil.copyfile(folder / CONFIG, path)


def _keep_tokenizer(target: Target, out: Path) -> tuple[str, ...]:
    """Copies tokenizer.json as it is, whoever can read it, and the chat template that belongs to it."""
    require_vocabulary(target, target.config)
    if target.foreign is not None and target.foreign.tokenizer is not None:
        target.foreign.tokenizer.save(out / TOKENIZER)
        return ()
    folder = target.path if target.path.is_dir() else target.path.parent
    found = target.contents.carried.get(TOKENIZER) or folder / TOKENIZER
    if found.is_file():
        shutil.copyfile(found, out / TOKENIZER)
        if TOKENIZER not in target.contents.carried and template_file(found).is_file():
            shutil.copyfile(template_file(found), template_file(out / TOKENIZER))
        return ()
    if set(VOCABULARY) & target.contents.carried.keys():
        return (
            "the tokenizer is of another kind than tokenizer.json: it is carried along, but not read here",
        )
    return ("no tokenizer: there is no tokenizer.json beside the weights",)
