"""ONNX: the decoder as one graph for prefill and cached decoding; `convert.onnx_decoder` runs it.

    input_ids [B, T], attention_mask [B, S+T], past_key_values.i.key|value [B, K, S, H]
        -> logits [B, T, V], present.i.key|value [B, K, S+T, H]

S = 0 is a prefill. B, T and S are free in one and the same file. The mask is 1 for tokens and 0 for padding, the cached
slots included; positions count the tokens of a row, so rows of unequal length, padded on the left, run together.

The graph is built node by node rather than traced: nothing of an example's shape can be baked in, no weight is held
twice, and weights stream into the file one at a time. Experts are sparse and dropless: each runs on the tokens that
chose it. Only standard operators, so that any runtime for the opset can read it.
"""

import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from convert.onnx_decoder import CONFIG_KEY
from convert.rules import ConversionError
from jaxlm.config import ModelConfig, to_dict
from jaxlm.rope_table import rope_table

if TYPE_CHECKING:
    from torchref.model import Decoder

MODEL, DATA = "model.onnx", "model.onnx.data"
INLINE_LIMIT = 256_000_000  # bytes of weights inside model.onnx; protobuf ends at 2 GiB
ALIGNMENT = 4096  # of tensors in model.onnx.data, so that runtimes can map them
OPSETS = (17, 25)  # oldest and newest operator set the graph is tested with

Shapes = Mapping[str, tuple[int, ...]]


class Tensor(NamedTuple):
    """A weight of the graph: its name and shape there, and how to read it when it is written."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def refusals(config: ModelConfig) -> list[str]:
    """What of a configuration ONNX cannot express, one `field=value` each: nothing; training settings do not matter."""
    return []


def write(
    directory: Path,
    model: "Decoder",
    *,
    opset: int = 17,
    dtype: str = "float32",
    inline_limit: int = INLINE_LIMIT,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Writes `model.onnx`, and `model.onnx.data` beside it for weights over `inline_limit` bytes.

    Args:
        directory: existing directory.
        model: the decoder in PyTorch; its weights are cast to `dtype` one at a time.
        opset: version of the operator set, 17 to 25.
        dtype: of weights and computation: float32, or float64 for comparisons to rounding.
        inline_limit: largest total of weights, in bytes, that go into model.onnx itself.
        progress: called with the bytes of each weight that was written.

    Returns:
        The facts: files (name -> bytes), inputs, outputs, opset, dtype, tensors, parameters, notes.

    Raises:
        ConversionError: onnx is not installed, or opset or dtype is not supported.
    """
    try:
        import onnx
    except ImportError:
        raise ConversionError("onnx is not installed; pip install 'jaxlm[export]'") from None
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise ConversionError(f"opset={opset} is not supported; choose {OPSETS[0]} to {OPSETS[1]}")
    if dtype not in ("float32", "float64"):
        raise ConversionError(f"dtype={dtype!r} is not supported; choose float32 or float64")
    parameters = dict(model.named_parameters())
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in parameters.values()} - {dtype})

    def read(name: str, index: int | None) -> np.ndarray:
        value = parameters[name].detach()
        value = (value if index is None else value[index]).cpu()
        return (value.double() if dtype == "float64" else value.float()).numpy()

    graph = _Graph(model.config, {name: tuple(p.shape) for name, p in parameters.items()}, read, dtype, opset)
    inputs, outputs = _decoder(graph)
    unused = parameters.keys() - graph.used
    assert not unused, f"the graph does not use {sorted(unused)}"
    proto = graph.model(inputs, outputs)
    files = _save(
        proto, list(graph.tensors.values()), np.dtype(dtype), Path(directory), inline_limit, progress
    )
    onnx.checker.check_model(str(Path(directory) / MODEL), full_check=True)
    return {
        "files": files,
        "inputs": [value.name for value in inputs],
        "outputs": [value.name for value in outputs],
        "opset": opset,
        "dtype": dtype,
        "tensors": len(graph.tensors),
        "parameters": sum(p.numel() for p in parameters.values()),
        "notes": [f"{kind} weights are stored as {dtype}" for kind in kinds],
    }


class _Graph:
    """Nodes, constants and weights as they are added; `scope` begins the names of what comes next."""

    def __init__(
        self,
        config: ModelConfig,
        shapes: Shapes,
        read: Callable[[str, int | None], np.ndarray],
        dtype: str,
        opset: int,
    ):
        import onnx

        self.onnx, self.opset, self.dtype = onnx, opset, np.dtype(dtype)
        self.config, self.shapes, self.read, self.scope = config, shapes, read, ""
        self.nodes: list[Any] = []
        self.constants: dict[tuple[Any, ...], Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self.used: set[str] = set()
        self.kind = self.onnx.helper.np_dtype_to_tensor_dtype(self.dtype)

    def op(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Adds a node with one output and returns the output's name, which an output of the graph can choose."""
        return self.ops(operator, 1, *inputs, output=output, **attributes)[0]

    def ops(
        self, operator: str, n_outputs: int, *inputs: str, output: str = "", **attributes: Any
    ) -> list[str]:
        """Adds a node; returns the names of its outputs."""
        name = f"{self.scope}/{operator}_{len(self.nodes)}"
        outputs = [output or f"{name}:{i}" for i in range(n_outputs)]
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, outputs, name, **attributes))
        return outputs

    def ints(self, *values: int) -> str:
        """A constant int64 [n]."""
        return self._constant(np.asarray(values, np.int64))

    def scalar(self, value: int) -> str:
        """A constant int64 scalar."""
        return self._constant(np.asarray(value, np.int64))

    def real(self, value: float) -> str:
        """A constant scalar in the dtype of the computation."""
        return self._constant(np.asarray(value, self.dtype))

    def _constant(self, array: np.ndarray) -> str:
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self.constants:
            name = f"constant_{len(self.constants)}"
            self.constants[key] = self.onnx.numpy_helper.from_array(array, name)
        return self.constants[key].name

    def weight(self, name: str, index: int | None = None) -> str:
        """A parameter of the model, stored once, or one entry along its first axis (an expert)."""
        full = name if index is None else f"{name}.{index}"
        shape = self.shapes[name] if index is None else self.shapes[name][1:]
        self.tensors[full] = Tensor(full, shape, lambda: self.read(name, index))
        self.used.add(name)
        return full

    def table(self, name: str, value: np.ndarray) -> str:
        """A table that is no parameter, stored like one."""
        self.tensors[name] = Tensor(name, value.shape, lambda: value.astype(self.dtype))
        return name

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """The ModelProto without the weights' data."""
        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, list(self.constants.values()))
        opset = helper.make_opsetid("", self.opset)
        proto = helper.make_model(
            graph, opset_imports=[opset], ir_version=helper.find_min_ir_version_for([opset])
        )
        proto.producer_name, proto.producer_version = "jaxlm", _version()
        proto.doc_string = "Decoder-only language model: prefill (no past) and cached decoding in one graph."
        helper.set_model_props(proto, {CONFIG_KEY: json.dumps(to_dict(self.config))})
        return proto


def _version() -> str:
    try:
        return importlib.metadata.version("jaxlm")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _save(
    proto: Any,
    tensors: Sequence[Tensor],
    dtype: np.dtype,
    directory: Path,
    inline_limit: int,
    progress: Callable[[int], None] | None,
) -> dict[str, int]:
    """Adds the weights to the model, inside or beside it, and writes it; sizes of the files by name."""
    from onnx.external_data_helper import set_external_data
    from onnx.helper import np_dtype_to_tensor_dtype

    external = sum(int(np.prod(t.shape)) for t in tensors) * dtype.itemsize > inline_limit
    data = (directory / DATA).open("wb") if external else None
    try:
        for tensor in tensors:
            raw = np.ascontiguousarray(tensor.read(), dtype.newbyteorder("<"))
            assert raw.shape == tensor.shape, f"{tensor.name}: {raw.shape} is not {tensor.shape}"
            stored = proto.graph.initializer.add()
            stored.name, stored.data_type = tensor.name, np_dtype_to_tensor_dtype(dtype)
            stored.dims.extend(tensor.shape)
            stored.raw_data = b"" if external else raw.tobytes()
            if data is not None:
                data.write(b"\0" * (-data.tell() % ALIGNMENT))
                set_external_data(stored, DATA, data.tell(), raw.nbytes)
                stored.ClearField("raw_data")
                data.write(raw.data)
            if progress is not None:
                progress(raw.nbytes)
    finally:
        if data is not None:
            data.close()
    (directory / MODEL).write_bytes(proto.SerializeToString())
    return {name: (directory / name).stat().st_size for name in ([MODEL, DATA] if external else [MODEL])}


class _Sequence(NamedTuple):
    """What all blocks share: names of values in the graph."""

    ids_shape: str  # [2]: B, T
    total: str  # [1]: S+T
    query_position: str  # [B, T] int64
    key_position: str  # [B, S+T] int64
    key_valid: str  # [B, 1, S+T] bool
    distance: str  # [T, S+T] int64: slots between query and key
    rope: tuple[str, str] | None  # cos, sin [B, T, 1, H/2]


def _decoder(g: _Graph) -> tuple[list[Any], list[Any]]:
    """Adds the whole model; returns its inputs and outputs."""
    c = g.config
    seq = _sequence(g)
    x = g.op("Gather", g.weight("embed.weight"), "input_ids")
    if c.position == "learned":
        x = g.op("Add", x, g.op("Gather", g.weight("pos_embed.weight"), seq.query_position))
    x = g.op("Reshape", x, g.ints(-1, c.d_model))  # [B*T, D] from here on
    masks: dict[int, str] = {}
    for layer in range(c.n_layers):
        block = g.scope = f"blocks.{layer}"
        window = c.window(layer)
        if window not in masks:
            near = g.op("GreaterOrEqual", seq.distance, g.scalar(0))
            if window:
                near = g.op("And", near, g.op("Less", seq.distance, g.scalar(window)))
            masks[window] = g.op("Unsqueeze", g.op("And", near, seq.key_valid), g.ints(1, 2))
        normed = _norm(g, f"{block}.attn_norm", x)
        x = g.op("Add", x, _attention(g, layer, normed, seq, masks[window]))
        normed = _norm(g, f"{block}.mlp_norm", x)
        feed_forward = _moe(g, layer, normed) if c.is_moe(layer) else _mlp(g, f"{block}.mlp", normed)
        x = g.op("Add", x, feed_forward)
    g.scope = "head"
    x = _norm(g, "final_norm", x)
    bias = [g.weight("head_bias")] if c.tied and c.head_bias else []
    logits = (
        g.op("Gemm", x, g.weight("embed.weight"), *bias, transB=1) if c.tied else _linear(g, "lm_head", x)
    )
    shape = g.op("Concat", seq.ids_shape, g.ints(c.vocab_size), axis=0)
    g.op("Reshape", logits, shape, output="logits")
    return _signature(g)


def _signature(g: _Graph) -> tuple[list[Any], list[Any]]:
    """Inputs and outputs with their names, types and named free sizes."""
    c, helper, integer = g.config, g.onnx.helper, g.onnx.TensorProto.INT64
    batch, length, past = "batch_size", "sequence_length", "past_sequence_length"
    total = f"{past} + {length}"
    inputs = [
        helper.make_tensor_value_info("input_ids", integer, [batch, length]),
        helper.make_tensor_value_info("attention_mask", integer, [batch, total]),
    ]
    outputs = [helper.make_tensor_value_info("logits", g.kind, [batch, length, c.vocab_size])]
    for name, slots, values in (("past_key_values", past, inputs), ("present", total, outputs)):
        shape = [batch, c.n_kv_heads, slots, c.head_dim]
        values += [
            helper.make_tensor_value_info(f"{name}.{layer}.{part}", g.kind, shape)
            for layer in range(c.n_layers)
            for part in ("key", "value")
        ]
    return inputs, outputs


def _sequence(g: _Graph) -> _Sequence:
    """Positions count a row's tokens; causality and windows count slots, as the cache is laid out."""
    from onnx import TensorProto

    g.scope = "sequence"
    ids_shape = g.op("Shape", "input_ids")
    past = g.op("Shape", "past_key_values.0.key", start=2, end=3)
    total = g.op("Add", past, g.op("Shape", "input_ids", start=1, end=2))
    valid = g.op("Cast", "attention_mask", to=TensorProto.BOOL)
    seen = g.op("CumSum", g.op("Cast", valid, to=TensorProto.INT64), g.scalar(1))
    key_position = g.op("Max", g.op("Sub", seen, g.scalar(1)), g.scalar(0))
    query_position = g.op("Slice", key_position, past, total, g.ints(1))
    end = g.op("Squeeze", total)
    query_index = g.op("Range", g.op("Squeeze", past), end, g.scalar(1))
    key_index = g.op("Range", g.scalar(0), end, g.scalar(1))
    rope = None
    if g.config.position == "rope":
        tables = zip(("rope.cos", "rope.sin"), rope_table(g.config))
        cos, sin = (g.op("Gather", g.table(*table), query_position) for table in tables)
        rope = (g.op("Unsqueeze", cos, g.ints(2)), g.op("Unsqueeze", sin, g.ints(2)))
    return _Sequence(
        ids_shape,
        total,
        query_position,
        key_position,
        g.op("Unsqueeze", valid, g.ints(1)),
        g.op("Sub", g.op("Unsqueeze", query_index, g.ints(1)), key_index),
        rope,
    )


def _linear(g: _Graph, name: str, x: str) -> str:
    """x [n, in] @ weight.T (+ bias); the weight stays [out, in], so a tied head shares the embedding's."""
    bias = [g.weight(f"{name}.bias")] if f"{name}.bias" in g.shapes else []
    return g.op("Gemm", x, g.weight(f"{name}.weight"), *bias, transB=1)


def _norm(g: _Graph, name: str, x: str) -> str:
    """RMSNorm over the last axis."""
    # onnxruntime fuses a norm written with Pow into one kernel, but its float64 form loses epsilon: not there.
    square = g.op("Mul", x, x) if g.dtype == np.float64 else g.op("Pow", x, g.real(2))
    if g.opset >= 18:
        mean = g.op("ReduceMean", square, g.ints(-1))
    else:
        mean = g.op("ReduceMean", square, axes=[-1])
    scale = g.op("Sqrt", g.op("Add", mean, g.real(g.config.norm_eps)))
    return g.op("Mul", g.op("Div", x, scale), g.weight(f"{name}.weight"))


def _rotate(g: _Graph, x: str, cos: str, sin: str) -> str:
    """Half-split rotary positions of x [B, T, n, H]."""
    half = g.config.head_dim // 2
    a, b = g.ops("Split", 2, x, g.ints(half, half), axis=-1)
    first = g.op("Sub", g.op("Mul", a, cos), g.op("Mul", b, sin))
    second = g.op("Add", g.op("Mul", b, cos), g.op("Mul", a, sin))
    return g.op("Concat", first, second, axis=-1)


def _attention(g: _Graph, layer: int, x: str, seq: _Sequence, mask: str) -> str:
    """Attention of block `layer` on x [B*T, D] and its cache; mask [B, 1, 1, T, S+T]. Adds the outputs `present`."""
    c, name = g.config, f"blocks.{layer}.attn"
    N, K, H = c.n_heads, c.n_kv_heads, c.head_dim
    G = N // K

    def heads(part: str, n: int, norm: str, rotated: bool) -> str:
        """One projection as [B, n, T, H]."""
        y = _linear(g, f"{name}.{part}_proj", x)
        y = g.op("Reshape", y, g.op("Concat", seq.ids_shape, g.ints(n, H), axis=0))
        y = _norm(g, norm, y) if f"{norm}.weight" in g.shapes else y
        y = _rotate(g, y, *seq.rope) if rotated and seq.rope is not None else y
        return g.op("Transpose", y, perm=[0, 2, 1, 3])

    q = heads("q", N, f"{name}.q_norm", True)
    cached = {"key": heads("k", K, f"{name}.k_norm", True), "value": heads("v", K, "", False)}
    for part, new in cached.items():
        past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
        cached[part] = g.op("Concat", past, new, axis=2, output=present)
    # Query heads of one kv head are rows of one matrix: [B, K, G*T, H] @ [B, K, H, S+T].
    q = g.op("Reshape", g.op("Mul", q, g.real(H**-0.5)), g.ints(0, K, -1, H))
    scores = g.op("MatMul", q, g.op("Transpose", cached["key"], perm=[0, 1, 3, 2]))
    scores = g.op("Reshape", scores, g.op("Concat", g.ints(0, K, G, -1), seq.total, axis=0))
    if c.attn_bias_table:
        scores = g.op("Add", scores, _score_bias(g, name, seq))
    # The lowest finite number, not -inf: padding may see nothing, and its row is not read but must not become NaN.
    scores = g.op("Where", mask, scores, g.real(float(np.finfo(g.dtype).min)))
    weights = g.op("Reshape", g.op("Softmax", scores, axis=-1), _like(g, seq, K))
    out = g.op("Reshape", g.op("MatMul", weights, cached["value"]), g.ints(0, N, -1, H))
    out = g.op("Reshape", g.op("Transpose", out, perm=[0, 2, 1, 3]), g.ints(-1, N * H))
    return _linear(g, f"{name}.o_proj", out)


def _like(g: _Graph, seq: _Sequence, n_kv_heads: int) -> str:
    """The shape [B, K, G*T, S+T]."""
    return g.op("Concat", g.ints(0, n_kv_heads, -1), seq.total, axis=0)


def _score_bias(g: _Graph, name: str, seq: _Sequence) -> str:
    """[B, K, G, T, S+T] of the learned table [1, N, context, context], looked up by each row's own positions."""
    c = g.config
    row = g.op("Mul", g.op("Unsqueeze", seq.query_position, g.ints(2)), g.scalar(c.context))
    cell = g.op("Add", row, g.op("Unsqueeze", seq.key_position, g.ints(1)))
    table = g.op("Reshape", g.weight(f"{name}.bias_table"), g.ints(c.n_heads, -1))
    bias = g.op("Transpose", g.op("Gather", table, cell, axis=1), perm=[1, 0, 2, 3])
    split = g.ints(0, c.n_kv_heads, c.n_heads // c.n_kv_heads, -1)
    return g.op("Reshape", bias, g.op("Concat", split, seq.total, axis=0))


def _activate(g: _Graph, gate: str, up: str | None) -> str:
    """silu(gate) * up for swiglu, else GELU of `gate` in its erf or tanh form."""
    if g.config.mlp == "swiglu":
        assert up is not None, "swiglu has two projections"
        return g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
    if g.config.mlp == "gelu_erf":
        curve = g.op("Erf", g.op("Mul", gate, g.real(0.5**0.5)))
    else:
        cube = g.op("Mul", g.op("Mul", gate, g.op("Mul", gate, gate)), g.real(0.044715))
        curve = g.op("Tanh", g.op("Mul", g.op("Add", gate, cube), g.real((2 / np.pi) ** 0.5)))
    return g.op("Mul", g.op("Mul", gate, g.real(0.5)), g.op("Add", curve, g.real(1)))


def _mlp(g: _Graph, name: str, x: str) -> str:
    """Dense feed-forward layer of x [n, D]."""
    up = _linear(g, f"{name}.up_proj", x)
    if g.config.mlp == "swiglu":
        return _linear(g, f"{name}.down_proj", _activate(g, _linear(g, f"{name}.gate_proj", x), up))
    return _linear(g, f"{name}.down_proj", _activate(g, up, None))


def _expert(g: _Graph, name: str, index: int, x: str) -> str:
    """The MLP of one expert on the tokens x [n, D] that chose it; n may be 0."""
    first = "gate_up" if g.config.mlp == "swiglu" else "up"

    def project(part: str, x: str) -> str:
        bias = [g.weight(f"{name}.{part}_bias", index)] if f"{name}.{part}_bias" in g.shapes else []
        return g.op("Gemm", x, g.weight(f"{name}.{part}", index), *bias, transB=1)

    gate, up = project(first, x), None
    if first == "gate_up":
        width = g.config.expert_d_ff
        gate, up = g.ops("Split", 2, gate, g.ints(width, width), axis=-1)
    return project("down", _activate(g, gate, up))


def _moe(g: _Graph, layer: int, x: str) -> str:
    """Mixture of experts on x [n, D]: choices [n*A] are sorted by expert, computed, and put back in their order."""
    moe, name = g.config.moe, f"blocks.{layer}.moe"
    E, A = moe.n_experts, moe.n_active
    logits = _linear(g, f"{name}.router", x)
    # TopK: "the element with the lower index will appear first" on ties, as the router's rule wants it.
    _, ids = g.ops("TopK", 2, logits, g.ints(A), axis=1, largest=1, sorted=1)
    weights = g.op("GatherElements", g.op("Softmax", logits, axis=1), ids, axis=1)
    if moe.renormalize:
        weights = g.op("Div", weights, g.op("ReduceSum", weights, g.ints(-1), keepdims=1))
    ids = g.op("Reshape", ids, g.ints(-1))
    choices, results = [], []
    for expert in range(E):
        hits = g.op("NonZero", g.op("Equal", ids, g.scalar(expert)))
        choice = g.op("Squeeze", hits, g.ints(0))
        token = g.op("Div", choice, g.scalar(A))
        choices.append(choice)
        results.append(_expert(g, f"{name}.experts", expert, g.op("Gather", x, token)))
    order, sorted_y = g.op("Concat", *choices, axis=0), g.op("Concat", *results, axis=0)
    place = g.op("Unsqueeze", order, g.ints(1))
    y = g.op("ScatterND", sorted_y, place, sorted_y)
    y = g.op("Reshape", y, g.ints(-1, A, g.config.d_model))
    y = g.op("Mul", y, g.op("Unsqueeze", weights, g.ints(2)))
    out = g.op("ReduceSum", y, g.ints(1), keepdims=0)
    if moe.shared_d_ff:
        shared = _mlp(g, f"{name}.shared", x)
        if moe.shared_gate:
            shared = g.op("Mul", shared, g.op("Sigmoid", _linear(g, f"{name}.shared_gate", x)))
        out = g.op("Add", out, shared)
    return out
