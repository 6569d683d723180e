"""What goes where: every tensor of a conversion, before anything is converted."""

from collections.abc import Iterator, Mapping

from convert.rules import ConversionError, Pair
from convert.targets import Target
from jaxlm.config import ModelConfig
from jaxlm.tensor_file import Lazy


def table(
    format: str, config: ModelConfig, family: str | None = None, experts: str | None = None
) -> list[Pair]:
    """The pairs between our tensors and a format's; [] where names and layouts are our own, or the format has none."""
    if format in ("torch", "pt", "onnx"):
        from convert import native

        return native.pairs(config)
    if format == "hf":
        from convert.hf.express import require_family
        from convert.hf.families import pairs

        return pairs(config, require_family(config, family).name, experts or "per_expert")  # type: ignore[arg-type]
    if format == "gguf":
        from convert import gguf_file

        refused = gguf_file.refusals(config, None)
        if refused:
            raise ConversionError("\n".join(refused))
        return gguf_file.pairs(config)
    if format == "gptoss":
        from convert import gptoss
        from convert.gptoss_form import require_form

        require_form(config)
        return gptoss.pairs(config)
    return []


def lines(pairs: list[Pair], tensors: Mapping[str, Lazy], inverse: bool) -> Iterator[str]:
    """A line per tensor: name and shape here and there, its dtype as stored, and what is done to it."""
    if not pairs:
        for name, tensor in tensors.items():
            end = f"{name} {_shape(tensor.shape)}"
            yield f"{end} -> {end}  {tensor.dtype}  same"
        return
    for pair in pairs:
        ours = pair.path if pair.part_shape == pair.shape else f"{pair.path}[{_index(pair)}]"
        ends = f"{ours} {_shape(pair.part_shape)}", f"{pair.other} {_shape(pair.other_shape)}"
        source, sink = reversed(ends) if inverse else ends
        yield f"{source} -> {sink}  {tensors[pair.path].dtype}  {pair.transform.name}"


def source_table(target: Target) -> list[Pair]:
    """The pairs by which an opened target was read."""
    kind = {"run": "jaxlm"}.get(target.kind, target.kind)
    if kind != "hf":
        return table(kind, target.config)
    from convert.hf.families import layout_of, pairs
    from convert.hf.files import open_checkpoint

    assert target.contents.family is not None
    return pairs(target.config, target.contents.family, layout_of(open_checkpoint(target.path)))


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _index(pair: Pair) -> str:
    shown = [
        str(i)
        if isinstance(i, int)
        else ":"
        if i == slice(None) or i.indices(n)[:2] == (0, n)
        else f"{i.start}:{i.stop}"
        for i, n in zip(pair.index, pair.shape, strict=True)
    ]
    return ", ".join(shown)
