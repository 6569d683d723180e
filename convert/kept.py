"""source/ of a model directory: the files of the format that the model was imported from."""

from pathlib import Path
from typing import Any

from jaxlm.config import InputError
from jaxlm.json_file import read_object

SOURCE, CONFIG, TOKENIZER = "source", "config.json", "tokenizer.json"
VOCABULARY = (TOKENIZER, "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")


def kept(directory: Path) -> tuple[dict[str, Any] | None, dict[str, Path]]:
    """What an import left in source/: Hugging Face's config.json and the other files by name.

    A tokenizer.json of the directory that is another one than the import's takes its place, and that of its vocabulary
    files. Raises InputError where the config is damaged.
    """
    folder = directory / SOURCE
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    carried = {p.relative_to(folder).as_posix(): p for p in files}
    config, own = carried.pop(CONFIG, None), directory / TOKENIZER
    if TOKENIZER in carried and own.is_file() and own.read_bytes() != carried[TOKENIZER].read_bytes():
        carried = {name: p for name, p in carried.items() if name not in VOCABULARY} | {TOKENIZER: own}
    try:
        return (None if config is None else read_object(config)), carried
    except ValueError as error:
        raise InputError(f"{config}: {error}") from None
