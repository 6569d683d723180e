"""Moves models between formats, tensor by tensor, and checks what it moved.

    python -m convert inspect TARGET                what it holds, and what it can become
    python -m convert import SRC DST                Hugging Face, GGUF, gptoss .pt, torchref -> a jaxlm directory
    python -m convert export TARGET --to hf DST     also torch, pt, gguf, onnx, gptoss, jaxlm
    python -m convert import PEFT DST --base TARGET a LoRA adapter by peft; export ADAPTER --to peft DST is the way back
    python -m convert export RUN --to peft DST      the adapter that a LoRA run trained; any other format has it merged
    python -m convert verify DIR                    every tensor against the manifest's hashes

TARGET is a run, a model directory (jaxlm, torchref, Hugging Face), a .gguf or a gptoss .pt file. DST appears when it is
whole, with a manifest.json. `COMMAND --help` lists a command's options. Exit codes: 0 done and right; 1 a check failed;
2 bad input or a damaged source.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from convert import key_report, prove
from convert.targets import Target, open_target
from convert.writers import WRITERS, Choices, Dtype, Format, dtype_of, gguf_kind, gguf_tokenizer
from jaxlm import model_dir
from jaxlm.cli import main_guard, need, parse, say
from jaxlm.config import ConfigError, InputError, nearest, to_dict
from jaxlm.count import param_count, require_memory
from jaxlm.estimate_lora import factor_count
from jaxlm.tokenizer import TokenizerError

if TYPE_CHECKING:
    from convert.adapters import OpenedAdapter


@dataclass(frozen=True)
class Common:
    """Options of import and export."""

    dtype: Dtype = ""  # round the weights to this; '' = as they are stored; q8_0 for GGUF
    tokenizer: bool = True  # carry the tokenizer over
    optimizer: bool = (
        True  # carry AdamW's moments and step over, where there are any and the format has a place
    )
    max_shard_gb: float = 5.0  # largest file of weights, in 10^9 bytes
    parity: bool = False  # open the result again and compare activations, loss and gradients with the source
    dry_run: bool = False  # say what would go where, write nothing
    overwrite: bool = False  # put the result in the place of what is there

    def choices(self, **more: Any) -> Choices:
        """The same for a writer. Raises ConfigError on a size that cannot be."""
        if not self.max_shard_gb > 0:
            raise ConfigError(f"--max-shard-gb {self.max_shard_gb} must be positive")
        size = int(min(self.max_shard_gb, 1e9) * 1e9)
        return Choices(self.dtype, self.tokenizer, self.optimizer, max_shard_bytes=max(1, size), **more)


@dataclass(frozen=True)
class ImportOptions(Common):
    """Options of import."""

    source: Annotated[str, tyro.conf.Positional] = (
        ""  # Hugging Face, torchref or peft directory, .gguf, gptoss .pt
    )
    destination: Annotated[str, tyro.conf.Positional] = ""  # the new jaxlm directory
    base: str = ""  # of an adapter by peft: the model that it belongs to


@dataclass(frozen=True)
class ExportOptions(Common):
    """Options of export."""

    target: Annotated[str, tyro.conf.Positional] = ""  # run, model directory or file
    destination: Annotated[str, tyro.conf.Positional] = ""  # the new directory
    to: Format | Literal["peft", ""] = ""  # the format; peft is for adapters
    adapter: str = ""  # merge this LoRA adapter, ours or peft's, into the weights first
    checkpoint: Literal["latest", "best"] = "latest"  # of a run
    family: str = ""  # hf: llama, mistral, mixtral, qwen2, …; '' = the first that computes the same
    experts: Literal["", "per_expert", "fused"] = (
        ""  # '' = hf: per_expert, for transformers 4 and 5; peft: fused
    )


@dataclass(frozen=True)
class InspectOptions:
    """Options of inspect."""

    target: Annotated[str, tyro.conf.Positional]  # run, model directory or file
    checkpoint: Literal["latest", "best"] = "latest"  # of a run
    tensors: bool = False  # list every tensor too


@dataclass(frozen=True)
class VerifyOptions:
    """Options of verify."""

    directory: Annotated[str, tyro.conf.Positional]  # what import or export wrote


def main(argv: list[str]) -> int:
    """Entry point."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise ConfigError(
            f"unknown command {name!r}{nearest(name, COMMANDS)}; commands are {', '.join(COMMANDS)}"
        )
    kind, command = COMMANDS[name]
    return command(parse(kind, rest, f"python -m convert {name}", command.__doc__ or ""))


def import_model(options: ImportOptions) -> int:
    """Reads a model of another format into a jaxlm directory that every entry point opens."""
    _require_paths("import SRC DST", options.source, options.destination)
    if options.dtype == "q8_0":
        raise ConfigError("--dtype q8_0 is for --to gguf only; choose float32, bfloat16, float16 or float64")
    from convert import adapters

    if adapters.is_peft(Path(options.source)):
        opened = adapters.open_adapter(
            Path(options.source), open_target(options.base) if options.base else None
        )
        return _write_adapter(
            opened, options, "jaxlm-adapter", lambda out, p: adapters.write_ours(opened, out, p)
        )
    target = open_target(options.source, optimizer=options.optimizer)
    if options.dry_run:
        return _report(target, "jaxlm", key_report.source_table(target), options, inverse=True)
    return _write(target, "jaxlm", options, options.choices())


def export_model(options: ExportOptions) -> int:
    """Writes a model in another format, ready for the tools that read it."""
    _require_paths("export TARGET --to FORMAT DST", options.target, options.destination)
    if not options.to:
        raise ConfigError(f"name the format: --to {', '.join(WRITERS)}, peft")
    from convert import adapters

    if options.to == "peft":
        opened = _bare(options)
        layout = options.experts or "fused"
        return _write_adapter(
            opened, options, "peft", lambda out, p: adapters.write_peft(opened, out, layout, p)
        )
    target = open_target(options.target, options.checkpoint, options.optimizer)
    if options.adapter:
        target = adapters.merged(target, adapters.open_adapter(Path(options.adapter), target))
    choices = options.choices(family=options.family or None, experts=options.experts or None)
    if options.dry_run:
        pairs = key_report.table(options.to, target.config, choices.family, choices.experts)
        return _report(target, options.to, pairs, options, inverse=False)
    return _write(target, options.to, options, choices)


def _bare(options: ExportOptions) -> "OpenedAdapter":
    """The adapter that is to be exported by itself: of a directory, or of a run."""
    from convert import adapters

    if options.adapter:
        raise ConfigError("--to peft takes an adapter as its target; leave --adapter out")
    path = Path(options.target)
    if adapters.is_adapter(path) or adapters.is_peft(path) or not (path / model_dir.CONFIG).is_file():
        return adapters.open_adapter(path)
    return adapters.adapter_of(open_target(path, options.checkpoint, optimizer=False))


def inspect_model(options: InspectOptions) -> int:
    """Says what a target holds: architecture, sizes, dtypes, tokenizer, and the formats that can express it."""
    target = open_target(options.target, options.checkpoint)
    contents = target.contents
    kinds = sorted({str(t.dtype) for t in contents.tensors.values()})
    nbytes = sum(_nbytes(t) for t in contents.tensors.values())
    family = f" ({contents.family})" if contents.family else ""
    print(f"{target.path}: {target.kind}{family}")
    print(f"parameters: {param_count(target.config):,} in {len(contents.tensors)} tensors")
    if (line := _adapter_line(target)) is not None:
        print(f"adapter: {line}")
    print(f"stored as {', '.join(kinds)}, {_size(nbytes)}")
    print(f"optimizer state: {'step ' + str(contents.moments.step) if contents.moments else 'none'}")
    print(f"tokenizer: {_tokenizer_line(target)}")
    print("config:")
    _print_fields(to_dict(target.config), "  ")
    for note in contents.notes:
        print(f"note: {note}")
    print("can become:")
    for format in WRITERS:
        print(f"  {format}: {_expressible(format, target)}")
    if options.tensors:
        for path, tensor in contents.tensors.items():
            print(f"{path}  {list(tensor.shape)}  {tensor.dtype}")
    return 0


def verify_directory(options: VerifyOptions) -> int:
    """Computes every hash of a directory again; exit code 1 names what has changed."""
    directory = Path(options.directory)
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory")
    manifest = model_dir.read_manifest(directory)
    total = sum(t["nbytes"] for t in (manifest or {}).get("tensors", {}).values())
    with _bar("verifying", total) as progress:
        problems, count = model_dir.verify(directory, progress)
    for problem in problems:
        print(problem)
    held = f"{count} tensors in {len((manifest or {}).get('files', {}))} files"
    print(f"{directory}: {held}, {f'{len(problems)} DAMAGED' if problems else 'all as written'}")
    return 1 if problems else 0


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "inspect": (InspectOptions, inspect_model),
    "import": (ImportOptions, import_model),
    "export": (ExportOptions, export_model),
    "verify": (VerifyOptions, verify_directory),
}


def _write(target: Target, format: str, options: Common, choices: Choices) -> int:
    """Writes, proves if asked to, and puts the directory in its place."""
    destination = _require_possible(target, format, options)
    contents = target.contents
    total = sum(_nbytes(t) for t in contents.tensors.values())
    started = time.perf_counter()
    with model_dir.staged(destination, options.overwrite) as staging:
        # What does not fit the smaller dtype is refused by name; numpy's own warning would come before that.
        with _bar(f"writing {format}", total) as progress, np.errstate(over="ignore"):
            written = WRITERS[format](target, staging, choices, progress)
        passed = _proved(target, format, staging, choices) if options.parity else True
        if not passed:
            raise CheckFailed(f"{destination} was not written: it would not be the model that was read")
        name = target.path.resolve().name
        facts = {"source": {"kind": target.kind, "path": name}, "parity": bool(options.parity)}
        model_dir.write_manifest(staging, format, written.tensors, facts)
    seconds = time.perf_counter() - started
    for note in (*contents.notes, *written.notes):
        say(f"note: {note}")
    say(f"written to {destination}: {_size(total)} of weights in {seconds:.1f} s")
    return 0


def _write_adapter(
    opened: "OpenedAdapter",
    options: Common,
    format: str,
    write: Callable[[Path, model_dir.Progress], dict[str, model_dir.Stored]],
) -> int:
    """Writes an adapter, or lists its factors."""
    if options.parity or options.dtype:
        raise ConfigError("--parity and --dtype are for whole models; an adapter is moved as it is")
    if options.dry_run:
        for name, factor in opened.factors.items():
            print(f"{name}  {list(factor.shape)}  {factor.dtype}")
        return 0
    destination = Path(getattr(options, "destination"))  # noqa: B009
    _require_free(opened.path, destination, options.overwrite)
    with model_dir.staged(destination, options.overwrite) as staging:
        stored = write(staging, lambda n: None)
        model_dir.write_manifest(staging, format, stored)
    say(f"written to {destination}: {len(opened.factors)} factors")
    return 0


class CheckFailed(Exception):
    """A check that failed; one line, exit code 1."""


def _proved(target: Target, format: str, staging: Path, choices: Choices) -> bool:
    if format == "onnx":
        passed, line = prove.compare_onnx(target, staging)
        say(line)
        return passed
    report = prove.compare(target.config, target.contents.tensors, staging, dtype_of(choices))
    for line in report.lines():
        say(line)
    return report.passed


def _report(target: Target, format: str, pairs: list[Any], options: Common, inverse: bool) -> int:
    """What would be written."""
    _require_possible(target, format, options)
    contents = target.contents
    for line in key_report.lines(pairs, contents.tensors, inverse):
        print(line)
    rounded = f", rounded to {options.dtype}" if options.dtype else ""
    count = len(pairs) or len(contents.tensors)
    say(f"{count} tensors, none missing, none unused, none misshapen{rounded}; nothing was written")
    if contents.moments is not None:
        goes = options.optimizer and format in ("jaxlm", "torch", "gptoss")
        say(f"AdamW's state of step {contents.moments.step} {'goes along' if goes else 'stays behind'}")
    for note in contents.notes:
        say(f"note: {note}")
    return 0


def _require_possible(target: Target, format: str, options: Common) -> Path:
    """The destination; refuses what needs no writing to be refused, so that a dry run says it too."""
    destination = Path(getattr(options, "destination"))  # noqa: B009
    if options.parity:
        need("torch")
        if options.dtype == "q8_0":
            raise ConfigError("--parity is exact and q8_0 rounds; leave one of them out")
        require_memory(target.config, 8 * prove.COPIES, "leave --parity out, and run verify")
    if format == "gguf":
        gguf_kind(target, options.dtype)
        if options.tokenizer:
            gguf_tokenizer(target)
    elif format == "onnx" and options.dtype not in ("", "float32", "float64"):
        raise ConfigError(f"--dtype {options.dtype} is not for --to onnx; choose float32 or float64")
    else:
        dtype_of(options.choices())
    _require_free(target.path, destination, options.overwrite)
    return destination


def _require_free(source: Path, destination: Path, overwrite: bool) -> None:
    """Refuses a destination that is taken, or whose replacement would cost more than an earlier result."""
    place = destination.resolve()
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{destination} is there already; choose another name, or pass --overwrite")
    if source.resolve().is_relative_to(place):
        raise ConfigError(f"{destination} holds what is read ({source}); --overwrite would remove it")
    if not (place / model_dir.MANIFEST).is_file():
        raise ConfigError(
            f"{destination} was not written by import or export (it has no {model_dir.MANIFEST}); --overwrite "
            "replaces only what was: remove it yourself, or choose another name"
        )


def _require_paths(usage: str, source: str, destination: str) -> None:
    if not source or not destination:
        raise ConfigError(f"two paths are needed: python -m convert {usage}")


@contextmanager
def _bar(what: str, total: int):
    """A progress bar over bytes on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda n: None
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.update(task, advance=n)


def _nbytes(tensor: Any) -> int:
    size = tensor.dtype.itemsize
    for n in tensor.shape:
        size *= n
    return size


def _adapter_line(target: Target) -> str | None:
    """What a LoRA run trained, and on what; None for anything else."""
    tune = getattr(target.run, "tune", None)
    if tune is None or tune.adapter is None:
        return None
    paths = [path for path in target.contents.tensors if tune.adapter.adapts(path)]
    ranks = "/".join(map(str, sorted({tune.adapter.rank_alpha(path)[0] for path in paths})))
    count = factor_count(target.config, tune.adapter)
    return f"rank {ranks} on {len(paths)} weights, {count:,} parameters; base {tune.base}"


def _tokenizer_line(target: Target) -> str:
    try:
        return f"{target.tokenizer.vocab_size:,} ids"
    except TokenizerError as error:
        return f"is carried over as it is, but cannot be used here: {error}"
    except InputError as error:
        return str(error).splitlines()[0]


def _expressible(format: str, target: Target) -> str:
    try:
        pairs = key_report.table(format, target.config)
    except InputError as error:
        return f"no: {_joined(error)}"
    if format == "hf":
        from convert.hf.express import require_family

        return f"yes, {require_family(target.config).name}, {len(pairs)} tensors"
    if format == "gguf":
        try:
            gguf_tokenizer(target)
        except InputError as error:
            return f"yes, without its tokenizer: {_joined(error)}"
    return "yes"


def _joined(error: InputError) -> str:
    """The lines of a message as one."""
    return "; ".join(line for line in str(error).splitlines() if line).replace(":; ", ": ")


def _size(nbytes: int) -> str:
    """Bytes for people: 2.5 kB, 7.19 GB."""
    unit, name = next(
        (u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")) if nbytes >= u or u == 1
    )
    return f"{nbytes / unit:.3g} {name}"


def _print_fields(fields: dict[str, Any], indent: str) -> None:
    for name, value in fields.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print_fields(value, indent + "  ")
        else:
            print(f"{indent}{name}: {value}")


if __name__ == "__main__":
    main_guard(main, failures=(CheckFailed,))
