"""A TARGET of a command line, opened: whatever holds a model, in our names and layouts.

    run       a run directory: orbax checkpoints, or torchref's where PyTorch trained it; one that trained an adapter
              (LoRA) is its base with the adapter merged
    jaxlm     a model directory in jaxlm's layouts, as `python -m convert import` writes it
    torch     a torchref checkpoint: the same names, [out, in]
    hf        a Hugging Face directory of a family that is known here
    gguf      a GGUF file of the llama architecture
    gptoss    a .pt checkpoint of gptoss
    pt        a directory with torchref's state dict in model.pt, and its config.json

Weights are read when they are first asked for, tensor by tensor where the format allows. jax and torch are imported no
earlier than they are needed.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from convert import adapter_files
from convert.adapter_files import OpenedAdapter
from convert.checkpoints import CHECKPOINTS, chosen
from convert.contents import Contents, Moments, TargetError
from convert.fingerprint import sketch
from convert.kept import kept
from convert.rules import ConversionError
from convert.run_contents import BaseFacts, bare_adapter, base_facts, is_lora, of_lora_run, of_run
from convert.specials import Specials, of_files, of_tokenizer
from jaxlm.config import InputError, ModelConfig, RunConfig, load
from jaxlm.json_file import read_object
from jaxlm.model_dir import CONFIG, INDEX, WEIGHTS, open_weights, read_manifest, weight_map
from jaxlm.tensor_file import Lazy, open_file, read_header
from jaxlm.tokenizer import Tokenizer
from jaxlm.tune_config import TuneRun, load_run

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxlm.model import Params
    from torchref.model import Decoder

OPTIMIZER, FACTS = "optimizer.safetensors", "training.json"
OTHER_SLOTS = {"momentum_buffer", "exp_avg_codes", "exp_avg_sq_codes"}  # of Muon, and of AdamW in 8 bits
Kind = Literal["run", "jaxlm", "torch", "hf", "gguf", "gptoss", "pt"]
_EXPECTED = (
    "a target is a run, a model directory with config.json and model.safetensors (jaxlm, torchref or Hugging Face), "
    "a .gguf file or a gptoss .pt file"
)


@dataclass(frozen=True)
class Target:
    """An opened target: what it is, and on demand its tokenizer and its weights for either framework."""

    path: Path
    config: ModelConfig
    run: RunConfig | None  # None for anything but a run
    checkpoint: str  # latest or best, of a run
    kind: Kind = "torch"
    # Of formats whose configuration cannot be had without opening them, and of what an adapter was merged into.
    foreign: Contents | None = None
    merged: tuple[str, ...] = ()  # adapters in it, beside that of a run: where they lie

    @functools.cached_property
    def base(self) -> "Target":
        """Of a LoRA run: the model that its adapter belongs to. Raises TargetError where it is gone."""
        assert isinstance(self.run, TuneRun)
        tune, facts = self.run.tune, base_facts(self.path)
        names = (tune.base, "" if facts is None else facts.base)
        found = next((name for name in names if name and Path(name).exists()), None)
        if found is None:
            raise TargetError(
                f"{self.path} holds an adapter of {tune.base}, which does not exist: bring it back, or write where it "
                f"is now as tune.base into {self.path / CONFIG}"
            )
        _require_end(self.path)
        base = open_target(found, tune.checkpoint, optimizer=False)
        return _with_all(base, () if facts is None else facts.merged)

    @functools.cached_property
    def _chosen(self) -> tuple[str, Any]:
        """Whose checkpoint of a run is meant, and what its reader calls it; only whole ones are."""
        return chosen(self.path, self.checkpoint)

    @property
    def torch_weights(self) -> Path | None:
        """Directory of the torchref checkpoint, None where something else has the weights.

        Of a run that both frameworks trained, the later step is the latest and the lower loss the best. Raises
        InputError where a run's checkpoints are damaged.
        """
        if self.foreign is not None or is_lora(self.run):
            return None
        if self.run is None:
            return self.path if self.kind == "torch" else None
        framework, which = self._chosen
        return self.path / CHECKPOINTS["torch"] / which if framework == "torch" else None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the weights, or inside their file. Raises InputError where there is none."""
        if self.foreign is not None and self.foreign.tokenizer is not None:
            return self.foreign.tokenizer
        path = (self.path if self.path.is_dir() else self.path.parent) / "tokenizer.json"
        if not path.is_file() and is_lora(self.run):
            return self.base.tokenizer
        if not path.is_file():
            raise TargetError(
                f"{self.path} has no tokenizer.json; copy there the one that the model was trained with"
            )
        return Tokenizer.load(path)

    @functools.cached_property
    def specials(self) -> Specials:
        """Which ids start, end and pad, and the chat template: as its files say, or as the tokenizer's names do."""
        try:
            found = of_files(*kept(self.path)) if self.run is not None else self._said
        except ValueError as error:
            raise TargetError(str(error)) from None
        if found is not None:
            return found
        try:
            return of_tokenizer(self.tokenizer)
        except InputError:
            return Specials()

    @property
    def family(self) -> str:
        """The Hugging Face class that the model is opened with, '' where there is none."""
        from convert.hf.express import require_family

        try:
            return self.contents.family or require_family(self.config).name
        except ConversionError:
            return ""

    @property
    def facts(self) -> BaseFacts:
        """What the model is known by, as the base of an adapter."""
        return BaseFacts(self.family, sketch(self.contents.tensors), str(self.path.resolve()), self.merged)

    @property
    def adapter(self) -> OpenedAdapter:
        """The bare adapter of a LoRA run; needs the base only where the run has no base.json.

        Raises ConversionError where this is no such run, or the factors hold NaN or infinity.
        """
        if not isinstance(self.run, TuneRun) or not is_lora(self.run):
            raise ConversionError(f"{self.path} has no adapter: it is no adapter, and no LoRA run")
        known = base_facts(self.path) or self.base.facts
        return bare_adapter(self.run, self.path, self.checkpoint, known)

    @property
    def _said(self) -> Specials | None:
        return self.contents.specials or of_files(self.contents.raw, self.contents.carried)

    @functools.cached_property
    def contents(self) -> Contents:
        """Weights in our names, unread where the format allows, with what else it holds."""
        if self.foreign is not None:
            return self.foreign
        if isinstance(self.run, TuneRun) and is_lora(self.run):
            return of_lora_run(self.run, self.path, self.checkpoint, self.base.config, self.base.contents)
        if self.run is not None and self.torch_weights is None:
            return of_run(self.run, self.path, self._chosen[1])
        if self.kind == "jaxlm":
            return _of_jaxlm(self.path, self.config)
        if self.kind == "pt":
            return _of_pt(self.path)
        assert self.torch_weights is not None
        return _of_torch(self.torch_weights, self.config)

    @property
    def params(self) -> "Params":
        """jaxlm's parameters, in the dtype they were saved in. Raises InputError where there are none."""
        return load_params(self.contents.tensors, self.config)

    @functools.cached_property
    def decoder(self) -> "Decoder":
        """The torch twin, on CUDA where there is one. Raises InputError where there are no weights."""
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.torch_weights is not None:
            from torchref.checkpoint import load_model

            return load_model(self.torch_weights, device=device)
        from convert.native import build_torch

        arrays = {path: tensor.read() for path, tensor in self.contents.tensors.items()}
        return build_torch(self.config, arrays).to(device)


def open_target(path: str | Path, checkpoint: str = "latest", optimizer: bool = True) -> Target:
    """Reads a target's configuration; `optimizer`: whether AdamW's state in a gptoss file is wanted, and must fit.

    Raises InputError where the path is no target, or a damaged one.
    """
    path = Path(path)
    if checkpoint not in ("latest", "best"):
        raise TargetError(f"checkpoint={checkpoint!r} must be latest or best")
    if path.is_file():
        return _open_single(path, checkpoint, optimizer)
    if not path.is_dir():
        raise TargetError(f"{path} does not exist; {_EXPECTED}")
    config = path / CONFIG
    if not config.is_file():
        inside = [p for p in sorted(path.iterdir()) if p.suffix in (".gguf", ".pt")]
        if len(inside) == 1:
            return _open_single(inside[0], checkpoint, optimizer)
        if adapter_files.is_adapter(path) or adapter_files.is_peft(path):
            return _open_adapted(path)
        raise TargetError(f"{path} has no config.json; {_EXPECTED}")
    try:
        facts = read_object(config)
    except (OSError, ValueError) as error:
        raise TargetError(f"{config} cannot be read: {error}") from None
    if "model" in facts:
        run = load_run(config)
        return Target(path, run.model, run, checkpoint, "run")
    if "model_type" in facts or "architectures" in facts:
        return _open_hf(path, checkpoint)
    if not (path / WEIGHTS).is_file() and not (path / INDEX).is_file():
        if (path / "model.pt").is_file():
            return Target(path, load(ModelConfig, config), None, checkpoint, "pt")
        if (path / "model.onnx").is_file():
            raise TargetError(
                f"{path} holds model.onnx, which is written for other programs and not read back"
            )
        raise TargetError(f"{path} has a config.json but neither checkpoints nor {WEIGHTS}; {_EXPECTED}")
    if (path / WEIGHTS).is_file() and (path / INDEX).is_file():
        raise TargetError(f"{path} has both {WEIGHTS} and {INDEX}; take away the one that is not the model's")
    return Target(path, load(ModelConfig, config), None, checkpoint, layout_of(path))


def with_adapter(target: Target, opened: OpenedAdapter) -> Target:
    """The target with W + scale * a @ b in the place of W, computed when a weight is read.

    Raises ConversionError where the adapter does not fit, or belongs to another model.
    """
    contents, facts = target.contents, opened.facts
    what = f"{opened.path} is an adapter for another model than {target.path}"
    adapter_files.require_base(facts, what, target.config, contents.tensors, target.kind == "gguf")
    tensors = adapter_files.with_adapter(contents.tensors, opened.factors, facts.adapter)
    notes = (*contents.notes, f"merged with the adapter in {opened.path}")
    contents = dataclasses.replace(contents, tensors=tensors, moments=None, notes=notes)
    merged = (*target.merged, str(opened.path.resolve()))
    return dataclasses.replace(target, foreign=contents, merged=merged)


def read_adapter(path: Path, base: Target | None) -> OpenedAdapter:
    """An adapter of ours, of a LoRA run (its newest checkpoint), or by peft, which needs the model it belongs to.

    Raises ConversionError where it is none, not of this model, or holds NaN or infinity.
    """
    if adapter_files.is_adapter(path):
        return adapter_files.read_ours(path)
    if adapter_files.is_peft(path):
        if base is None:
            raise ConversionError(
                f"{path} is an adapter by peft; name the model it belongs to with --base TARGET"
            )
        return adapter_files.read_peft(path, base.config, base.family)
    if (path / CONFIG).is_file():
        return open_target(path, optimizer=False).adapter
    if not path.exists():
        raise ConversionError(f"{path} does not exist; an adapter was expected there")
    raise ConversionError(f"{path} holds neither adapter.json nor adapter_config.json: it is no adapter")


def _open_adapted(path: Path) -> Target:
    """An adapter directory whose files say where its model is: that model, with the adapter merged."""
    base, checkpoint, merged = adapter_files.base_of(path)
    if not base or not Path(base).exists():
        gone = f" (it was made for {base}, which is not there)" if base else ""
        raise TargetError(
            f"{path} is an adapter, not a model{gone}: give its model as the target, with --adapter {path}"
        )
    _require_end(path)
    return _with_all(open_target(base, checkpoint, optimizer=False), (*merged, str(path.resolve())))


def _require_end(path: Path) -> None:
    """Raises TargetError where the bases of adapters lead back to one of them."""
    seen: list[Path] = []
    while path.resolve() not in seen:
        seen.append(path.resolve())
        run = load_run(path / CONFIG) if adapter_files.is_run(path) else None
        if isinstance(run, TuneRun) and is_lora(run):
            following = run.tune.base
        elif adapter_files.is_adapter(path) or adapter_files.is_peft(path):
            following = adapter_files.base_of(path)[0]
        else:
            return
        if not following:
            return
        path = Path(following)
    raise TargetError(f"{path} is an adapter whose base, by way of {len(seen)} adapters, is itself")


def _with_all(target: Target, adapters: tuple[str, ...]) -> Target:
    """The target with those of the adapters merged, one after the other, that are not in it yet."""
    for name in adapters:
        if name not in target.merged:
            target = with_adapter(target, read_adapter(Path(name), target))
    return target


def layout_of(directory: Path) -> Literal["jaxlm", "torch"]:
    """Whose layouts a model directory has: its manifest says so, or else its first file."""
    manifest = read_manifest(directory)
    if manifest is not None:
        said = manifest.get("format")
    elif (directory / INDEX).is_file():
        first = sorted(set(weight_map(directory).values()))[0]
        said = read_header(directory / first).metadata.get("format")
    else:
        said = read_header(directory / WEIGHTS).metadata.get("format")
    return "jaxlm" if said == "jaxlm" else "torch"


def load_params(tensors: Mapping[str, Lazy], config: ModelConfig, mesh: "Mesh | None" = None) -> "Params":
    """Tensors as jaxlm's parameters, one after the other; on a mesh each device receives its own part only.

    Raises TargetError where the weights are float64 and jax would narrow them.
    """
    import jax

    from jaxlm.model import abstract_model
    from jaxlm.sharding import sharding

    if not jax.config.jax_enable_x64 and any(t.dtype == np.float64 for t in tensors.values()):
        raise TargetError("the weights are float64: set JAX_ENABLE_X64=1, or jax would narrow them")
    if mesh is None:
        # Never the file's own pages; and no second tensor is read before this one is placed.
        return {
            path: jax.device_put(tensor.read(), may_alias=False).block_until_ready()
            for path, tensor in tensors.items()
        }
    axes = abstract_model(config).axes
    params = {}
    for path, tensor in tensors.items():
        whole = tensor.read()
        params[path] = jax.make_array_from_callback(
            tensor.shape,
            sharding(mesh, tensor.shape, axes[path]),
            lambda index, whole=whole: whole[
                index
            ].copy(),  # jax may keep what it is given: no page of the file
        )
        params[path].block_until_ready()  # so that no second tensor is read before this one is placed
    return params


def _open_hf(path: Path, checkpoint: str) -> Target:
    from convert import hf, stream

    found = hf.read(path)
    tensors = {name: stream.lazy(planned, str(path)) for name, planned in found.tensors.items()}
    both = (path / WEIGHTS).is_file() and (path / INDEX).is_file()
    notes = (
        (*found.notes, f"{WEIGHTS} was read, as transformers does; {INDEX} was not") if both else found.notes
    )
    contents = Contents(
        tensors, raw=found.raw_config, carried=found.carried, notes=notes, family=found.family
    )
    return Target(path, found.config, None, checkpoint, "hf", contents)


def _open_single(path: Path, checkpoint: str, optimizer: bool) -> Target:
    """A target that is one file."""
    from convert import stream

    if path.suffix == ".gguf":
        from convert import gguf_file

        found = gguf_file.read(path)
        tensors = {name: stream.lazy(planned, str(path)) for name, planned in found.tensors.items()}
        contents = Contents(
            tensors, tokenizer=found.tokenizer, specials=found.specials, notes=tuple(found.notes)
        )
        return Target(path, found.config, None, checkpoint, "gguf", contents)
    if path.suffix in (".pt", ".pth"):
        from convert import gptoss

        found = gptoss.read(path, optimizer)
        tensors = {name: stream.lazy(planned, str(path)) for name, planned in found.tensors.items()}
        moments = None
        if found.moments is not None:
            m, v = (
                {name: stream.lazy(planned, str(path)) for name, planned in part.items()}
                for part in (found.moments.m, found.moments.v)
            )
            moments = Moments(m, v, found.moments.step)
        contents = Contents(tensors, moments=moments, notes=tuple(found.notes))
        return Target(path, found.config, None, checkpoint, "gptoss", contents)
    raise TargetError(f"{path} is a file of no known kind; {_EXPECTED}")


def _of_jaxlm(path: Path, config: ModelConfig) -> Contents:
    from convert.rules import SAME, Pair, require
    from jaxlm.model import abstract_model

    tensors = open_weights(path)
    _require_layers(config, len(tensors), path)
    shapes = {name: tuple(s.shape) for name, s in abstract_model(config).shapes.items()}
    same = [Pair(name, shape, name, SAME) for name, shape in shapes.items()]
    require(same, tensors)
    moments = _stored_moments(path, {"m": "m", "v": "v"}, lambda part: (require(same, part), part)[1])
    return Contents({name: tensors[name] for name in shapes}, moments, *kept(path))


def _of_torch(path: Path, config: ModelConfig) -> Contents:
    from convert import native, stream

    stored = open_weights(path)
    _require_layers(config, len(stored), path)
    pairs = native.pairs(config)

    def ours(part: Mapping[str, Lazy]) -> dict[str, Lazy]:
        return {name: stream.lazy(planned, str(path)) for name, planned in stream.here(pairs, part).items()}

    tensors, slots = ours(stored), {"m": "exp_avg", "v": "exp_avg_sq"}
    if others := _slots_of(path) & OTHER_SLOTS:
        note = f"{OPTIMIZER} holds {', '.join(sorted(others))}; no other format takes the optimizer"
        return Contents(tensors, None, *kept(path), notes=(note,))
    return Contents(tensors, _stored_moments(path, slots, ours), *kept(path))


def _of_pt(path: Path) -> Contents:
    from convert import native, pt_file, stream
    from convert.tree import to_numpy

    config, state = pt_file.read(path)
    stored = {name: Lazy.of(to_numpy(value), str(path)) for name, value in state.items()}
    plans = stream.here(native.pairs(config), stored)
    return Contents({name: stream.lazy(plan, str(path)) for name, plan in plans.items()}, None, *kept(path))


def _require_layers(config: ModelConfig, count: int, path: Path) -> None:
    """Refuses a count of layers that the files cannot fill, before a model of that size is thought of."""
    if config.n_layers > count:
        raise TargetError(
            f"{path / CONFIG}: n_layers={config.n_layers}, but the files hold {count} tensors in all"
        )


def _slots_of(path: Path) -> set[str]:
    """What the optimizer of a model directory keeps of its parameters."""
    stored = open_file(path / OPTIMIZER) if (path / OPTIMIZER).is_file() else {}
    return {name.partition(":")[0] for name in stored}


def _stored_moments(path: Path, slots: dict[str, str], ours: Any) -> Moments | None:
    """AdamW's state of a model directory: optimizer.safetensors with SLOT:NAME, and the step in training.json."""
    if not (path / OPTIMIZER).is_file():
        return None
    stored = open_file(path / OPTIMIZER)
    if not stored:
        return None
    try:
        facts = read_object(path / FACTS)
        step = facts["step"]
        if type(step) is not int or step < 0:
            raise ValueError(f"step={step!r} must be a count of steps")
        step -= facts.get("guard", {}).get("skipped", 0)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise TargetError(f"{path / FACTS} cannot be read: {error}") from None
    split = {
        slot: {name.partition(":")[2]: t for name, t in stored.items() if name.partition(":")[0] == theirs}
        for slot, theirs in slots.items()
    }
    return Moments(ours(split["m"]), ours(split["v"]), step)
