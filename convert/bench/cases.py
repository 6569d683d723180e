"""What is measured: the suites of a CPU, of an H200, and of its settings. No framework is loaded here.

Names are `train/<dense|moe>/<preset>/<dtype>` and likewise for the other kinds; `preset+rows64` is the preset with 64
sequences a step, `+layers8` with eight layers. Every case runs alone with `--only NAME`.
"""

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Any

from convert.bench.case import Case
from convert.bench.results import OURS, Facts
from convert.bench.tune_cases import tuned
from jaxlm.config import ConfigError, ModelConfig, RunConfig, nearest
from jaxlm.count import active_param_count, flops_per_token, param_count
from jaxlm.presets import preset

SUITES = {"cpu": 1_230, "h200": 540, "sweep": 540}  # seconds that each may take
START = 8.0  # of them that a process needs before its first case
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # of traces: the largest difference over the largest number
WARMUP = 10  # steps of those whose losses are compared: without, roundings would soon lead apart
ITEM = {"float32": 4, "bfloat16": 2}


def suite(name: str, shrink: bool = False) -> list[Case]:
    """The cases of a suite in the order in which they run; `shrink`: the same at sizes that take any machine seconds.

    Raises ConfigError for a suite that is not there.
    """
    if name not in SUITES:
        raise ConfigError(f"unknown suite {name!r}{nearest(name, SUITES)}; suites are {', '.join(SUITES)}")
    return {"cpu": _cpu, "h200": _h200, "sweep": _sweeps}[name](_Sizes(shrink))


def chosen(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """Cases whose name fits one of the globs; all without any. Raises ConfigError for a glob that fits none."""
    for pattern in patterns:
        if not any(_fits(case.name, pattern) for case in cases):
            kinds = sorted({case.name.partition("/")[0] for case in cases})
            near = nearest(pattern, [case.name for case in cases])
            raise ConfigError(f"--only {pattern!r} fits no case{near}; cases begin with {', '.join(kinds)}")
    return [case for case in cases if not patterns or any(_fits(case.name, p) for p in patterns)]


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern.rstrip("/") + "/")


def plain(run: RunConfig) -> RunConfig:
    """A run whose step both frameworks do alike: no dropout, no details, no z-loss, one micro-batch.

    Nor a warmup: in its first steps hardly a weight moves, and nobody would see an optimizer that does nothing.
    """
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, dropout=0.0),
        optim=dataclasses.replace(run.optim, z_loss_coef=0.0, warmup_steps=0),
        train=dataclasses.replace(run.train, accumulation=1),
        log=dataclasses.replace(run.log, details=False),
    )


def thirty_million() -> RunConfig:
    """A dense decoder of 30 million parameters, no preset: between the quickstart and what needs a GPU."""
    run = preset("quickstart-dense")
    sizes = {
        "vocab_size": 8_192,
        "d_model": 512,
        "n_layers": 6,
        "n_heads": 8,
        "n_kv_heads": 8,
        "head_dim": 64,
    }
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **sizes, d_ff=1_536))


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """The sizes of the suites, or small ones."""

    small: bool

    def run(self, name: str, dtype: str, rows: int = 0, length: int = 0, layers: int = 0) -> RunConfig:
        """A preset by name with changes; 0 = the preset's own."""
        run = plain(thirty_million() if name == "decoder-30m" else preset(name))
        model, train = run.model, run.train
        if layers:
            model = dataclasses.replace(model, n_layers=layers)
        rows, length = rows or train.batch_size, length or train.seq_len
        if self.small:
            model, rows, length = _shrunk(model), min(rows, 2), 32
        train = dataclasses.replace(train, dtype=dtype, batch_size=rows, seq_len=length)
        return dataclasses.replace(run, model=model, train=train)

    def n(self, size: int, small: int) -> int:
        """A size, or the small one."""
        return small if self.small else size


def _shrunk(model: ModelConfig) -> ModelConfig:
    moe = model.moe
    if moe.n_experts:
        moe = dataclasses.replace(moe, n_experts=4, n_active=2, d_ff=min(moe.d_ff, 32))
    sizes = {"vocab_size": 320, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
    return dataclasses.replace(model, **sizes, d_ff=48, context=256, moe=moe)


def _kind(run: RunConfig) -> str:
    return "moe" if run.model.moe.n_experts else "dense"


def train_case(
    s: _Sizes,
    name: str,
    dtype: str,
    sides: Sequence[str],
    group: str = "train",
    label: str = "",
    **changes: Any,
) -> Case:
    """A training step. changes: rows, length, layers; alone, seconds; remat."""
    own = {key: changes.pop(key) for key in ("alone", "seconds") if key in changes}
    remat = changes.pop("remat", "none")
    run = s.run(name, dtype, **changes)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, remat=remat))
    tokens = run.train.batch_size * run.train.seq_len
    flops = tokens * flops_per_token(run.model, run.train.seq_len)
    moved = 28.0 * param_count(run.model)  # AdamW in float32 reads p, m, v, g and writes p, m, v
    about = (
        f"{run.train.batch_size} x {run.train.seq_len} tokens a step, {param_count(run.model):,} parameters"
    )
    about += "" if remat == "none" else f", jaxlm with remat {remat}"
    facts = Facts(
        f"train/{_kind(run)}/{name}{label}/{dtype}",
        "tokens/s",
        tokens,
        flops,
        moved,
        dtype,
        TOLERANCE[dtype],
        about,
    )
    return Case(facts, "train", (OURS, *(f"torchref:{how}" for how in sides)), group, dtype, run, {}, **own)


def losses_case(s: _Sizes, name: str, dtype: str, how: str, steps: int, group: str, **changes: Any) -> Case:
    """The losses of the first steps beside PyTorch's; nothing is timed."""
    own = {key: changes.pop(key) for key in ("alone", "seconds") if key in changes}
    run = s.run(name, dtype, **changes)
    run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, warmup_steps=WARMUP))
    facts = Facts(
        f"losses/{_kind(run)}/{name}/{dtype}",
        "rel",
        1.0,
        tolerance=2e-2,
        about=f"{steps} steps from the same weights",
    )
    sides = (OURS, f"torchref:{how}")
    return Case(facts, "losses", sides, group, dtype, run, {"steps": s.n(steps, 5)}, **own)


def serve_case(
    s: _Sizes,
    what: str,
    name: str,
    dtype: str,
    sides: Sequence[str],
    group: str,
    batch: int,
    prompt: int,
    new: int,
) -> Case:
    """Reading a prompt (`prefill`), or a whole greedy answer (`decode`): the prompt and `new` tokens."""
    batch, prompt, new = s.n(batch, min(batch, 2)), s.n(prompt, 24), s.n(new, 8) if new else 0
    run = s.run(name, dtype)
    model, item = run.model, ITEM[dtype]
    table = 0 if model.tied else model.vocab_size * model.d_model
    weights = item * (active_param_count(model) - table)
    per_slot = 2 * item * model.n_layers * model.n_kv_heads * model.head_dim * batch
    if what == "decode":
        moved = new * (weights + per_slot * (prompt + new / 2))
        flops, work = 0.0, batch * new
        about = f"batch {batch}, {new} greedy tokens after {prompt}, the prompt's time included"
    else:
        moved, work = float(weights), batch * prompt
        unread = 2.0 * model.d_model * model.vocab_size * (work - batch)  # the head sees a prompt's end alone
        flops = work * flops_per_token(model, prompt) / 3 - unread
        about = f"batch {batch}, prompts of {prompt} tokens"
    facts = Facts(
        f"{what}/{_kind(run)}/{name}/{dtype}", "tokens/s", work, flops, moved, dtype, TOLERANCE[dtype], about
    )
    options = {"what": what, "batch": batch, "prompt": prompt, "new": new}
    return Case(facts, "serve", (OURS, *(f"torchref:{how}" for how in sides)), group, dtype, run, options)


def head_case(
    s: _Sizes, tokens: int, d: int, vocab: int, dtype: str, sides: Sequence[str], group: str, **options: Any
) -> Case:
    """Head and loss, forward and both gradients."""
    label = f"n{tokens}-d{d}-v{vocab}" + "".join(f"-{key}{value}" for key, value in options.items())
    tokens, d, vocab = s.n(tokens, 64), s.n(d, 16), s.n(vocab, 320)
    facts = Facts(
        f"head/{label}/{dtype}",
        "ms",
        1.0,
        6.0 * tokens * d * vocab,
        2.0 * ITEM[dtype] * d * vocab,
        dtype,
        TOLERANCE[dtype],
        "summed cross-entropy, d hidden and d weight",
    )
    shape = {"tokens": tokens, "d": d, "vocab": vocab} | options
    return Case(facts, "layers", (OURS, *(f"torchref:{how}" for how in sides)), group, dtype, None, shape)


def moe_case(
    s: _Sizes,
    n: int,
    e: int,
    a: int,
    d: int,
    f: int,
    dtype: str,
    sides: Sequence[str],
    group: str,
    **options: Any,
) -> Case:
    """A whole mixture layer, router included, forward and all gradients."""
    label = f"n{n}-e{e}-a{a}-d{d}-f{f}" + "".join(f"-{key}{value}" for key, value in options.items())
    n, e, d, f = s.n(n, 96), s.n(e, 4), s.n(d, 16), s.n(f, 24)
    flops = 6.0 * n * (a * 3 * d * f + d * e)
    facts = Facts(
        f"moe_layer/{label}/{dtype}",
        "ms",
        1.0,
        flops,
        2.0 * ITEM[dtype] * e * 3 * d * f,
        dtype,
        TOLERANCE[dtype],
        "router, experts and combination; gradients of input and weights",
    )
    shape = {"n": n, "e": e, "a": a, "d": d, "f": f} | options
    return Case(facts, "layers", (OURS, *(f"torchref:{how}" for how in sides)), group, dtype, None, shape)


def attention_case(
    s: _Sizes, b: int, t: int, n: int, k: int, h: int, dtype: str, sides: Sequence[str], group: str
) -> Case:
    """Causal attention on ready heads, forward and gradients of q, k and v."""
    label = f"b{b}-t{t}-n{n}-k{k}-h{h}"
    b, t = s.n(b, 2), s.n(t, 32)
    facts = Facts(
        f"attention/{label}/{dtype}",
        "ms",
        1.0,
        3.0 * 4.0 * b * n * h * t * t / 2,  # that fused kernels make the scores again is not counted
        ITEM[dtype] * 6.0 * b * t * h * (n + k),
        dtype,
        TOLERANCE[dtype],
        "forward and backward, the backward pass counted as two forward passes",
    )
    shape = {"b": b, "t": t, "heads": n, "kv": k, "h": h}
    return Case(facts, "layers", (OURS, *(f"torchref:{how}" for how in sides)), group, dtype, None, shape)


def _cpu(s: _Sizes) -> list[Case]:
    f32, bf16 = "float32", "bfloat16"
    dense = {f32: ("compile", "eager"), bf16: ("compile", "compile-autocast", "eager-autocast")}
    mixed = {
        f32: ("compile-loop", "compile-grouped", "eager-loop"),
        bf16: ("compile-grouped", "compile-loop", "eager-loop"),
    }
    moe = {f32: ("loop", "grouped", "batched"), bf16: ("loop", "compile-grouped", "batched")}
    cases = [train_case(s, "quickstart-dense", d, dense[d]) for d in (f32, bf16)]
    cases += [train_case(s, "quickstart", d, mixed[d]) for d in (f32, bf16)]
    cases += [train_case(s, "decoder-30m", d, dense[d], seconds=90.0) for d in (f32, bf16)]
    cases += [
        train_case(s, "quickstart-dense", f32, ("compile",), label=f"+rows{rows}", rows=rows, seconds=60.0)
        for rows in (16, 32, 64)
    ]
    cases += [
        train_case(s, "quickstart-dense", f32, ("compile",), label=f"+layers{layers}", layers=layers)
        for layers in (2, 8)
    ]
    cases += [tuned(train_case(s, "quickstart-dense", f32, ("compile", "eager"), "tune", seconds=30.0))]
    cases += [moe_case(s, 4_096, 8, 2, 256, 512, d, moe[d], "layers") for d in (f32, bf16)]
    cases += [head_case(s, 2_048, 512, 32_768, d, ("full", "fused"), "layers") for d in (f32, bf16)]
    cases += [attention_case(s, 8, 256, 6, 2, 48, f32, ("sdpa",), "layers")]
    cases += [attention_case(s, 2, 1_024, 8, 8, 64, d, ("sdpa",), "layers") for d in (f32, bf16)]
    how = ("compile", "eager")
    cases += [serve_case(s, "prefill", "quickstart-dense", f32, how, "serve", 8, 256, 0)]
    cases += [serve_case(s, "prefill", "decoder-30m", f32, how, "serve", 4, 512, 0)]
    cases += [
        serve_case(s, "decode", name, f32, how, "serve", 1, 32, 64)
        for name in ("quickstart-dense", "quickstart", "decoder-30m")
    ]
    cheap = {"layers": 25.0, "host": 30.0}
    cases += _host(s)
    cases = [dataclasses.replace(c, seconds=cheap.get(c.kind, c.seconds)) for c in cases]
    cases += [losses_case(s, "quickstart", bf16, "compile-grouped", 50, "losses")]
    return cases


def _host(s: _Sizes) -> list[Case]:
    """What runs on the host: batches and files."""
    tokens, rows, length = s.n(50_000_000, 200_000), s.n(32, 4), s.n(1_024, 64)
    cases = []
    for name in ("windows", "packed"):
        facts = Facts(
            f"loader/{name}/uint16",
            "tokens/s",
            rows * length * 100,
            bytes=rows * length * 100 * 10.0,
            tolerance=0.0,
        )
        options = {
            "tokens": tokens,
            "rows": rows,
            "length": length,
            "packing": name == "packed",
            "batches": 100,
        }
        sides = (OURS, "torchref:dataloader") if name == "windows" else (OURS,)
        cases.append(Case(facts, "host", sides, "host", "uint16", None, options))
    run = s.run("llama-1.1b", "bfloat16", layers=2)
    size = 2.0 * param_count(run.model)
    for name in ("export-hf", "import-hf"):
        about = (
            "bytes of bfloat16 read, turned, written and flushed; beside load_file, transposes and save_file"
        )
        facts = Facts(f"convert/{name}/bfloat16", "GB/s", size, bytes=2 * size, tolerance=0.0, about=about)
        sides = (OURS, "torchref:safetensors")
        cases.append(Case(facts, "host", sides, "host", "bfloat16", run, {"what": name}))
    return cases


def _h200(s: _Sizes) -> list[Case]:
    """By value, so that what no time is left for is worth the least."""
    bf16 = "bfloat16"
    alone: dict[str, Any] = {"alone": True}
    cases = [
        train_case(s, "gptoss", bf16, ("compile-grouped",), "gptoss", rows=32, seconds=60.0, **alone),
        train_case(
            s, "minigpt-124m", bf16, ("compile", "compile-autocast"), "minigpt", rows=64, seconds=40.0
        ),
        losses_case(s, "minigpt-124m", bf16, "compile", 50, "minigpt", rows=16, seconds=25.0),
        train_case(s, "llama-1.1b", bf16, ("compile",), "llama", rows=16, seconds=60.0, **alone),
    ]
    serving = [
        serve_case(s, "decode", name, bf16, ("compile",), "serve", 1, prompt, new)
        for name, prompt, new in (
            ("llama-1.1b", 1_024, 256),
            ("gptoss", 1_024, 256),
            ("minigpt-124m", 512, 256),
        )
    ]
    serving += [serve_case(s, "prefill", "llama-1.1b", bf16, ("compile",), "serve", 4, 2_048, 0)]
    cases += [dataclasses.replace(case, seconds=15.0) for case in serving]
    cases += _numerics(s)
    cases += [
        train_case(s, "gptoss", bf16, ("eager-loop",), "eager", label="+rows8", rows=8, seconds=40.0, **alone)
    ]
    layers = [
        attention_case(s, *shape, bf16, ("cudnn", "flash"), "layers")
        for shape in ((16, 2_048, 32, 8, 32), (8, 2_048, 32, 4, 64), (32, 1_024, 12, 12, 64))
    ]
    layers += [head_case(s, 65_536, 1_024, 200_019, bf16, ("fused",), "layers")]
    layers += [moe_case(s, 65_536, 32, 2, 1_024, 2_048, bf16, ("compile-grouped",), "layers")]
    cases += [dataclasses.replace(case, seconds=10.0) for case in layers]
    how = "compile-grouped"
    cases += [losses_case(s, "gptoss", bf16, how, 50, "losses", rows=4, layers=2, seconds=35.0)]
    return cases + _probes(s)


def _probes(s: _Sizes) -> list[Case]:
    """What the machine can do: products, copies, sums by index."""
    cases = []
    for m, k, n in ((8_192, 8_192, 8_192), (65_536, 1_024, 4_096), (8_192, 1_024, 200_064)):
        label = f"{m}x{k}x{n}"
        m, k, n = s.n(m, 64), s.n(k, 32), s.n(n, 48)
        facts = Facts(f"gemm/{label}/bfloat16", "TFLOP/s", 2.0 * m * k * n, 2.0 * m * k * n, tolerance=2e-2)
        facts = dataclasses.replace(facts, peak="bfloat16")
        sides = (OURS, "torchref:matmul")
        cases.append(
            Case(facts, "probes", sides, "probes", "bfloat16", None, {"m": m, "k": k, "n": n}, seconds=4.0)
        )
    size = s.n(1 << 30, 1 << 16)
    facts = Facts("copy/1GB/float32", "GB/s", 2.0 * size, bytes=2.0 * size, tolerance=1e-6)
    cases.append(
        Case(facts, "probes", (OURS, "torchref:copy"), "probes", "float32", None, {"size": size}, seconds=4.0)
    )
    rows, d, vocab = s.n(32_768, 64), s.n(1_024, 8), s.n(200_064, 100)
    for dtype in ("bfloat16",):
        for ids in ("zipf", "same"):
            facts = Facts(
                f"scatter/{ids}/{dtype}", "ms", 1.0, bytes=4.0 * vocab * d + 8.0 * rows * d, tolerance=0.5
            )
            about = (
                "gradient of an embedding: rows added up by id; bfloat16 sums of one id differ by their order"
            )
            facts = dataclasses.replace(facts, about=about)
            options = {"rows": rows, "d": d, "vocab": vocab, "ids": ids}
            sides = (OURS, "torchref:index_add")
            cases.append(Case(facts, "probes", sides, "probes", dtype, None, options, seconds=4.0))
    cases += [grouped_case(s, product, "uniform") for product in ("up", "down", "d_rows", "d_weights")]
    cases += [grouped_case(s, "down", "zipf")]
    return cases


def _numerics(s: _Sizes) -> list[Case]:
    """Every fast path in bfloat16 against its plain form in float32: one number each, relative, at most 2e-2."""
    cases = []
    for what in ("attention", "attention-window", "moe", "head", "logits-gptoss", "logits-llama"):
        facts = Facts(
            f"numerics/{what}/bfloat16", "rel", 1.0, tolerance=2e-2, about="relative error, limit 2e-2"
        )
        options = {"what": what, "small": s.small}
        cases.append(Case(facts, "numerics", (OURS,), "numerics", "bfloat16", None, options, seconds=5.0))
    return cases


def grouped_case(s: _Sizes, product: str, groups: str, cut: tuple[int, ...] = (), tile: int = 128) -> Case:
    """One grouped product of gptoss at 64k tokens; cut: columns, inner, warps, stages of jaxlm's kernel."""
    assignments, e, d, f = s.n(131_072, 96), s.n(32, 4), s.n(1_024, 32), s.n(2_048, 48)
    inner, columns = {"up": (d, 2 * f), "down": (f, d), "d_rows": (2 * f, d), "d_weights": (d, 2 * f)}[
        product
    ]
    flops = 2.0 * assignments * inner * columns
    label = groups + (f"-tile{tile}-cut{'x'.join(map(str, cut))}" if cut or tile != 128 else "")
    facts = Facts(
        f"grouped/{product}/{label}/bfloat16", "TFLOP/s", flops, flops, peak="bfloat16", tolerance=2e-2
    )
    options = {
        "product": product,
        "groups": groups,
        "s": assignments,
        "e": e,
        "inner": inner,
        "columns": columns,
    }
    options |= {"tile": s.n(tile, 16)} | ({"cut": cut} if cut and not s.small else {})
    sides = (OURS,) if cut else (OURS, "torchref:grouped_mm")
    return Case(
        facts, "kernels", sides, "sweeps" if cut else "probes", "bfloat16", None, options, seconds=4.0
    )


def _sweeps(s: _Sizes) -> list[Case]:
    """Settings of the fast paths, for those who set the defaults."""
    cases = [
        grouped_case(s, product, "uniform", cut, tile)
        for product in ("up", "down", "d_rows", "d_weights")
        for cut, tile in (
            ((128, 64, 8, 4), 128),
            ((128, 32, 4, 4), 128),
            ((256, 64, 8, 3), 128),
            ((128, 64, 4, 4), 64),
        )
    ]
    cases += [
        head_case(s, 65_536, 1_024, 200_019, "bfloat16", (), "sweeps", chunk=chunk)
        for chunk in (2_048, 4_096, 16_384)
    ]
    cases += [
        moe_case(s, 65_536, 32, 2, 1_024, 2_048, "bfloat16", (), "sweeps", backend=backend)
        for backend in ("batched",)
    ]
    cases = [dataclasses.replace(case, seconds=min(case.seconds, 15.0)) for case in cases]
    whole = {"alone": True, "seconds": 40.0}
    cases += [train_case(s, "gptoss", "bfloat16", (), "gptoss", label="+rows16", rows=16, **whole)]
    cases += [
        train_case(s, "llama-1.1b", "bfloat16", (), "llama", label="+rows32", rows=32, remat="dots", **whole)
    ]
    return cases
